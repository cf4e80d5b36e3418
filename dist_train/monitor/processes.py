"""What Linux knows of a process from outside: its state, where it sleeps, what it started."""

import contextlib
import os
import signal
from pathlib import Path
from typing import NamedTuple

CHILDREN_SEC = 30.0  # between two looks for what a rank has started
GONE = "gone"
STOPPED = "T"  # by a signal
TRACED = "t"  # held by a debugger
MEANING = {
    "R": "running",
    "S": "sleeping",
    "D": "in uninterruptible sleep (disk or driver)",
    STOPPED: "stopped by a signal",
    TRACED: "held by a debugger",
    GONE: "gone",
}


class Stat(NamedTuple):
    """A line of /proc/PID/stat, the part of it that is needed."""

    state: str
    parent: int
    started: int  # clock ticks since boot
    name: str


def read_stat(pid: int) -> Stat | None:
    """Return what /proc says of a process; None if there is none, or only its exit code."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            text = file.read()
    except (OSError, ValueError):
        return None
    fields = text[text.rindex(")") + 2 :].split()
    if fields[0] in "ZX":
        return None
    name = text[text.index("(") + 1 : text.rindex(")")]
    return Stat(fields[0], int(fields[1]), int(fields[19]), name)


def state_of(pid: int, started: int) -> str:
    """Return the state letter of a process, or GONE."""
    stat = read_stat(pid)
    return GONE if stat is None or stat.started != started else stat.state


def send(pid: int, started: int, number: int) -> None:
    """Signal a process, unless its number is another's by now."""
    if state_of(pid, started) != GONE:
        with contextlib.suppress(OSError):
            os.kill(pid, number)


def kill(pid: int, started: int) -> None:
    """End a process; a stopped one, too."""
    send(pid, started, signal.SIGKILL)


def bytes_moved(pid: int) -> int:
    """Return how many bytes a process has read and written so far; 0 where that is hidden."""
    try:
        with open(f"/proc/{pid}/io") as file:
            counts = dict(line.split(": ") for line in file.read().splitlines())
        return int(counts["rchar"]) + int(counts["wchar"])
    except (OSError, ValueError, KeyError):
        return 0


def core_delay_ns(pid: int) -> int:
    """Return how long a process's main thread was ready to run and had no core, so far."""
    try:
        with open(f"/proc/{pid}/schedstat") as file:
            return int(file.read().split()[1])
    except (OSError, ValueError, IndexError):
        return 0


Children = dict[int, list[tuple[int, int]]]
"""(pid, start) of each process, by its parent."""


def all_children() -> Children:
    """Return who has started whom, but for myself. Reads all of /proc."""
    children: Children = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit() and int(entry) != os.getpid():
            stat = read_stat(int(entry))
            if stat is not None:
                children.setdefault(stat.parent, []).append((int(entry), stat.started))
    return children


def descendants(pid: int, children: Children | None = None) -> list[tuple[int, int]]:
    """Return (pid, start) of all that a process started, and what these started; not of myself."""
    children = all_children() if children is None else children
    found: list[tuple[int, int]] = []
    open_ends = [pid]
    while open_ends:
        for child in children.get(open_ends.pop(), []):
            found.append(child)
            open_ends.append(child[0])
    return found


class CoreDelays:
    """How long ranks had to wait for a core, themselves or what loads their data."""

    def __init__(self) -> None:
        self._children: Children = {}  # as of the last look
        self._next_look = 0.0
        self._seen: dict[int, int] = {}  # nanoseconds, by process
        self._sums: dict[int, int] = {}  # by rank's process

    def of(self, pid: int, now_sec: float) -> int:
        """Return the nanoseconds so far: those of the rank, and of the child that had most.

        Args:
            pid: of the rank.
            now_sec: of a clock that only goes on.
        """
        if now_sec >= self._next_look:
            self._children, self._next_look = all_children(), now_sec + CHILDREN_SEC
        mine = self._since(pid)
        others = [self._since(child) for child, _ in descendants(pid, self._children)]
        self._sums[pid] = self._sums.get(pid, 0) + mine + max(others, default=0)
        return self._sums[pid]

    def _since(self, pid: int) -> int:
        """Return what was added since the last call; nothing at the first."""
        now = core_delay_ns(pid)
        before, self._seen[pid] = self._seen.get(pid, now), now
        return max(0, now - before)


def describe(pid: int) -> str:
    """Return one line on a process: state, where in the kernel it sleeps, its name."""
    stat = read_stat(pid)
    if stat is None:
        return f"process {pid}: gone"
    where = [
        f"{name} {text}"
        for name in ("wchan", "syscall")
        if (text := _line_of(f"/proc/{pid}/{name}")) not in ("", "0", "running")
    ]
    meaning = MEANING.get(stat.state, f"state {stat.state}")
    return ", ".join([f"process {pid} ({stat.name}): {meaning}", *where])


def kernel_stack(pid: int) -> str:
    """Return the kernel's stack of a process's main thread; empty where only root may see it."""
    try:
        return Path(f"/proc/{pid}/stack").read_text().strip()
    except OSError:
        return ""


def _line_of(path: str) -> str:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return ""
