"""Decide who computes or copies slowly, against the others. Pure functions."""

import statistics
from collections import defaultdict
from collections.abc import Callable

from dist_train.doctor.finding import Section, counted, ranks_of, share_of_others, size_of
from dist_train.doctor.machine import Machine
from dist_train.doctor.speeds import Speed

SLOW, VERY_SLOW = 0.75, 0.5  # of the others' median
SLOW_COPY = 0.6  # copies share the memory with all neighbours, and vary more
STARVED = 0.6  # of its cores' time: something else has the rest
LOADED = 0.5  # processes for each core, before the doctor did anything
Measure = Callable[[Speed], tuple[float, float]]  # the speed, and the share of its cores' time
MEASURES: dict[str, tuple[Measure, float]] = {
    "computes": (lambda speed: (speed.matmul_flops_per_sec, speed.core_share), SLOW),
    "copies memory": (lambda s: (s.copied_bytes_per_sec, s.copy_core_share), SLOW_COPY),
}


def judge_speeds(machines: list[Machine], speeds: dict[int, Speed]) -> Section:
    """Is a node, or a rank of a node, slower than the others?"""
    section = Section(title="computation")
    here = {m.rank: m for m in machines if m.rank in speeds}
    nodes: dict[str, list[Speed]] = defaultdict(list)
    for rank, machine in here.items():
        nodes[machine.node].append(speeds[rank])
    for node, mine in nodes.items():
        flops = statistics.median(speed.matmul_flops_per_sec for speed in mine)
        copied = statistics.median(speed.copied_bytes_per_sec for speed in mine)
        section.lines.append(
            f"{node}: {flops / 1e9:,.0f} GFLOP/s, copies {size_of(copied)}/s, each rank "
            f"({mine[0].device}, {counted(mine[0].num_threads, 'thread')})"
        )
    starved = [speed for speed in speeds.values() if speed.core_share < STARVED]
    named: set[str] = set()
    for verb, (measure, slow) in MEASURES.items():

        def value(speed: Speed, measure: Measure = measure) -> float:
            """Where most ranks lack cores, who got how much is chance; a quota is none."""
            reached, share = measure(speed)
            by_chance = 2 * len(starved) > len(speeds) and not speed.throttled_periods
            return reached / share if by_chance else reached

        # A node is slow if even the best of its ranks is.
        by_node = {node: max(map(value, mine)) for node, mine in nodes.items()}
        for node, share in share_of_others(by_node).items():
            if share < slow and node not in named:
                named.add(node)
                _tell(section, f"{node} {verb}", share, nodes[node], here)
        for node, mine in nodes.items():
            shares = share_of_others({str(speed.rank): value(speed) for speed in mine})
            for rank, share in shares.items():
                if share < slow and not {node, rank} & named:
                    named.add(rank)
                    who = f"rank {rank} on {node} {verb}"
                    _tell(section, who, share, [speeds[int(rank)]], here)
    if starved and not named:
        section.warning(
            f"{ranks_of(s.rank for s in starved)} got {min(s.core_share for s in starved):.0%} of "
            "the cores' time that the threads could use: ask for the nodes alone (--exclusive), "
            "start fewer ranks, or lower `threads`"
        )
    for node, machine in {m.node: m for m in machines}.items():
        if machine.load > LOADED * machine.num_cores + machine.local_world_size:
            section.note(
                f"{machine.load:.0f} processes wanted the {machine.num_cores} cores of {{nodes}} "
                "before this began: if they are not yours, other work runs there",
                node=node,
            )
    if len(speeds) < 2:
        section.unchecked("whether a rank is slow: there are no two to compare")
        return section
    return section.fine_if_nothing("no rank is slower than the others")


def _tell(
    section: Section, who: str, share: float, speeds: list[Speed], here: dict[int, Machine]
) -> None:
    machine = here[speeds[0].rank]
    certain = share < VERY_SLOW or any(speed.throttled_periods for speed in speeds)
    say = section.error if certain else section.warning
    say(f"{who} at {share:.0%} of the others' speed: {_reason(speeds, machine)}")


def _reason(speeds: list[Speed], machine: Machine) -> str:
    """Say why, as far as the machine tells, and what to do."""
    periods = sum(speed.periods for speed in speeds)
    late = sum(speed.throttled_periods for speed in speeds)
    share = statistics.median(speed.core_share for speed in speeds)
    leave = f"or leave the node out (--exclude={machine.node})"
    if late and periods:
        return (
            f"its cgroup's quota of {machine.quota_cores or 0:.3g} cores ran out in "
            f"{late / periods:.0%} of the periods, so raise the limit of job or container, {leave}"
        )
    if share < STARVED:
        return (
            f"it got {share:.0%} of its cores' time (load {machine.load:.1f} on "
            f"{machine.num_cores} cores before), so look with `top` what else runs, {leave}"
        )
    now, most = speeds[0].megahertz, speeds[0].megahertz_most
    if most and now < SLOW * most:
        return f"its cores run at {now:.0f} of {most:.0f} MHz, so look at cooling and power limits"
    return f"it has its cores to itself, so look at cooling, power limits and clocks, {leave}"
