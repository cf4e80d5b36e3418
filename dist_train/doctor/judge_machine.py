"""Decide about software, cores, memory and limits, from what the ranks see. Pure functions."""

from collections import Counter, defaultdict
from collections.abc import Callable

from dist_train.doctor.finding import Section, counted, listed, ranks_of, size_of
from dist_train.doctor.machine import Machine
from dist_train.doctor.meeting import Arrival

SLOW_IMPORT_SEC = 30.0
FEW_FILES, TOO_FEW_FILES, FEW_PROCESSES = 4096, 256, 1024
LITTLE_SHM_BYTES = 1 << 30
LITTLE_MEMORY_BYTES = 2 << 30  # of a rank: torch alone takes a quarter of it
ODD_CURE: dict[str, tuple[Callable[[Section, str], None], str]] = {
    "CPU": (Section.note, "the bits of a result may depend on which node a rank is on"),
    "driver": (Section.warning, "ask the administrators for one, or --exclude these nodes"),
}
ELSE_CURE = (Section.error, "give every node the same installation")


def judge_software(machines: list[Machine], arrivals: dict[int, Arrival]) -> Section:
    """Are versions and files equal on all nodes?"""
    section = Section(title="software")
    came = [(m.node, arrivals[m.rank]) for m in machines if m.rank in arrivals]
    for node, why in {node: a.torch_error for node, a in came if a.torch_error}.items():
        section.error(
            f"torch cannot be imported on {node} ({why}): mend the installation there, or put the "
            "environment on a file system that all nodes see"
        )
    values = {
        "Python": {m.node: m.python for m in machines},
        "dist_train": {m.node: f"{m.version} (files {m.source_sha256[:8]})" for m in machines},
        "torch": {node: a.torch for node, a in came if not a.torch_error},
        "CUDA": {node: a.cuda for node, a in came if not a.torch_error},
        "NCCL": {node: a.nccl for node, a in came if not a.torch_error},
        "driver": {m.node: m.driver for m in machines},
        "CPU": {m.node: m.cpu_model for m in machines},
    }
    told = []
    for what, of_node in values.items():
        usual = Counter(of_node.values()).most_common(1)[0][0] if of_node else ""
        told += [f"{what} {usual}"] if usual else []
        odd = [f"{v or 'none'} on {n}" for n, v in of_node.items() if v != usual]
        if odd:
            say, cure = ODD_CURE.get(what, ELSE_CURE)
            say(section, f"{what} is {usual or 'none'} on most nodes, {listed(odd)}: {cure}")
    section.lines.append(", ".join(told))
    for node, sec in {node: a.import_sec for node, a in came}.items():
        if sec > SLOW_IMPORT_SEC:
            usual_sec = sorted(a.import_sec for _, a in came)[len(came) // 2]
            section.note(
                f"importing torch took {sec:.0f} s on {node}, {usual_sec:.0f} s in the median: put "
                "the environment on a faster file system, such as the node's own disk"
            )
    return section.fine_if_nothing(f"the same on {counted({m.node for m in machines}, 'node')}")


def judge_cores(machines: list[Machine]) -> Section:
    """Has each rank cores and memory of its own, and how much?"""
    section = Section(title="cores and memory")
    nodes: dict[str, list[Machine]] = defaultdict(list)
    for machine in machines:
        nodes[machine.node].append(machine)
    for node, ranks in nodes.items():
        first, num_cores = ranks[0], len({core for m in ranks for core in m.cores})
        quota = first.quota_cores
        each = min(num_cores, quota if quota is not None else num_cores) / len(ranks)
        section.lines.append(
            f"{node}: {num_cores} of {first.num_cores} cores for {counted(ranks, 'rank')}"
            + (f", quota {quota:.3g} cores" if quota is not None else "")
            + f", {counted(first.numa_nodes, 'NUMA node')}, "
            f"{size_of(first.memory_left_bytes)} of memory left"
        )
        if quota is not None and quota < num_cores:
            section.warning(
                f"a cgroup's quota gives the {counted(ranks, 'rank')} on {{nodes}} {quota:.3g} "
                f"cores together, although they may run on {num_cores}: raise the limit of the "
                "container or job",
                node=node,
            )
        else:
            _dealt(section, node, ranks, each)
        _threads(section, node, ranks, each)
        left = min(m.memory_left_bytes for m in ranks) / len(ranks)
        if left < LITTLE_MEMORY_BYTES:
            limit = first.memory_limit_bytes
            section.warning(
                f"{size_of(left)} of memory are left for each rank on {{nodes}}"
                + (f" (the job's limit is {size_of(limit)})" if limit is not None else "")
                + ": ask for more (--mem, --mem-per-cpu), or start fewer ranks",
                node=node,
            )
    return section.fine_if_nothing("no rank lacks cores or memory")


def _dealt(section: Section, node: str, ranks: list[Machine], each: float) -> None:
    crowds: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for machine in ranks:
        crowds[tuple(machine.cores)].append(machine.rank)
    total = ranks[0].num_cores
    crowded = {c: r for c, r in crowds.items() if len(c) < len(r) and len(c) < total}
    for cores, crowd in crowded.items():
        section.error(
            f"{ranks_of(crowd)} on {node} share core {listed(cores)} of {total}: give srun "
            "--cpus-per-task, and look at --cpu-bind"
        )
    if each >= 2 or crowded:
        return
    if total >= 2 * len(ranks):
        section.warning(
            f"each rank on {{nodes}} has {each:.3g} of the machine's {total} cores: give srun "
            "--cpus-per-task again (since SLURM 22.05 it does not take it over from sbatch), or "
            "set SRUN_CPUS_PER_TASK",
            node=node,
        )
    else:
        section.note(
            f"{counted(len(ranks), 'rank')} and their data workers share {each * len(ranks):.3g} "
            "cores on {nodes}: start fewer ranks if the data cannot keep up",
            node=node,
        )


def _threads(section: Section, node: str, ranks: list[Machine], each: float) -> None:
    threads = ranks[0].env.get("OMP_NUM_THREADS", "")
    if threads.isdigit() and int(threads) > max(1, each):
        section.warning(
            f"OMP_NUM_THREADS={threads} on {{nodes}}, where a rank has {each:.3g} cores: unset it, "
            "or set it to the cores of a rank",
            node=node,
        )
    spread = [m.rank for m in ranks if sum(bool(set(m.cores) & set(n)) for n in m.numa_nodes) > 1]
    if spread and ranks[0].driver:
        section.note(
            "ranks on {nodes} may run on several NUMA nodes: parallel.numa_binding=true keeps a "
            "rank beside its GPU",
            node=node,
        )


def judge_limits(machines: list[Machine]) -> Section:
    """Are open files, processes, locked memory and /dev/shm enough?"""
    section = Section(title="limits")
    first = machines[0]
    limits = [f"{k} {'unlimited' if v < 0 else v}" for k, v in first.limits.items()]
    shm = f"/dev/shm {size_of(first.shm_free_bytes)} free of {size_of(first.shm_bytes)}"
    section.lines.append(", ".join([*limits, shm]))
    for node, machine in {m.node: m for m in machines}.items():
        files, processes, locked = (machine.limits[k] for k in ("nofile", "nproc", "memlock"))
        if 0 <= files < FEW_FILES:
            say = section.error if files < TOO_FEW_FILES else section.note
            say(
                f"a process on {{nodes}} may open {files} files, and data workers hand pictures "
                f"over through them: set `ulimit -n {FEW_FILES}` or more before srun",
                node=node,
            )
        if 0 <= processes < FEW_PROCESSES:
            section.warning(
                f"a user may have {processes} processes and threads on {{nodes}}: set `ulimit -u "
                f"{FEW_PROCESSES}` or more, or ask the administrators",
                node=node,
            )
        if machine.infiniband and locked >= 0:
            section.error(
                f"InfiniBand is on {{nodes}}, but a process may lock only {size_of(locked)} of "
                "memory: ask the administrators for `memlock unlimited` (not tested)",
                node=node,
            )
        if machine.shm_free_bytes < LITTLE_SHM_BYTES:
            say = section.warning if machine.shm_bytes else section.error
            say(
                f"/dev/shm on {{nodes}} has {size_of(machine.shm_free_bytes)} free, and data "
                "workers hand batches over in it: give a container --shm-size=8g or --ipc=host, or "
                "delete what earlier jobs have left there",
                node=node,
            )
    return section.fine_if_nothing("enough on every node")
