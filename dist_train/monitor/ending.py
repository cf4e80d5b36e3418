"""End a group in which a rank hangs: stacks first, then the record, then the culprit, the rest."""

import contextlib
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import BinaryIO

from dist_train.heartbeat import PHASES, Identity
from dist_train.monitor.processes import GONE, descendants, kill, state_of
from dist_train.monitor.report import (
    Place,
    append_event,
    collect_stacks,
    crash_stacks,
    read_stacks,
    record_failure,
    say,
    write_report,
    write_text,
)
from dist_train.monitor.verdict import Verdict, View

WRITE_SEC = 1.0  # for the report and the record: a hung disk must not delay the restart
LEAVE_SEC = 3.0  # for the other ranks to go by themselves once the culprit is gone
CHILDREN_SEC = 5.0  # for what the ranks had started: a tracker may have something to send


def report(
    verdict: Verdict,
    views: Sequence[View],
    ranks: Sequence[Identity],
    files: Mapping[int, BinaryIO | None],
    place: Place,
    *,
    ends: bool,
) -> None:
    """Write stacks of all ranks here, the status and an event; takes about 1.6 s at most."""
    stacks = collect_stacks(ranks, files)
    text = write_text(verdict, views, ranks, stacks)
    mine = {one.rank for one in ranks}
    first = verdict.rank in mine  # one node tells, the others only keep their stacks
    written: list[str] = []

    def write() -> None:
        if ends:
            record_failure(place, verdict)
        path = write_report(place, text)
        if path is not None:
            written.append(path)
        if first:
            details = {"reason": verdict.text, "report": path, "ranks": list(verdict.culprits)}
            append_event(place, "hang", step=verdict.step, rank=verdict.rank, **details)

    within(WRITE_SEC, write)
    if first or not written:
        where = f"stacks of all ranks: {written[0]}" if written else f"\n{text}"
        say(f"{verdict.text}; {where}")


def report_death(view: View, file: BinaryIO | None, place: Place) -> None:
    """Record a rank that ended without a word; with its stacks if it crashed in C."""
    text = f"rank {view.rank} on {view.host} died in {PHASES[view.phase]} at step {view.step}"
    stacks = read_stacks(file) or crash_stacks(place, view.rank)

    def write() -> None:
        path = write_report(place, f"{text}\n\n{stacks}\n", "crash") if stacks else None
        details = {"phase": PHASES[view.phase], "report": path}
        append_event(place, "died", step=view.step, rank=view.rank, **details)

    within(WRITE_SEC, write)
    if stacks:
        say(f"{text}:\n{stacks}")


def end_ranks(ranks: Sequence[Identity], culprits: Sequence[int]) -> None:
    """Kill the culprits; then the other ranks of this node and what they had started, if needed."""
    children = [child for one in ranks for child in descendants(one.pid)]
    own = {(one.pid, one.started) for one in ranks}
    for one in ranks:
        if one.rank in culprits:
            kill(one.pid, one.started)
    _wait_until_gone(own, LEAVE_SEC if culprits else 0.0)
    for one in ranks:
        kill(one.pid, one.started)
    rest = set(children) - own
    _wait_until_gone(rest, CHILDREN_SEC)
    for pid, started in rest:
        kill(pid, started)


def await_end(ranks: Sequence[Identity], seconds: float) -> None:
    """Wait for the ranks of this node to go by themselves."""
    _wait_until_gone({(one.pid, one.started) for one in ranks}, seconds)


def within(seconds: float, work: Callable[[], None]) -> None:
    """Do `work` in a thread, and go on without it when it takes longer or the disk fails."""

    def guarded() -> None:
        with contextlib.suppress(OSError):  # the disk may be the reason for all this
            work()

    thread = threading.Thread(target=guarded, daemon=True)
    thread.start()
    thread.join(seconds)


def _wait_until_gone(processes: set[tuple[int, int]], seconds: float) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end and any(state_of(*one) != GONE for one in processes):
        time.sleep(0.05)
