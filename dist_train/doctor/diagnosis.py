"""From everything that was measured to sections of findings. Pure functions."""

from dataclasses import dataclass

from dist_train.doctor.finding import Finding, Section
from dist_train.doctor.gpus import judge_gpus
from dist_train.doctor.judge_machine import judge_cores, judge_limits, judge_software
from dist_train.doctor.judge_meeting import judge_clocks, judge_links, judge_ranks
from dist_train.doctor.judge_speed import judge_speeds
from dist_train.doctor.judge_storage import judge_storage
from dist_train.doctor.judge_traffic import judge_traffic
from dist_train.doctor.machine import Machine
from dist_train.doctor.meeting import Arrival, Link
from dist_train.doctor.slurm_settings import Settings, judge_slurm
from dist_train.doctor.speeds import Speed, Traffic
from dist_train.doctor.storage import Disk, View
from dist_train.layout import Layout


@dataclass(frozen=True, kw_only=True, slots=True)
class Facts:
    """Everything that was measured; keys of dictionaries are ranks."""

    layout: Layout  # of rank 0
    run_dir: str
    wait_sec: float
    machines: list[Machine]  # of the ranks that started, in rank order
    arrivals: dict[int, Arrival]
    links: list[Link]
    ephemeral_ports: tuple[int, int]
    disk: Disk | None
    folder_error: str | None
    views: list[View]
    speeds: dict[int, Speed]
    traffic: dict[int, Traffic]
    why_no_traffic: str
    settings: Settings
    lost: dict[str, dict[int, str]]  # by stage
    sec: float


def diagnose(facts: Facts) -> list[Section]:
    """Return what is to be said about each part."""
    layout, machines, arrivals = facts.layout, facts.machines, facts.arrivals
    nodes = list(dict.fromkeys(m.node for m in machines))
    if not machines:  # rank 0 itself could leave no note
        why = facts.folder_error or "unknown"
        text = f"no rank could leave a note in {facts.run_dir} or at rank 0's port ({why})"
        return [Section(title="ranks", findings=[Finding("error", text)])]
    return [
        judge_ranks(layout, machines, arrivals, facts.lost, facts.wait_sec),
        judge_links(layout, machines, arrivals, facts.links, facts.ephemeral_ports),
        judge_clocks(nodes, facts.links),
        judge_software(machines, arrivals),
        judge_gpus(machines, arrivals, by_slurm=layout.launcher == "slurm"),
        judge_cores(machines),
        judge_limits(machines),
        judge_speeds(machines, facts.speeds),
        judge_traffic(machines, facts.traffic, layout.world_size, facts.why_no_traffic),
        judge_storage(facts.disk, facts.views, nodes, facts.folder_error),
        judge_slurm(facts.settings),
    ]
