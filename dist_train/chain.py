"""What a chain of restarts remembers, in the run folder's chain.json: enough to know when to end.

A chain is one launcher's start. Its attempts end by an exception, by a death (a signal, a lost
machine: nobody wrote down why), by a stop, or by finishing. The same exception at the same step
three times, or ten attempts in a row that ended without a newer checkpoint, end it with exit code
93. Imports no torch: the launcher reads it too.
"""

import contextlib
import fcntl
import json
import re
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Literal

from dist_train.config.redact import redact
from dist_train.config.whole_file import read_json, write_atomically

REPEATS = 3  # of one exception at one step
ENDINGS_WITHOUT_PROGRESS = 10
EXIT_CODE = 93
LONGEST_WAIT_SEC = 30.0
TRACEBACK_LINES = 60


@dataclass(frozen=True, kw_only=True, slots=True)
class Cause:
    """The first cause of an attempt's end, as the rank that failed wrote it down."""

    attempt: int
    rank: int
    step: int
    kind: Literal["exception", "hang", "death"] = "exception"
    type: str = ""  # of the exception
    message: str = ""
    time: float = field(default_factory=time.time)

    def sentence(self) -> str:
        """Return who failed, where and why, in one line."""
        if self.kind == "death":
            return f"rank {self.rank} {self.message}, after step {self.step}"
        what = f"{self.type}: {self.message}" if self.type else self.message
        return f"rank {self.rank} failed at step {self.step}: {' '.join(what.split())}"

    def is_again(self, other: "Cause") -> bool:
        """Say whether it is the same exception at the same step, but for numbers in its text."""
        mine, theirs = (_without_numbers(c.message) for c in (self, other))
        return (self.kind, self.type, self.step, mine) == (
            other.kind,
            other.type,
            other.step,
            theirs,
        )


@dataclass(kw_only=True, slots=True)
class Memory:
    """The content of chain.json."""

    chain: str = ""
    attempt: int = 0  # the newest that has begun
    progress: int = 0  # the newest checkpoint's step when the counts began
    endings: int = 0  # attempts in a row that ended without progress; a stop is none
    failures: list[Cause] = field(default_factory=list)  # of steps not yet passed
    cause: Cause | None = None  # of the newest attempt's end
    witnesses: list[int] = field(default_factory=list)  # ranks that saw another one end
    seen_at: int = 0  # the step at which they did
    exit_code: int | None = None  # 93 when the chain has ended for good
    micro_batch_size: int | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Beginning:
    """What an attempt must know of those before it in its chain."""

    earlier: str | None = None  # how the one before it ended; None: it was stopped, or is none
    refusal: str | None = None  # why this chain has ended for good
    wait_sec: float = 0.0  # before anything is loaded: failures come in storms
    micro_batch_size: int | None = None


def begin(
    folder: Path,
    *,
    chain: str,
    attempt: int,
    world_size: int,
    step: int,
    stopped: bool,
    told: str | None = None,
) -> Beginning:
    """Count how the earlier attempts ended and record that a new one begins. Rank 0 only.

    Args:
        folder: the run's.
        chain: the launcher's start; another one, or attempt 0, counts from zero.
        attempt: restarts of this chain so far.
        world_size: of this attempt.
        step: of the newest checkpoint.
        stopped: the attempt before was stopped and has saved.
        told: what status.json says of the end of the attempt before: that it hung, for example.
    """
    with _locked(folder):
        memory = read(folder)
        has_begun = attempt > 0 and memory.chain == chain  # the attempt before this one, or so
        if not has_begun:
            memory = Memory(chain=chain, attempt=-1, progress=step)
        # An attempt can end before it gets here; a requeue starts torchrun's count anew.
        silent = max(0, attempt - memory.attempt - 1)
        earlier = None
        if (has_begun and not stopped) or silent:
            known = memory.cause.sentence() if memory.cause is not None else told
            earlier = known or _how_it_ended(folder, memory, world_size)
        if stopped or step > memory.progress:
            memory.endings = 0
        memory.endings += silent + (has_begun and not stopped)
        memory.failures = [f for f in memory.failures if f.step >= step]
        memory.progress = max(step, memory.progress)
        refusal = None
        if memory.endings >= ENDINGS_WITHOUT_PROGRESS:
            memory.exit_code = EXIT_CODE
            refusal = endless(memory.endings, step, earlier or "stopped")
        memory.attempt, memory.cause, memory.witnesses = attempt, None, []
        _write(folder, memory)
    return Beginning(
        earlier=earlier,
        refusal=refusal,
        wait_sec=0.0 if stopped else back_off(memory.endings),
        micro_batch_size=memory.micro_batch_size,
    )


def count_silent(folder: Path, *, chain: str, attempt: int, how: str) -> str | None:
    """Count an attempt that ended before it had begun, as what started it saw.

    Args:
        folder: the run's.
        chain: the launcher's start.
        attempt: that ended.
        how: it ended, in words.

    Returns:
        If it was one too many: the line that ends the chain (exit code 93).
    """
    folder.mkdir(parents=True, exist_ok=True)
    with _locked(folder):
        memory = read(folder)
        if memory.chain != chain:
            memory = Memory(chain=chain)
        memory.attempt, memory.cause, memory.witnesses = attempt, None, []
        memory.endings += 1
        many = memory.endings >= ENDINGS_WITHOUT_PROGRESS
        memory.exit_code = EXIT_CODE if many else None
        _write(folder, memory)
    return endless(memory.endings, memory.progress, how) if many else None


def endless(endings: int, step: int, last: str) -> str:
    """Return the line that ends a chain without progress."""
    return (
        f"{endings} attempts in a row ended without a checkpoint beyond step {step}; the last: "
        f"{last}. A restart would only repeat it: read the run's log folder, mend the cause (or "
        "save more often: checkpoint.every_steps), and give the command again"
    )


def back_off(endings: int) -> float:
    """Return the seconds to wait before the next attempt: 0, 1, 2, 4 ... 30."""
    return 0.0 if endings < 2 else min(LONGEST_WAIT_SEC, 2.0 ** (endings - 2))


def record(folder: Path, chain: str, cause: Cause, trace: str = "") -> str | None:
    """Record why this attempt ends, unless a rank was faster; any rank.

    Returns:
        If it is the third time: the line that ends the chain (exit code 93).
    """
    cause = replace(cause, message=redact(cause.message))
    if trace:
        path = failure_file(folder, cause.attempt, cause.rank)
        lines = redact(trace).splitlines()
        if len(lines) > TRACEBACK_LINES:
            half = TRACEBACK_LINES // 2
            lines = [*lines[:half], "  ...", *lines[-half:]]
        path.write_text("\n".join([cause.sentence(), "", *lines, ""]), encoding="utf-8")
    with _locked(folder):
        memory = read(folder)
        if memory.chain != chain:  # this attempt ended before it began
            memory = Memory(chain=chain, attempt=cause.attempt, progress=cause.step)
        if memory.cause is not None:
            return None
        memory.cause = cause
        memory.failures = [*memory.failures[-99:], cause]
        times = sum(cause.is_again(f) for f in memory.failures)
        again = cause.kind == "exception" and times >= REPEATS
        memory.exit_code = EXIT_CODE if again else None
        _write(folder, memory)
    if not again:
        return None
    return (
        f"{cause.sentence()} ({times} times, at the same step). A restart would only repeat it: "
        "mend the cause and give the command again; the traceback is in "
        f"{failure_file(folder, cause.attempt, cause.rank)}"
    )


def witness(folder: Path, chain: str, *, rank: int, step: int) -> None:
    """Record that `rank` lives and saw another one end; who did not is the one that died."""
    with _locked(folder):
        memory = read(folder)
        if memory.chain == chain and rank not in memory.witnesses:
            memory.witnesses, memory.seen_at = sorted([*memory.witnesses, rank]), step
            _write(folder, memory)


def remember_micro_batch(folder: Path, chain: str, size: int) -> None:
    """Let the next attempts of this chain begin with micro-batches of at most `size`; any rank."""
    with _locked(folder):
        memory = read(folder)
        if memory.chain == chain:
            known = memory.micro_batch_size
            memory.micro_batch_size = size if known is None else min(size, known)
            _write(folder, memory)


def cause_of(folder: Path, chain: str, attempt: int) -> Cause | None:
    """Return the recorded cause of an attempt's end, or None."""
    memory = read(folder)
    found = memory.cause
    mine = found is not None and (memory.chain, found.attempt) == (chain, attempt)
    return found if mine else None


def read(folder: Path) -> Memory:
    """Return what chain.json holds; an empty memory if there is none."""
    try:
        raw = read_json(folder / "chain.json")
        raw["failures"] = [Cause(**cause) for cause in raw["failures"]]
        raw["cause"] = None if raw["cause"] is None else Cause(**raw["cause"])
        return Memory(**raw)
    except (KeyError, TypeError):
        return Memory()


def failure_file(folder: Path, attempt: int, rank: int) -> Path:
    """Return where a rank that fails writes what happened."""
    return folder / "log" / f"failure-{attempt}-rank{rank}.txt"


def crash_file(folder: Path, attempt: int, rank: int) -> Path:
    """Return where faulthandler writes a rank's stacks when a signal such as SIGSEGV kills it."""
    return failure_file(folder, attempt, rank).with_suffix(".crash")


def _how_it_ended(folder: Path, memory: Memory, world_size: int) -> str:
    for path in sorted((folder / "log").glob(f"failure-{memory.attempt}-rank*.crash")):
        first = path.read_text(errors="replace").partition("\n")[0]
        if first:  # "Fatal Python error: Segmentation fault"
            rank = path.stem.rpartition("rank")[2]
            return f"rank {rank} died: {first.partition(': ')[2]} (its stack is in {path})"
    silent = sorted(set(range(world_size)) - set(memory.witnesses))
    if memory.witnesses and silent:
        ranks = ("rank " if len(silent) == 1 else "ranks ") + ", ".join(map(str, silent))
        return f"{ranks} died without a word after step {memory.seen_at} (killed?)"
    return "it died without a word (killed?)"


def _without_numbers(text: str) -> str:
    return re.sub(r"0x[0-9a-f]+|\d+", "#", text)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold the lock of chain.json; the kernel drops it with its process."""
    with (folder / ".chain.lock").open("ab") as file:
        fcntl.lockf(file, fcntl.LOCK_EX)
        yield


def _write(folder: Path, memory: Memory) -> None:
    write_atomically(folder / "chain.json", json.dumps(asdict(memory), indent=1))
