"""Decide whether collectives are as fast as the network should make them. Pure functions.

What is said of InfiniBand and NVLink was not tested on such hardware.
"""

import statistics
from collections import Counter

from dist_train.doctor.finding import Section, counted, listed, size_of, time_of
from dist_train.doctor.machine import Machine
from dist_train.doctor.speeds import Pair, Traffic

FAR_TIMES, FAR_SEC = 5.0, 0.002  # a latency worth a word: so many times the others', and longer
VERY_FAR_TIMES, VERY_FAR_SEC = 20.0, 0.02
THIN, VERY_THIN = 0.4, 0.1  # of the others' bandwidth
LINK_SHARE = 0.3  # of the link's speed that one TCP connection should reach
WIDE_AREA_SEC = 0.005  # inside a cluster a message takes less
PAIRS_SHOWN = 12
INTERFACES = "GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME"
UNTESTED = "not tested on such hardware"


def judge_traffic(
    machines: list[Machine], traffic: dict[int, Traffic], world_size: int, why_not: str
) -> Section:
    """Are the all-reduce and each pair of nodes fast, and is the fast hardware used?"""
    section = Section(title="communication")
    num_nodes = len({m.node for m in machines})
    if 0 not in traffic:
        section.unchecked(f"all-reduce and messages between nodes: {why_not or 'rank 0 failed'}")
        return section
    first = traffic[0]
    for rank, mine in traffic.items():
        if mine.error:
            section.error(
                f"rank {rank} failed in {mine.stage} with {mine.backend} ({mine.error}): if names "
                f"and ports above are fine, choose the interface ({INTERFACES})"
            )
    connected = f"connected in {time_of(first.init_sec)}"
    section.lines.append(f"{first.backend} over {counted(world_size, 'rank')}, {connected}")
    for r in first.reductions:
        speed = f", {size_of(r.bus_bytes_per_sec(world_size))}/s on each link"
        section.lines.append(
            f"all-reduce of {size_of(r.num_bytes):>8}: {time_of(r.sec):>8}"
            + speed * (r.num_bytes >= 1 << 20)
        )
    pairs = [pair for mine in traffic.values() for pair in mine.pairs]
    section.lines += [
        f"{' - '.join(p.nodes)}: {time_of(p.latency_sec)}, {size_of(p.bytes_per_sec)}/s each way"
        for p in sorted(pairs, key=lambda pair: -pair.latency_sec)[:PAIRS_SHOWN]
    ]
    if num_nodes > 1:
        if not _compare(section, pairs):
            _link(section, pairs, first)
    else:
        section.unchecked("messages between nodes: there is one node only")
    _hardware(section, {m.node: m for m in machines}, traffic)
    return section.fine_if_nothing("no pair of nodes is slower than the others")


def _compare(section: Section, pairs: list[Pair]) -> bool:
    """Name the node whose pairs are all slow, else the pair that is; says if there is any."""
    latency = {tuple(p.nodes): p.latency_sec for p in pairs}
    slowness = {tuple(p.nodes): 1 / p.bytes_per_sec for p in pairs}
    far = [odd for odd in odd_ones(latency, FAR_TIMES) if odd[1] > FAR_SEC]
    for nodes, value, others in far:
        very = value > VERY_FAR_SEC and value > VERY_FAR_TIMES * others
        (section.error if very else section.warning)(
            f"a message between {_ends(nodes)} takes {time_of(value)}, one between other nodes "
            f"{time_of(others)}: {_look_at(nodes)}"
        )
    thin = odd_ones(slowness, 1 / THIN) if not far else []  # a far link is a thin one too
    for nodes, value, others in thin:
        (section.error if value * VERY_THIN > others else section.warning)(
            f"{size_of(1 / value)}/s go between {_ends(nodes)}, {size_of(1 / others)}/s between "
            f"other nodes: {_look_at(nodes)}"
        )
    least = min(latency.values(), default=0.0)
    if least > WIDE_AREA_SEC:
        (section.error if least > VERY_FAR_SEC else section.warning)(
            f"a message between nodes takes {time_of(least)} or more, well below 1 ms in a "
            f"cluster's network: look which interface is used ({INTERFACES})"
        )
    return bool(far or thin) or least > WIDE_AREA_SEC


def odd_ones(
    values: dict[tuple[str, ...], float], times: float
) -> list[tuple[tuple[str, ...], float, float]]:
    """Return (nodes, value, others' median) where a value is `times` above the others.

    One node is given if even the best of its pairs is; two for a pair that no such node explains.
    """
    found, named = [], set()
    for node in sorted({name for pair in values for name in pair}):
        mine = [value for pair, value in values.items() if node in pair]
        others = [value for pair, value in values.items() if node not in pair]
        if others and min(mine) > times * statistics.median(others):
            named.add(node)
            found.append(((node,), statistics.median(mine), statistics.median(others)))
    rest = {pair: value for pair, value in values.items() if not named & set(pair)}
    for pair, value in rest.items():
        others = [v for other, v in rest.items() if other != pair]
        if others and value > times * statistics.median(others):
            found.append((pair, value, statistics.median(others)))
    return found


def _ends(nodes: tuple[str, ...]) -> str:
    return listed(nodes if len(nodes) > 1 else (*nodes, "any other node"))


def _look_at(nodes: tuple[str, ...]) -> str:
    if len(nodes) > 1:
        return "look at the switches between them"
    node = listed(nodes)
    return f"look at its cable, switch port and interface, or leave it out (--exclude={node})"


def _link(section: Section, pairs: list[Pair], first: Traffic) -> None:
    """Compare with what the interface says of its link, where that carries the data."""
    if first.transports.get("NET/IB"):
        return
    if first.link_bytes_per_sec is None:
        section.unchecked(f"what the link should give: {first.link}")
        return
    worst = min(pairs, key=lambda pair: pair.bytes_per_sec, default=None)
    if worst is not None and worst.bytes_per_sec < LINK_SHARE * first.link_bytes_per_sec:
        section.warning(
            f"{listed(worst.nodes)} exchange {size_of(worst.bytes_per_sec)}/s, and the link of "
            f"{first.link} has {size_of(first.link_bytes_per_sec)}/s: look at MTU and other "
            f"traffic, and whether there is a faster interface ({INTERFACES})"
        )


def _hardware(section: Section, nodes: dict[str, Machine], traffic: dict[int, Traffic]) -> None:
    """Is InfiniBand active and used, and do GPUs of one node talk directly?"""
    for node, machine in nodes.items():
        down = [port for port in machine.infiniband if "ACTIVE" not in port]
        if down:
            section.warning(
                f"InfiniBand port {listed(down)} of {node} is not active: ask the administrators"
            )
        if machine.infiniband and machine.env.get("NCCL_IB_DISABLE") == "1":
            section.warning(f"NCCL_IB_DISABLE=1 on {node}, which has InfiniBand: unset it")
    if not any(mine.backend == "nccl" for mine in traffic.values()):
        section.unchecked(f"NVLink and InfiniBand: the ranks talk through gloo ({UNTESTED})")
        return
    used = sum((Counter(mine.transports) for mine in traffic.values()), Counter[str]())
    if not used:
        section.unchecked("what NCCL uses: it told nothing, or NCCL_DEBUG is set already")
        return
    section.note(f"NCCL uses {listed(f'{k} ({n} channels)' for k, n in used.items())} ({UNTESTED})")
    every_ib = all(machine.infiniband for machine in nodes.values())
    if every_ib and len(nodes) > 1 and "NET/Socket" in used and "NET/IB" not in used:
        section.error(
            "NCCL goes over TCP although every node has InfiniBand: look at NCCL_IB_DISABLE, "
            "NCCL_IB_HCA and NCCL_NET, and whether a container lacks the verbs libraries"
        )
    if any(m.local_world_size > 1 for m in nodes.values()) and not {"P2P", "NVLS"} & used.keys():
        section.warning(
            "GPUs of one node do not reach each other directly (no P2P channel): give "
            "--gpus-per-node instead of --gpus-per-task, which hides the other GPUs from a rank"
        )
