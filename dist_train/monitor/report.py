"""What is left behind of a hang: a report with stacks, status.json, an event, a line on stderr."""

import contextlib
import json
import os
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from dist_train.config.redact import redact
from dist_train.config.streams import put
from dist_train.config.whole_file import read_json, write_atomically
from dist_train.heartbeat import Identity
from dist_train.monitor.processes import (
    STOPPED,
    TRACED,
    descendants,
    describe,
    kernel_stack,
    send,
    state_of,
)
from dist_train.monitor.verdict import LEFT, Verdict, View, told

# faulthandler's handler for it is C: it also runs while another thread holds Python's lock.
STACKS_SIGNAL = signal.SIGRTMIN + 11
STACKS_SEC = 0.6  # for the ranks to write them
SETTLED_SEC = 0.1  # nothing new for so long: they are complete
MOST_BYTES = 1 << 20  # of one rank's stacks


class Place(NamedTuple):
    """Where this monitor writes, and under which names."""

    folder: str  # the run's; may not exist on this machine
    host: str
    attempt: int
    chain: str
    node: int
    nodes: int


def open_stacks(one: Identity) -> BinaryIO | None:
    """Open what a rank writes its stacks to; it can be read after the rank's death, too."""
    try:
        return open(f"/proc/{one.pid}/fd/{one.stacks}", "rb", buffering=0)
    except OSError:
        return None


def collect_stacks(
    ranks: Sequence[Identity], files: Mapping[int, BinaryIO | None]
) -> dict[int, str]:
    """Ask all ranks for their Python stacks at once; returns what each gives, or why it does not.

    Takes STACKS_SEC at most.
    """
    asked: dict[int, Identity] = {}
    found: dict[int, str] = {}
    for one in ranks:
        state = state_of(one.pid, one.started)
        if state in (STOPPED, TRACED):
            found[one.rank] = "no Python stack: the process does not run"
        else:
            asked[one.rank] = one
            send(one.pid, one.started, STACKS_SIGNAL)
    end = time.monotonic() + STACKS_SEC
    settled, sizes = time.monotonic(), {}
    while asked and time.monotonic() < end:
        time.sleep(0.02)
        now = {rank: len(read_stacks(files[rank])) for rank in asked}
        if now != sizes:
            settled, sizes = time.monotonic(), now
        elif all(now.values()) and time.monotonic() - settled > SETTLED_SEC:
            break
    for rank in asked:
        found[rank] = (
            read_stacks(files[rank]) or "no Python stack: the signal was not handled in time"
        )
    return found


def read_stacks(file: BinaryIO | None) -> str:
    """Return all that a rank has written of its stacks; empty if nothing."""
    if file is None:
        return ""
    return os.pread(file.fileno(), MOST_BYTES, 0).decode(errors="replace").strip()


def crash_stacks(place: Place, rank: int) -> str:
    """Return the stacks that a crash in C left in the run's log folder; empty if none."""
    path = Path(place.folder) / "log" / f"failure-{place.attempt}-rank{rank}.crash"
    try:
        return path.read_text(errors="replace")[:MOST_BYTES].strip()
    except OSError:
        return ""


def write_text(
    verdict: Verdict, views: Sequence[View], ranks: Sequence[Identity], stacks: dict[int, str]
) -> str:
    """Return the report: the verdict, all ranks, and of those on this node everything known."""
    lines = [time.strftime("%Y-%m-%d %H:%M:%S"), verdict.text, "", "All ranks:"]
    for view in sorted(views):
        mark = "->" if view.rank in verdict.culprits else "  "
        gone = "has left" if view.state == LEFT else told(view)
        lines.append(f"{mark} rank {view.rank} on {view.host}: {gone} (limit {view.limit:.1f} s)")
    for one in ranks:
        lines += ["", f"== rank {one.rank} ==", describe(one.pid)]
        lines += [f"  started {describe(pid)}" for pid, _ in descendants(one.pid)]
        kernel = kernel_stack(one.pid)
        if kernel:
            lines += ["Kernel stack of the main thread:", kernel]
        lines += ["Python stacks of all threads (most recent call first):", stacks[one.rank]]
    return "\n".join(lines) + "\n"


def write_report(place: Place, text: str, kind: str = "hang") -> str | None:
    """Write the report into the run's log folder; returns its path, None if there is no folder."""
    log = Path(place.folder) / "log"
    if not log.is_dir():
        return None
    stamp = time.strftime("%Y%m%d-%H%M%S")
    node = f"-node{place.node}" if place.nodes > 1 else ""
    path = log / f"{kind}-{place.attempt}-{stamp}{node}.txt"
    path.write_text(redact(text), encoding="utf-8")
    return str(path)


def record_failure(place: Place, verdict: Verdict) -> None:
    """Make status.json say why the run failed, as the run's folder itself would.

    The first failure of an attempt is believed.
    """
    path = Path(place.folder) / "status.json"
    now = read_json(path)
    mine = (now.get("chain"), now.get("attempt")) == (place.chain, place.attempt)
    if not path.parent.is_dir() or (mine and now.get("state") in ("failed", "finished")):
        return
    record = {
        "state": "failed",
        "step": verdict.step,
        "reason": redact(verdict.text),
        "rank": verdict.rank,
        "exit_code": None,  # worth a restart
        "attempt": place.attempt,
        "chain": place.chain,
        "time": time.time(),
        "attempt_sec": round(_lasted(now), 3) if mine else 0.0,
    }
    write_atomically(path, json.dumps(record, indent=1))


def _lasted(running: dict[str, Any]) -> float:
    """Return how long an attempt has lasted, from what it wrote of itself while it ran."""
    return running.get("attempt_sec", 0.0) + max(0.0, time.time() - running.get("time", 0.0))


def append_event(place: Place, kind: str, *, step: int, rank: int, **details: Any) -> None:
    """Append one line to events.jsonl with one write; nothing where the folder is not here."""
    if not Path(place.folder).is_dir():
        return
    record = {
        "event": kind,
        "step": step,
        "rank": rank,
        "attempt": place.attempt,
        "time": time.time(),
        **redact(details),
    }
    path = Path(place.folder) / "events.jsonl"
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        os.write(file, json.dumps(record).encode() + b"\n")
    finally:
        os.close(file)


def say(text: str) -> None:
    """Write one line to standard error, which may be closed by now."""
    with contextlib.suppress(OSError, ValueError):
        put(sys.stderr, f"dist_train: {text}\n")
