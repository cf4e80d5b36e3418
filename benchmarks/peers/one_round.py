"""One round: every peer is started once, by itself, and then they take turns, a few steps each.

Half a second after one of them another has its turn, in a new order each time: what else the
machine does meets all alike. Whatever becomes of a peer, nothing of it is left.
"""

import contextlib
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.intervals import ROOT
from benchmarks.peers.job import CASES
from benchmarks.peers.records import Cell, Outcome
from benchmarks.peers.worker import GO, TURNS

LIMIT_SEC = 300.0  # for a start, a turn, or what comes after the last
POLL_SEC = 0.05
# An exception as Python prints it, after torchrun's prefix of a rank; not torchrun's own summary.
RAISED = re.compile(r"^(?:\[rank\d+\]:\s*)?((?!.*ChildFailedError)[\w.]+(?:Error|Exception)\b.*)")


def run_round(
    python: str, peers: Sequence[str], cell: Cell, *, seed: int, limit_sec: float = LIMIT_SEC
) -> dict[str, Outcome]:
    """Return each peer's means over its ranks, or why it failed, in the order they started in."""
    dice = random.Random(f"{seed} {cell}")
    order = dice.sample(peers, len(peers))
    with contextlib.ExitStack() as stack:
        runs = {}
        for peer in order:
            runs[peer] = stack.enter_context(_Run(python, peer, cell, limit_sec))
            runs[peer].wait_until_it_waits()
        for _ in range(CASES[cell.case].turns):
            for peer in dice.sample(order, len(order)):
                runs[peer].give_turn()
                runs[peer].wait_until_it_waits()
        return {peer: run.outcome() for peer, run in runs.items()}


class _Run:
    """One peer's processes, in a session of their own, until the context ends."""

    def __init__(self, python: str, peer: str, cell: Cell, limit_sec: float) -> None:
        self._python, self._peer, self._cell = python, peer, cell
        self._limit_sec = limit_sec
        self._failed: str | None = None
        self._folder = Path(tempfile.mkdtemp(prefix="peers-"))
        self._output = self._folder / "output.txt"
        self._door = socket.socket(socket.AF_UNIX)
        self._ranks: list[socket.socket] = []
        self._process: subprocess.Popen[bytes] | None = None  # None: it has ended

    def __enter__(self) -> "_Run":
        self._door.bind(str(self._folder / TURNS))
        self._door.listen()
        self._door.settimeout(POLL_SEC)
        cell = self._cell
        start = ["-m", "benchmarks.peers.worker"]
        if cell.ranks > 1:
            launcher = ["-m", "torch.distributed.run", "--standalone"]
            start = [*launcher, f"--nproc-per-node={cell.ranks}", *start]
        start += [self._peer, "--case", cell.case, "--precision", cell.precision]
        start += ["--style", cell.style, "--folder", str(self._folder)]
        with self._output.open("w") as file:
            self._process = subprocess.Popen(
                [self._python, *start, "--begun", str(time.time())],
                cwd=ROOT,
                env=os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"},
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        return self

    def __exit__(self, *_: object) -> None:
        self._end()
        for one in (self._door, *self._ranks):
            one.close()
        shutil.rmtree(self._folder, ignore_errors=True)  # our monitor may write its last report

    def wait_until_it_waits(self) -> None:
        """Return when all ranks wait for their turn, or the peer has failed and is no more."""
        if self._process is None:
            return
        end = time.monotonic() + self._limit_sec
        try:
            while len(self._ranks) < self._cell.ranks:
                self._admit(self._process, end)
            for rank in self._ranks:
                self._hear(rank, end)
        except TooLateError:
            self._fail(f"not done within {self._limit_sec:.0f} s")
        except ConnectionError:  # a rank has ended
            self._judge(self._process)
            self._fail(self._failed or "it did not take all its turns")

    def give_turn(self) -> None:
        """Let every rank go on."""
        if self._process is not None:
            with contextlib.suppress(ConnectionError):  # the next wait notices
                for rank in self._ranks:
                    rank.sendall(GO)

    def outcome(self) -> Outcome:
        """Return what the peer has measured, once it has done what is left after the last turn."""
        self.give_turn()
        results = self._judge(self._process) if self._process is not None else []
        if self._failed is not None:
            return Outcome(failed=self._failed)
        values = {
            key: sum(r[key] for r in results) / self._cell.ranks
            for key, value in results[0].items()
            if isinstance(value, float)
        }
        return Outcome(values=values, weights_sha256=results[0]["weights_sha256"])

    def _admit(self, process: "subprocess.Popen[bytes]", end: float) -> None:
        """Take in one rank, if one is at the door."""
        with contextlib.suppress(TimeoutError):
            rank, _ = self._door.accept()
            rank.settimeout(POLL_SEC)
            self._ranks.append(rank)
            return
        if process.poll() is not None:
            raise ConnectionError
        _check(end)

    def _hear(self, rank: socket.socket, end: float) -> None:
        """Return when the rank says that it waits."""
        while True:
            with contextlib.suppress(TimeoutError):
                if rank.recv(1) != GO:
                    raise ConnectionError
                return
            _check(end)

    def _judge(self, process: "subprocess.Popen[bytes]") -> list[dict[str, Any]]:
        """Wait for the peer's end; return its ranks' results, and note why they do not count."""
        try:
            code = process.wait(self._limit_sec)
        except subprocess.TimeoutExpired:
            self._fail(f"not done within {self._limit_sec:.0f} s")
            return []
        paths = sorted(self._folder.glob("rank*.json"))
        results = [json.loads(path.read_text()) for path in paths]
        if code != 0:
            output = self._output.read_text(errors="replace")
            self._fail(reason_in(output) or f"ended with {code}")
        elif len(results) != self._cell.ranks:
            self._fail(f"{len(results)} of {self._cell.ranks} ranks left a result")
        elif len({r["weights_sha256"] for r in results}) > 1:
            self._fail("the weights of its ranks differ")
        return results

    def _fail(self, why: str) -> None:
        """Note it, and end the peer: the others are to be measured without it."""
        if self._failed is None:
            self._failed = why
            told = self._output.read_text(errors="replace")[-3000:]
            print(f"{told}\n{self._peer}: {why}", file=sys.stderr, flush=True)
        self._end()

    def _end(self) -> None:
        """Kill all that still runs, once: torchrun gives each rank a session of its own, too."""
        process, self._process = self._process, None
        if process is None:
            return
        while groups := _groups_naming(self._folder):
            for group in groups:
                _kill_group(group)
            time.sleep(POLL_SEC)
        _kill_group(process.pid)  # what it started without naming the folder
        process.wait()


class TooLateError(Exception):
    """A peer has taken too long."""


def _check(end: float) -> None:
    if time.monotonic() > end:
        raise TooLateError


def reason_in(output: str) -> str | None:
    """Return the first exception that was printed: that of the rank which failed first."""
    found = next(filter(None, map(RAISED.match, output.splitlines())), None)
    return found[1][:200] if found else None


def _kill_group(group: int) -> None:
    with contextlib.suppress(ProcessLookupError):  # it ended meanwhile
        os.killpg(group, signal.SIGKILL)


def _groups_naming(folder: Path) -> set[int]:
    """Return the process groups with a process whose command line names the folder."""
    found = set()
    for line in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if str(folder).encode() in line.read_bytes().split(b"\0"):
                found.add(os.getpgid(int(line.parent.name)))
        except OSError:
            continue  # it ended meanwhile
    return found
