"""Decide who is missing, which names and ports do not work, and whose clock is wrong.

Pure functions of what the nodes have tried.
"""

import statistics
from collections import defaultdict

from dist_train.doctor.finding import Section, counted, listed, ranks_of, time_of
from dist_train.doctor.machine import Machine
from dist_train.doctor.meeting import Arrival, Link, is_loopback
from dist_train.layout import Layout

SKEW_SEC, BAD_SKEW_SEC = 1.0, 60.0
UNCERTAIN_SEC = 0.5  # half a round trip: a clock that is asked so slowly is not judged
WHY = {
    "no such host": "the name does not resolve there: add it to DNS or to /etc/hosts",
    "refused": "refused: a firewall rejects it, or the name leads to another machine",
    "timed out": "no answer: a firewall drops it",
    "unreachable": "no way there: look at routes and firewall rules of that node",
    "another answers": "another machine answers: mend DNS or /etc/hosts there",
    "taken": "another process has it: choose one with MASTER_PORT",
}
OPEN_PORTS = "have all TCP ports between compute nodes opened (gloo and NCCL choose theirs freely)"


def judge_ranks(
    layout: Layout,
    machines: list[Machine],
    arrivals: dict[int, Arrival],
    lost: dict[str, dict[int, str]],
    wait_sec: float,
) -> Section:
    """Did every rank come, can each reach rank 0's port, and did each come through?"""
    section = Section(title="ranks")
    node_of = {m.rank: m.node for m in machines}
    master = f"{layout.master_addr}:{layout.master_port}"
    nodes = list(dict.fromkeys(node_of.values()))
    section.lines.append(
        f"{len(machines)} of {counted(layout.world_size, 'rank')} on {counted(nodes, 'node')} "
        f"({listed(nodes)}), found by: {layout.rule}"
    )
    missing = set(range(layout.world_size)) - set(node_of) - set(arrivals)
    if missing:
        section.error(
            f"{ranks_of(missing)} of {layout.world_size} said nothing within {wait_sec:.0f} s, "
            f"neither in the run folder's file system nor at {master}: look whether it started "
            "(squeue --steps), and let --run-dir be a folder that all nodes see"
        )
    slow = set(node_of) - set(arrivals)
    if slow:
        section.error(
            f"{ranks_of(slow)} on {listed({node_of[rank] for rank in slow})} started, but was not "
            f"ready within {wait_sec:.0f} s, most likely in importing torch: put the environment "
            "on a faster file system, or raise --wait"
        )
    cannot: dict[tuple[str, str, str], list[int]] = defaultdict(list)
    for rank, a in sorted(arrivals.items()):
        if a.store not in ("reached", "not tried") and not a.torch_error:
            cannot[a.store, a.store_detail, a.store_address].append(rank)
    for (outcome, detail, address), ranks in cannot.items():
        where = listed(dict.fromkeys(node_of.get(rank, "an unknown node") for rank in ranks))
        section.error(
            f"{ranks_of(ranks)} on {where} started, but cannot "
            f"{'listen' if outcome == 'taken' else 'reach rank 0'} at {master}"
            f"{_in_brackets(address, detail)}: {WHY[outcome]}"
        )
    for stage, of_rank in lost.items():
        for why in dict.fromkeys(of_rank.values()):
            ranks = sorted(rank for rank, text in of_rank.items() if text == why)
            section.error(f"{ranks_of(ranks)} failed in {stage} ({why}): see its messages")
    return section.fine_if_nothing("every rank is here and reaches rank 0")


def judge_links(
    layout: Layout,
    machines: list[Machine],
    arrivals: dict[int, Arrival],
    links: list[Link],
    ephemeral: tuple[int, int],
) -> Section:
    """Do names resolve, can each node connect to each, and are the ports free that will be used?"""
    section = Section(title="names and ports")
    nodes = list(dict.fromkeys(m.node for m in machines))
    taken = arrivals[0].taken_ports if 0 in arrivals else []
    if taken:
        section.warning(
            f"port {listed(taken)} of {layout.master_addr}, which later steps of this job would "
            "use, is taken: give those steps a MASTER_PORT"
        )
    if layout.launcher == "slurm" and ephemeral[0] <= layout.master_port <= ephemeral[1]:
        section.warning(
            f"port {layout.master_port} may be taken by any outgoing connection ({ephemeral[0]} to "
            f"{ephemeral[1]}): set a MASTER_PORT below, or have net.ipv4.ip_local_port_range raised"
        )
    if len(nodes) < 2:
        section.unchecked("names and connections: there is one node only")
        return section
    _own_names(section, machines, arrivals)
    fine = [link for link in links if link.outcome == "reached"]
    trips = [link.round_trip_sec for link in fine if link.round_trip_sec is not None]
    section.lines.append(
        f"{len(fine)} of {len(nodes) * (len(nodes) - 1)} directions between nodes are open"
        + (f", {time_of(statistics.median(trips))} there and back" if trips else "")
    )
    _bad_links(section, links)
    for link in fine:
        if is_loopback(link.address):
            section.error(
                f"{link.source} resolves {link.target}'s name to {link.address}, which is "
                f"{link.source} itself: mend /etc/hosts on {link.source}"
            )
    silent = [node for node in nodes if node not in {link.source for link in links}]
    if silent:
        section.unchecked(f"connections from {listed(silent)}: no word of them came")
    return section.fine_if_nothing("every node reaches every other one by its name")


def _own_names(section: Section, machines: list[Machine], arrivals: dict[int, Arrival]) -> None:
    """Judge where gloo will listen: at the address that the machine's own name resolves to."""
    for machine in {m.node: m for m in machines if m.rank in arrivals}.values():
        own = arrivals[machine.rank].own_addresses
        if "GLOO_SOCKET_IFNAME" not in machine.env and all(map(is_loopback, own)):
            section.note(
                f"the own name of {{nodes}} leads to {own[0] if own else 'nothing'}: dist_train "
                "tells gloo of the interface to use; for other programs mend /etc/hosts there",
                node=machine.host,
            )


def _bad_links(section: Section, links: list[Link]) -> None:
    """Tell failures by the node that cannot be reached or that reaches nobody, else one by one."""
    groups: dict[tuple[str, str, str], list[Link]] = defaultdict(list)
    for link in links:
        if link.outcome != "reached":
            groups["to", link.target, link.outcome].append(link)
            groups["of", link.source, link.outcome].append(link)
    told: set[tuple[str, str]] = set()
    open_ones = {(link.source, link.target) for link in links if link.outcome == "reached"}
    for group in sorted(groups.values(), key=len, reverse=True):
        group = [link for link in group if (link.source, link.target) not in told]
        if not group:
            continue
        told |= {(link.source, link.target) for link in group}
        first = group[0]
        sources = listed(dict.fromkeys(link.source for link in group))
        targets = listed(dict.fromkeys(link.target for link in group))
        if first.outcome == "no such host":
            by_address = ", though its address can be reached" * (first.by_address == "reached")
            section.error(f"{sources} cannot find {targets}{by_address}: {WHY[first.outcome]}")
            continue
        one_way = all((link.target, link.source) in open_ones for link in group)
        section.error(
            f"{sources} cannot connect to {targets}{_in_brackets(first.address, first.detail)}"
            f"{', though the other direction is open' * one_way}: {WHY[first.outcome]}; "
            f"{OPEN_PORTS}"
        )


def _in_brackets(*words: str) -> str:
    told = ", ".join(filter(None, words))
    return f" ({told})" if told else ""


def judge_clocks(nodes: list[str], links: list[Link]) -> Section:
    """Do the nodes agree on the time of day?"""
    section = Section(title="clocks")
    if len(nodes) < 2:
        section.unchecked("clocks: there is one node only")
        return section
    clocks = clocks_of(nodes, links)
    unknown = [node for node in nodes if node not in clocks]
    if unknown:
        section.unchecked(f"the clock of {listed(unknown)}: it could not be asked, or too slowly")
    if len(clocks) < 2:
        return section
    middle, whose = statistics.median(clocks.values()), "the median of the nodes"
    if len(clocks) == 2:  # nobody can say which of two is right
        behind = min(clocks, key=lambda node: clocks[node])
        middle, whose = clocks[behind], f"{behind}'s"
    widest = max(clocks.values()) - min(clocks.values())
    section.lines.append(f"{time_of(widest)} apart at most")
    for node, clock in clocks.items():
        if abs(clock - middle) > SKEW_SEC:
            say = section.error if abs(clock - middle) > BAD_SKEW_SEC else section.warning
            say(
                f"{node}'s clock is {abs(clock - middle):.0f} s "
                f"{'ahead of' if clock > middle else 'behind'} {whose}: have chrony or ntpd "
                "started there (times in logs mislead, and munge refuses nodes five minutes apart)"
            )
    return section.fine_if_nothing("the nodes agree")


def clocks_of(nodes: list[str], links: list[Link]) -> dict[str, float]:
    """Return each node's clock against that of the first one, in seconds."""
    ahead: dict[str, dict[str, float]] = defaultdict(dict)
    for link in links:
        trip, sec = link.round_trip_sec, link.clock_ahead_sec
        if trip is not None and sec is not None and trip / 2 < UNCERTAIN_SEC:
            ahead[link.source].setdefault(link.target, sec)
            ahead[link.target].setdefault(link.source, -sec)
    start = next((node for node in nodes if node in ahead), None)
    clocks = {start: 0.0} if start is not None else {}
    todo = list(clocks)
    while todo:  # a node that the first could not ask was asked by another one
        here = todo.pop()
        new = {node: clocks[here] + sec for node, sec in ahead[here].items() if node not in clocks}
        clocks |= new
        todo += new
    return clocks
