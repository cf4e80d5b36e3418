"""Real launchers started and killed from outside: torchrun and `dist-train run`."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks.reliability.in_ranks import last_step, wait_until
from benchmarks.reliability.row import BrokenPromiseError, Trial
from tests.settings import SMALL

REPOSITORY = Path(__file__).parents[2]
RUN_VARIABLE = "RELIABILITY_RUN"  # inherited by all that a launcher starts


class Tree:
    """A launcher and all it started, recognised by the run folder on their command lines."""

    def __init__(self, process: subprocess.Popen[bytes], run_dir: Path, output: Path) -> None:
        self.process = process
        self.run_dir = run_dir
        self._output = output

    @property
    def output(self) -> str:
        """Return what all its processes have written so far."""
        return self._output.read_text(errors="replace")

    def pids(self) -> list[int]:
        """Return every living process of the tree, workers of loaders included."""
        return processes_of(self.run_dir)

    def ranks(self) -> dict[int, int]:
        """Return {rank: process id} of the ranks that live."""
        found = {}
        for pid in self.pids():
            rank = _variable(pid, "RANK")
            if rank is not None and _variable(_parent(pid), "RANK") is None:
                found[int(rank)] = pid
        return found

    def wait_for_ranks(self, count: int, *, but: frozenset[int] = frozenset()) -> dict[int, int]:
        """Wait until `count` ranks live, none of them one of `but`, and return them."""

        def there() -> bool:
            self._check_alive()
            now = self.ranks()
            return len(now) == count and not but & set(now.values())

        wait_until(there, f"{count} ranks did not come", 90.0)
        return self.ranks()

    def wait_for_step(self, step: int, *, timeout_sec: float = 90.0) -> None:
        """Wait until metrics.jsonl holds `step`."""

        def there() -> bool:
            self._check_alive()
            return last_step(self.run_dir) >= step

        wait_until(there, f"step {step} was not reached", timeout_sec)

    def wait(self, timeout_sec: float = 120.0) -> int:
        """Wait for the launcher's end; raises BrokenPromiseError if it does not come."""
        try:
            return self.process.wait(timeout_sec)
        except subprocess.TimeoutExpired:
            raise BrokenPromiseError(f"no end within {timeout_sec:.0f} s: {self.tail()}") from None

    def orphans(self, grace_sec: float = 5.0) -> list[str]:
        """Return the command lines of processes that live `grace_sec` from now on.

        Also of servers of workers and the like, whose command lines do not name the run.
        """
        end = time.monotonic() + grace_sec
        while left_of(self.run_dir) and time.monotonic() < end:
            time.sleep(0.05)
        return [_read(pid, "cmdline").replace("\0", " ")[:200] for pid in left_of(self.run_dir)]

    def tail(self) -> str:
        """Return the end of the output, for a reason."""
        return " / ".join(self.output.splitlines()[-4:])[-600:]

    def _check_alive(self) -> None:
        if self.process.poll() is not None:
            raise BrokenPromiseError(f"ended early with {self.process.returncode}: {self.tail()}")


@contextmanager
def launched(
    trial: Trial,
    words: tuple[str, ...],
    *,
    nproc: int,
    max_restarts: int = 0,
    launcher: str = "torchrun",
    entry: str | None = None,
    env: dict[str, str] | None = None,
) -> Iterator[Tree]:
    """Start a run in trial.folder/run under a real launcher; whatever is left of it is killed."""
    run_dir = trial.folder / "run"
    if launcher == "torchrun":
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += [f"--nproc-per-node={nproc}", f"--max-restarts={max_restarts}"]
        command += [entry] if entry else ["-m", "dist_train"]
    else:
        command = [sys.executable, "-m", "launch.cli", "run", f"--nproc={nproc}"]
        command += [f"--max-restarts={max_restarts}"]
    command += [*SMALL, *words, f"run_dir={run_dir}"]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), RUN_VARIABLE: str(run_dir)}
    environment |= env or {}
    environment.pop("OMP_NUM_THREADS", None)
    number = len(list(trial.folder.glob("launch.*")))
    output = trial.folder / f"launch.{number}"
    with output.open("wb") as file:
        process = subprocess.Popen(
            command, cwd=REPOSITORY, env=environment, stdout=file, stderr=file, process_group=0
        )
    try:
        yield Tree(process, run_dir, output)
    finally:
        kill_all(run_dir)
        process.kill()
        process.wait()


def processes_of(run_dir: Path) -> list[int]:
    """Return the living processes whose command line names `run_dir`, but for this one."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            line = _read(int(entry.name), "cmdline")
            if f"run_dir={run_dir}" in line and _state(int(entry.name)) != "Z":
                found.append(int(entry.name))
    return sorted(found)


def left_of(run_dir: Path) -> list[int]:
    """Return the living processes that descend from what `launched` started for `run_dir`."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and _variable(int(entry.name), RUN_VARIABLE) == str(run_dir):
            found += [int(entry.name)] if _state(int(entry.name)) != "Z" else []
    return sorted(found)


def kill_all(run_dir: Path) -> None:
    """Send SIGKILL to every process of a run until none is left."""
    while found := {*processes_of(run_dir), *left_of(run_dir)}:
        for pid in found:
            send(pid, signal.SIGKILL)
        time.sleep(0.02)


def send(pid: int, number: int) -> bool:
    """Send a signal; False if the process is gone."""
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return False
    return True


def time_of_attempt(run_dir: Path, attempt: int) -> float | None:
    """Return when the first line of metrics of an attempt from `attempt` on was written."""
    for line in (run_dir / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        if record["attempt"] >= attempt:
            return record["time"]
    return None


def _read(pid: int, name: str) -> str:
    try:
        return (Path("/proc") / str(pid) / name).read_bytes().decode(errors="replace")
    except OSError:
        return ""


def _state(pid: int) -> str:
    fields = _read(pid, "stat").rpartition(")")[2].split()
    return fields[0] if fields else "Z"


def _parent(pid: int) -> int:
    fields = _read(pid, "stat").rpartition(")")[2].split()
    return int(fields[1]) if fields else 0


def _variable(pid: int, name: str) -> str | None:
    for line in _read(pid, "environ").split("\0"):
        if line.startswith(f"{name}="):
            return line[len(name) + 1 :]
    return None
