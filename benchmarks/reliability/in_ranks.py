"""Trainings on forked gloo ranks: with faults inside, in the background, and with their pids."""

import os
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from dist_train.config import Config
from tests.ranks import Outcome, start_ranks_of

POLL_SEC = 0.005


def train_in_rank(folder: Path, config: Config, faults: tuple[Any, ...]) -> dict[str, Any]:
    """Train as this rank, its output in folder/out.RANK, with the faults meant for it.

    A fault has `rank` and `arm(stack)`.
    """
    from dist_train import train as loop

    rank = _introduce(folder)

    with ExitStack() as stack:
        for fault in faults:
            if fault.rank in (rank, None):
                fault.arm(stack)
        return loop.train(config)


def call_in_rank(folder: Path, work: Callable[..., Any], *args: Any) -> Any:
    """Call `work(*args)` as this rank, its output in folder/out.RANK."""
    _introduce(folder)
    return work(*args)


def _introduce(folder: Path) -> int:
    """Send this rank's output to folder/out.RANK and its process id to folder/pid.RANK."""
    rank = int(os.environ.get("RANK", "0"))
    keep_output(folder / f"out.{rank}")
    (folder / f"pid.{rank}.new").write_text(str(os.getpid()))
    (folder / f"pid.{rank}.new").rename(folder / f"pid.{rank}")
    return rank


def keep_output(path: Path) -> None:
    """Let this process write to a file from now on, C++ included."""
    sys.stdout.flush()
    sys.stderr.flush()
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.close(file)


def trained(
    folder: Path, config: Config, *faults: Any, world_size: int, timeout_sec: float = 100.0
) -> list[Outcome]:
    """Train on forked ranks to whatever end and return each rank's."""
    for old in folder.glob("pid.*"):
        old.unlink()
    return start_ranks_of(
        train_in_rank, world_size, folder, config, faults, timeout_sec=timeout_sec
    )


def called(
    folder: Path,
    world_size: int,
    work: Callable[..., Any],
    *args: Any,
    timeout_sec: float = 100.0,
    env: dict[str, str] | None = None,
) -> list[Outcome]:
    """Call `work(*args)` on forked ranks, which it can be sent to, and return each rank's end."""
    for old in folder.glob("pid.*"):
        old.unlink()
    return start_ranks_of(
        call_in_rank, world_size, folder, work, *args, timeout_sec=timeout_sec, env=env
    )


@contextmanager
def training(
    folder: Path, config: Config, *faults: Any, world_size: int, timeout_sec: float = 100.0
) -> Iterator["Future[list[Outcome]]"]:
    """Do the same in the background; the `with` block is the time for faults from outside."""
    with ThreadPoolExecutor(1) as thread:
        future = thread.submit(
            trained, folder, config, *faults, world_size=world_size, timeout_sec=timeout_sec
        )
        yield future


def pids(folder: Path, world_size: int, *, timeout_sec: float = 60.0) -> list[int]:
    """Wait for the ranks that `training` starts and return their process ids."""
    files = [folder / f"pid.{rank}" for rank in range(max(1, world_size))]
    wait_until(lambda: all(f.exists() for f in files), "the ranks did not start", timeout_sec)
    return [int(f.read_text()) for f in files]


def wait_until(condition: Any, otherwise: str, timeout_sec: float = 60.0) -> None:
    """Wait for a condition; raises TimeoutError with `otherwise`."""
    end = time.monotonic() + timeout_sec
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError(f"{otherwise} within {timeout_sec:.0f} s")
        time.sleep(POLL_SEC)


def last_step(run_dir: Path) -> int:
    """Return the step of the last whole line of metrics.jsonl; 0 if there is none."""
    import json

    try:
        text = (run_dir / "metrics.jsonl").read_text()
    except OSError:
        return 0
    whole = text[: text.rfind("\n") + 1].splitlines()
    return json.loads(whole[-1])["step"] if whole else 0


def how_it_ended(outcomes: list[Outcome], folder: Path) -> str:
    """Describe the ends of the ranks for a failed trial's reason."""
    ends = []
    for rank, outcome in enumerate(outcomes):
        what = repr(outcome.error)[:300] if outcome.error else f"exit code {outcome.exit_code}"
        if outcome.error is None and outcome.trace:  # it hung, and this is where
            frames = [line.strip() for line in outcome.trace.splitlines() if "File" in line]
            mine = [frame for frame in frames if "/dist_train/" in frame][:1]
            what = f"hung in {'; '.join(frames[:1] + mine)}"
        ends.append(f"rank {rank}: {what}")
    return "; ".join(ends)
