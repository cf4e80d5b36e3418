"""The examination: what each rank does, in order, and what rank 0 gathers of it."""

import contextlib
import os
import re
import shutil
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dist_train.doctor.arrival import arrive
from dist_train.doctor.board import Board
from dist_train.doctor.deadline import DeadlineError, within
from dist_train.doctor.diagnosis import Facts
from dist_train.doctor.gpus import choice_of
from dist_train.doctor.machine import Machine, look
from dist_train.doctor.meeting import (
    RESOLVE_SEC,
    Arrival,
    Link,
    Peer,
    listening,
    look_at_peers,
    port_range,
)
from dist_train.doctor.slurm_settings import ask_scontrol
from dist_train.doctor.speeds import Pair, Reduction, Speed, Traffic
from dist_train.doctor.stages import MARGIN_SEC, PATIENCE_SEC, LeftAloneError, Stages
from dist_train.doctor.storage import Disk, Disturber, View, miss, view
from dist_train.interface import VARIABLE, interface_for_gloo
from dist_train.layout import Layout

NETWORK_SEC, STORAGE_SEC, SPEED_SEC, TRAFFIC_SEC = 90.0, 60.0, 30.0, 150.0
GOODBYE_SEC = 5.0


class Examination:
    """One rank's part in it; `run` is called by all ranks."""

    def __init__(self, layout: Layout, run_dir: Path, *, wait_sec: float, quick: bool) -> None:
        self._layout = layout
        self._run_dir = run_dir
        self._wait_sec = wait_sec
        self._quick = quick
        self._began = time.monotonic()
        self._me = look(layout, os.environ)
        self._folder = _folder_for_notes(layout, run_dir)
        self._board = Board(self._folder, layout.rank)
        self._stages = Stages(self._board, layout.rank)
        self._disturber = Disturber(self._folder)

    def run(self) -> Facts | None:
        """Go through all stages; returns what was found, on rank 0 alone.

        Raises:
            LeftAloneError: rank 0 cannot be heard.
        """
        try:
            self._board.post("started", asdict(self._me))
            with listening(self._me.node) as port:
                mine = arrive(self._layout, self._board, port, self._wait_sec)
                self._board.post("started", asdict(self._me))  # now through the store, too
                self._board.post("arrived", asdict(mine))
                return self._lead(mine) if self._layout.rank == 0 else self._follow(mine)
        finally:
            self._disturber.release()
            with contextlib.suppress(DeadlineError):
                within(MARGIN_SEC, self._clear)

    def _lead(self, mine: Arrival) -> Facts:
        layout, board = self._layout, self._board
        everybody = range(layout.world_size)
        # A rank may wait for rank 0, and then for a resolver that does not answer.
        late = self._wait_sec + min(self._wait_sec, 2 * RESOLVE_SEC)
        came = board.collect("arrived", everybody, late)
        arrivals = {rank: Arrival(**fields) for rank, fields in came.items()}
        began = board.collect("started", everybody, 0)
        machines = {rank: Machine(**fields) for rank, fields in began.items()}
        self._stages.crew = sorted(machines.keys() & arrivals.keys())
        peers = _peers(machines, arrivals)
        board.post("peers", [asdict(peer) for peer in peers])

        links = self._connections(peers)
        disk, views = self._storage(peers)
        device = "cuda" if all(a.gpus for a in arrivals.values()) else "cpu"
        speeds = self._speed(mine, device)
        why_not = _why_no_group(layout, self._stages, peers, arrivals, links)
        note = None if why_not else {"device": device, "nodes": {p.node: p.rank for p in peers}}
        traffic = self._traffic(mine, note)
        facts = Facts(
            layout=layout,
            run_dir=str(self._run_dir),
            wait_sec=self._wait_sec,
            machines=[machines[rank] for rank in sorted(machines)],
            arrivals=arrivals,
            links=links,
            ephemeral_ports=port_range(),
            disk=disk,
            folder_error=board.folder_error,
            views=views,
            speeds=speeds,
            traffic=traffic,
            why_no_traffic=why_not,
            settings=ask_scontrol(os.environ),
            lost=self._stages.lost,
            sec=time.monotonic() - self._began,
        )
        board.post("end", None)
        others = [rank for rank in self._stages.crew if rank != 0]
        board.collect("bye", others, GOODBYE_SEC)  # the store ends with this process
        return facts

    def _follow(self, mine: Arrival) -> None:
        late = 2 * (self._wait_sec + RESOLVE_SEC) + MARGIN_SEC
        told = self._board.collect("peers", [0], late)
        if 0 not in told:
            raise LeftAloneError(self._why_alone(mine))
        peers = [Peer(**fields) for fields in told[0]]
        self._connections(peers)
        self._storage(peers)
        self._speed(mine, "")
        self._traffic(mine, None)
        self._board.collect("end", [0], PATIENCE_SEC)
        self._board.post("bye", None)

    def _why_alone(self, mine: Arrival) -> str:
        layout = self._layout
        return (
            f"rank {layout.rank} on {self._me.node} runs, but hears nothing of rank 0: its port "
            f"{layout.master_addr}:{layout.master_port} is {mine.store} "
            f"{mine.store_detail} and {self._folder.parent} is not a folder that both see, or "
            "rank 0 did not start"
        )

    def _is_first_of_node(self, peers: list[Peer]) -> bool:
        return self._layout.rank in [peer.rank for peer in peers]

    def _connections(self, peers: list[Peer]) -> list[Link]:
        def work(_: Any) -> list[dict[str, Any]]:
            others = [peer for peer in peers if peer.node != self._me.node]
            looks = look_at_peers(self._me.node, others) if self._is_first_of_node(peers) else []
            return [asdict(link) for link in looks]

        found = self._stages.run("connecting to the other nodes", work, seconds=NETWORK_SEC)
        return [Link(**fields) for links in found.values() for fields in links]

    def _storage(self, peers: list[Peer]) -> tuple[Disk | None, list[View]]:
        rank, quick = self._layout.rank, self._quick

        def prepare(_: Any) -> dict[str, Any] | None:
            if rank == 0:
                return asdict(self._disturber.prepare(self._run_dir, quick=quick))
            if self._is_first_of_node(peers):
                miss(self._folder)
            return None

        def look_at_it(note: dict[str, bool]) -> dict[str, Any] | None:
            if not self._is_first_of_node(peers) or not note["is_ready"]:
                return None
            if rank == 0:
                self._disturber.replace_for_a_while()
            holds = note["holds_lock"]
            return asdict(view(self._folder, rank, self._me.node, holds_lock=holds))

        made = self._stages.run("writing to the run folder", prepare, seconds=STORAGE_SEC)
        disk = Disk(**made[0]) if rank == 0 and made.get(0) else None
        is_ready = disk is not None and not disk.error and self._disturber.show_new_file()
        note = {"is_ready": is_ready, "holds_lock": bool(is_ready and disk and not disk.lock_error)}
        seen = self._stages.run("the run folder", look_at_it, seconds=STORAGE_SEC, note=note)
        self._disturber.release()
        return disk, [View(**fields) for fields in seen.values() if fields]

    def _speed(self, mine: Arrival, device: str) -> dict[int, Speed]:
        def work(kind: str) -> dict[str, Any] | None:
            if mine.torch_error:
                return None
            from dist_train.doctor import compute

            device = compute.device_of(kind, self._gpu(mine))
            return asdict(compute.measure_speed(mine.rank, device, quick=self._quick))

        found = self._stages.run("the computation", work, seconds=SPEED_SEC, note=device)
        return {rank: Speed(**fields) for rank, fields in found.items() if fields}

    def _traffic(self, mine: Arrival, note: dict[str, Any] | None) -> dict[int, Traffic]:
        def work(note: dict[str, Any] | None) -> dict[str, Any] | None:
            if note is None:
                return None
            from dist_train.doctor import collectives, compute

            store, nodes = self._board.store, note["nodes"]
            assert store is not None, "every rank has said that it reaches it"
            if len(nodes) > 1:
                name = interface_for_gloo(os.environ, self._layout.master_addr)
                os.environ |= {VARIABLE: name} if name is not None else {}
            found = collectives.measure_traffic(
                store,
                mine.rank,
                self._layout.world_size,
                device=compute.device_of(note["device"], self._gpu(mine)),
                nodes=nodes,
                address=mine.address,
                quick=self._quick,
            )
            return asdict(found)

        found = self._stages.run("the all-reduce", work, seconds=TRAFFIC_SEC, note=note)
        traffic = {}
        for rank, fields in found.items():
            if fields is not None:
                fields["reductions"] = [Reduction(**r) for r in fields["reductions"]]
                fields["pairs"] = [Pair(**p) for p in fields["pairs"]]
                traffic[rank] = Traffic(**fields)
        return traffic

    def _gpu(self, mine: Arrival) -> int:
        choice = choice_of(self._me, mine, by_slurm=self._layout.launcher == "slurm")
        return choice.index if choice is not None else 0

    def _clear(self) -> None:
        """Remove the notes: rank 0 all, another rank its own in a folder that is not rank 0's."""
        if self._layout.rank == 0:
            shutil.rmtree(self._folder, ignore_errors=True)
            return
        for path in self._folder.glob(f"*.{self._layout.rank}.json"):
            path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            self._folder.rmdir()  # fails while there are notes of others


def _folder_for_notes(layout: Layout, run_dir: Path) -> Path:
    """Return a folder of this launch's own on the run folder's file system."""
    base = run_dir.absolute()
    while not base.is_dir() and base != base.parent:
        base = base.parent
    launch = f"{layout.run_id or layout.chain}-{layout.master_port}-{layout.attempt}"
    if layout.launcher == "torchrun":  # its chain holds a process's number, other on each node
        launch = f"{layout.run_id}-{layout.master_port}-{layout.attempt}"
    if layout.launcher == "single":
        launch = str(os.getpid())
    return base / f".doctor-{re.sub(r'[^A-Za-z0-9]+', '-', launch)}"


def _peers(machines: dict[int, Machine], arrivals: dict[int, Arrival]) -> list[Peer]:
    """Return the first rank of each node."""
    firsts: dict[str, Peer] = {}
    for rank in sorted(machines.keys() & arrivals.keys()):
        node, arrival = machines[rank].node, arrivals[rank]
        peer = Peer(rank=rank, node=node, port=arrival.port, address=arrival.address)
        firsts.setdefault(node, peer)
    return list(firsts.values())


def _why_no_group(
    layout: Layout,
    stages: Stages,
    peers: list[Peer],
    arrivals: dict[int, Arrival],
    links: list[Link],
) -> str:
    """Say why no process group is made; "" if there is no reason."""
    if layout.world_size == 1:
        return "there is one rank only"
    if len(stages.crew) < layout.world_size:
        return "ranks are missing"
    if any(a.torch_error or a.store != "reached" for a in arrivals.values()):
        return "not every rank reaches rank 0"
    open_ones = [li for li in links if "reached" in (li.outcome, li.by_address)]
    if len(open_ones) < len(peers) * (len(peers) - 1):
        return "not every node reaches every other one"
    if stages.lost:
        return "a rank was lost before"
    return ""
