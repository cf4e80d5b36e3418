"""A run is a folder: its lock, settings, surroundings, status, events and summary.

Only rank 0 writes. The other ranks hold a folder that writes nothing.
"""

import contextlib
import errno
import fcntl
import json
import os
import platform
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import IO, Any, Literal

import torch

from dist_train import __version__
from dist_train.checkpoint_folder import list_checkpoints
from dist_train.config import Config, ConfigError
from dist_train.config.compose import compose, to_yaml
from dist_train.config.earlier import BEGUN_WITHOUT, keys_missing
from dist_train.config.redact import redact, redact_words
from dist_train.config.whole_file import read_json, write_atomically
from dist_train.distributed import Ranks
from dist_train.journal import LineFile
from dist_train.preemption import stop_reason

State = Literal["running", "finished", "preempted", "failed"]
PROBE_BYTES = 1 << 20
RESTART_LOCK_SEC, LOCK_EVERY_SEC = 120.0, 0.2  # NFS 4 gives a lost machine 90 s
HOLDER_EVERY_SEC, HOLDER_TRIES = 0.05, 20


class RunFolder:
    """The folder of one run, held under a lock by this process's rank 0."""

    def __init__(self, path: Path, ranks: Ranks) -> None:
        self.given = path  # as the user named it, to be shown
        path = path.absolute()  # the user's modules may change the working directory
        self.path = path
        self.checkpoints = path / "checkpoints"
        self._ranks = ranks
        self._writes = ranks.rank == 0
        self._lock: IO[bytes] | None = None
        self.log = LineFile(path / "log" / "rank0.txt")
        self._events = LineFile(path / "events.jsonl")
        self._started = time.monotonic()
        self._unwritten: OSError | None = None  # of status.json
        self._news: list[str] = []

    def claim(self) -> None:
        """Make the folder, prove that it can be written to, and lock it. Rank 0 only.

        The lock is a POSIX record lock: the kernel drops it when its process dies, and forked
        workers do not inherit it.

        Raises:
            ConfigError: not writable, no space, or another run holds the lock; says who.
        """
        try:
            (self.path / "log").mkdir(parents=True, exist_ok=True)
            self._lock = (self.path / "lock").open("ab+", buffering=0)
            self._take_lock()
            probe = self.path / ".probe"
            try:
                probe.write_bytes(b"\0" * PROBE_BYTES)
            finally:
                probe.unlink(missing_ok=True)
        except OSError as error:
            raise ConfigError(_cannot_write(self.path, error)) from None

    def _take_lock(self) -> None:
        assert self._lock is not None
        # A file server keeps the lock of a machine that died for a while: a restart waits for it.
        end = time.monotonic() + (RESTART_LOCK_SEC if self._ranks.attempt > 0 else 0.0)
        while not self._try_lock():
            if time.monotonic() < end and stop_reason() is None:
                time.sleep(LOCK_EVERY_SEC)
                continue
            raise ConfigError(
                f"run_dir {self.path} is in use by {self._holder()}: wait for it, stop it, or give "
                "this run another run_dir"
            )
        self._lock.seek(0)
        self._lock.truncate()
        holder = (
            f"process {os.getpid()} on {socket.gethostname()} "
            f"since {time.strftime('%Y-%m-%d %H:%M:%S')}"
        )
        self._lock.write(holder.encode())

    def _holder(self) -> str:
        """Return who holds the lock: a process that has just taken it is yet to write its name."""
        assert self._lock is not None
        for _ in range(HOLDER_TRIES):
            time.sleep(HOLDER_EVERY_SEC)  # first, too: the name may be that of the one before
            self._lock.seek(0)
            if holder := self._lock.read().decode().strip():
                return holder
        return "another process"

    def _try_lock(self) -> bool:
        assert self._lock is not None
        try:
            fcntl.lockf(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                raise
            return False
        return True

    def release(self) -> None:
        """Give the lock back, and close what is open."""
        self.log.close()
        self._events.close()
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def saved_config(self) -> Config | None:
        """Return the settings that the run was started with, or None for a new run."""
        path = self.path / "config.yaml"
        return compose([], config_file=path).config if path.is_file() else None

    def write_start(self, config: Config, code: dict[str, Any]) -> None:
        """Write config.yaml and environment.json: what runs, with what, where; `code` too."""
        if not self._writes:
            return
        environment = _environment(self._ranks) | {"code": code}
        if list_checkpoints(self.checkpoints) and (missing := keys_missing(self.path)):
            environment[BEGUN_WITHOUT] = list(missing)  # before config.yaml names them
        write_atomically(self.path / "environment.json", json.dumps(environment, indent=1))
        write_atomically(self.path / "config.yaml", to_yaml(config))

    def code(self) -> dict[str, Any]:
        """Return the digests of the code that the last attempt ran with; empty if not known."""
        code = read_json(self.path / "environment.json").get("code")
        return code if isinstance(code, dict) else {}

    def read_status(self) -> dict[str, Any]:
        """Return status.json, or an empty record."""
        return read_json(self.path / "status.json")

    def set_status(
        self, state: State, *, step: int, exit_code: int | None = None, reason: str | None = None
    ) -> None:
        """Replace status.json: what the run is doing, or how it ended.

        An error of the disk does not end a training: it is news, and the next call tries again.
        """
        if self._writes or state == "failed":
            record = {
                "state": state,
                "step": step,
                "reason": redact(reason),
                "rank": self._ranks.rank,
                "exit_code": exit_code,
                "attempt": self._ranks.attempt,
                "chain": self._ranks.chain,
                "time": time.time(),
                "attempt_sec": round(time.monotonic() - self._started, 3),
            }
            try:
                write_atomically(self.path / "status.json", json.dumps(record, indent=1))
                self._unwritten = None
            except OSError as error:
                if self._unwritten is None:
                    text = f"cannot write {self.path / 'status.json'}: {error.strerror or error}"
                    self._news.append(f"{text}; it shows an older state")
                self._unwritten = error

    def event(self, kind: str, *, step: int, **details: Any) -> None:
        """Append one line to events.jsonl, now or when the disk takes it."""
        if self._writes:
            record = {
                "event": kind,
                "step": step,
                "rank": self._ranks.rank,
                "attempt": self._ranks.attempt,
                "time": time.time(),
                **redact(details),
            }
            self._events.append_record(record)

    def take_news(self) -> list[str]:
        """Try again what the disk refused; return what there is to tell since the last call."""
        news, self._news = self._news, []
        return news + self.log.take_news() + self._events.take_news()

    def note_earlier_attempt(self) -> tuple[int, float]:
        """Record how the attempt before this one died, if it did. Call it once, at the start.

        Returns:
            (attempts of this run that died, how long they lasted together, in seconds).
        """
        if not self._writes:
            return 0, 0.0
        before = self.read_status()
        if before.get("state") in ("running", "failed") and before.get("exit_code") != 2:
            lasted = before.get("attempt_sec", 0.0)
            self.event("earlier_attempt_died", step=before.get("step", 0), lasted_sec=lasted)
        died = [e for e in self.read_events() if e.get("event") == "earlier_attempt_died"]
        return len(died), sum(e.get("lasted_sec", 0.0) for e in died)

    def read_events(self) -> list[dict[str, Any]]:
        """Return the events so far; torn lines are left out."""
        events = []
        with contextlib.suppress(OSError):
            for line in (self.path / "events.jsonl").read_bytes().splitlines():
                with contextlib.suppress(ValueError):
                    events.append(json.loads(line))
        return events

    def write_summary(self, summary: dict[str, Any]) -> None:
        """Write summary.json."""
        if self._writes:
            write_atomically(self.path / "summary.json", json.dumps(redact(summary), indent=1))

    def check_space(self, checkpoint_bytes: int, keep: int) -> None:
        """Refuse to start when the checkpoints to come do not fit on the disk.

        Raises:
            ConfigError: with the sizes.
        """
        needed = checkpoint_bytes * (keep + 2)  # those kept, the best, the one being written
        there = sum(file.stat().st_size for file in self.checkpoints.glob("step_*/*"))
        needed = max(checkpoint_bytes, needed - there)  # the new ones take their places
        free = shutil.disk_usage(self.path).free
        if free < needed:
            raise ConfigError(
                f"the disk of {self.path} has {free / 2**20:.0f} MiB free, its checkpoints need "
                f"{needed / 2**20:.0f} MiB: free some space, lower checkpoint.keep_last, or "
                "choose another run_dir"
            )


def _cannot_write(path: Path, error: OSError) -> str:
    cause = error.strerror or str(error)
    cure = "choose another run_dir or mend its permissions"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        cure = "free some space or choose another run_dir"
    return f"cannot write to run_dir {path}: {cause}: {cure}"


def _environment(ranks: Ranks) -> dict[str, Any]:
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "command": redact_words(sys.argv),
        "dist_train": __version__,
        "torch": str(torch.__version__),
        "python": platform.python_version(),
        "host": socket.gethostname(),
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
        "gpus": gpus,
        "world_size": ranks.world_size,
        "launcher": ranks.launcher,
        "git": _git_state(),
    }


def cpu_name() -> str:
    """Return the CPU's model: bits may differ between models."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((x.split(":", 1)[1].strip() for x in lines if x.startswith("model name")), "")


def _git_state() -> dict[str, Any] | None:
    """Return commit and cleanliness of the working directory's repository, if it is one."""
    try:
        commit, status = (
            subprocess.run(
                ["git", *words],
                capture_output=True,
                encoding="utf-8",
                errors="replace",
                timeout=5,
                check=True,
            ).stdout
            for words in (["rev-parse", "HEAD"], ["status", "--porcelain"])
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return {"commit": commit.strip(), "clean": not status.strip()}
