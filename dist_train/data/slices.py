"""Decode many pictures slice by slice, in parallel; what is done outlives the process.

A record says which slices are on disk. The next process goes on from there, and those that wait
for this one see in it that the work goes on. Imports no torch.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from dist_train.config.whole_file import read_json
from dist_train.data import decode
from dist_train.data.cache import SignOfLife

INLINE_PICTURES = 256  # fewer are decoded faster than processes start
SLICE_PICTURES = 250
RECORD_SEC = 30.0  # between two records on disk; each of them is told to the user

Done = Callable[[decode.Job, decode.Outcome], None]


class Partial:
    """The slices that are done: by this process, and by one before it that was killed."""

    def __init__(self, folder: Path, made_of: dict[str, Any], *, num: int, num_bytes: int) -> None:
        """Take up what is in the folder if it was made of the same, else begin.

        Args:
            folder: whose lock this process holds.
            made_of: what the slices depend on.
            num: how many pictures there are in all.
            num_bytes: of their pixels; 0: they are only verified.
        """
        self.num = num
        self.pixels_path = folder / ".partial.u8" if num_bytes else None
        self.slices: dict[int, str | None] = {}  # by first picture: the first of another size
        self.folder = folder
        self._made_of = {**made_of, "num_bytes": num_bytes, "slice": SLICE_PICTURES}
        found = read_json(_record(folder))
        if found.get("made_of") == self._made_of and self._num_bytes() == num_bytes:
            self.slices = {int(first): note for first, note in found["slices"].items()}
            return
        self.remove()
        if self.pixels_path is None:
            return
        try:
            with open(self.pixels_path, "wb") as file:
                os.posix_fallocate(file.fileno(), 0, num_bytes)  # a full disk is known now
        except OSError:
            self.remove()
            raise

    @property
    def num_done(self) -> int:
        """How many pictures are done."""
        return sum(min(SLICE_PICTURES, self.num - first) for first in self.slices)

    @property
    def uneven(self) -> str | None:
        """The first picture that is not of the first one's size, and its own."""
        return next(
            (self.slices[first] for first in sorted(self.slices) if self.slices[first]), None
        )

    def keep(self, told: str) -> None:
        """Record what is done, with a line for those that wait. Waits for the disk."""
        if self.pixels_path is not None:
            sync(self.pixels_path)
        temporary = self.folder / ".partial.tmp"
        record = {"made_of": self._made_of, "slices": self.slices, "told": told}
        temporary.write_text(json.dumps(record))
        os.replace(temporary, _record(self.folder))

    def remove(self) -> None:
        """Delete what is left of it."""
        for suffix in ("json", "u8", "tmp"):
            (self.folder / f".partial.{suffix}").unlink(missing_ok=True)

    def _num_bytes(self) -> int:
        if self.pixels_path is None or not self.pixels_path.is_file():
            return 0
        return self.pixels_path.stat().st_size


def progress_in(folder: Path) -> str | None:
    """Return the last line that another process recorded in the folder."""
    return read_json(_record(folder)).get("told")


def decode_rest(
    partial: Partial, paths: Sequence[str], *, height: int, width: int, sign: SignOfLife
) -> list[str]:
    """Decode the slices that `partial` lacks.

    Args:
        partial: gets the slices without a fault, and the pixels.
        paths: of all pictures.
        height: of the pictures whose pixels are kept.
        width: of these.
        sign: called after each slice; with a line from time to time.

    Returns:
        A line for each file that cannot be decoded, in order.
    """
    inline = len(paths) <= INLINE_PICTURES
    jobs = [
        decode.Job(
            paths=list(paths[first : first + SLICE_PICTURES]),
            height=height,
            width=width,
            pixels_path=None if partial.pixels_path is None else str(partial.pixels_path),
            first_row=first,
            parent=None if inline else os.getpid(),
        )
        for first in range(0, len(paths), SLICE_PICTURES)
        if first not in partial.slices
    ]
    failed: dict[int, list[str]] = {}
    begun = recorded = time.monotonic()
    num_before, num_now = partial.num_done, 0

    def done(job: decode.Job, outcome: decode.Outcome) -> None:
        nonlocal recorded, num_now
        num_now += len(job.paths)
        if outcome.failed:
            failed[job.first_row] = outcome.failed
        else:
            partial.slices[job.first_row] = next(iter(outcome.uneven), None)
        now = time.monotonic()
        if now - recorded < RECORD_SEC:
            sign(None)
            return
        left = (partial.num - num_before - num_now) * (now - begun) / num_now
        told = f"decoded {num_before + num_now:,} of {partial.num:,} pictures, {_about(left)} left"
        partial.keep(told)
        recorded = time.monotonic()
        sign(told)

    if inline:
        for job in jobs:
            done(job, decode.decode(job))
    else:
        before = f", {num_before:,} of them done before" if num_before else ""
        sign(f"decoding {partial.num:,} pictures{before}: once, then {partial.folder} has them")
        _in_processes(jobs, done)
    return [line for first in sorted(failed) for line in failed[first]]


def sync(path: Path) -> None:
    """Wait until the file's bytes are on disk."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())


class _Decoder:
    """A process that decodes one job after the other."""

    def __init__(self) -> None:
        try:
            self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 # as long as the process
            self._process = subprocess.Popen(
                [sys.executable, "-P", decode.__file__],  # -P: this folder's names hide no library
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
                text=True,
            )
        except OSError as error:
            raise RuntimeError(f"cannot start a decoding process: {error}") from error

    def decode(self, job: decode.Job) -> decode.Outcome:
        """Wait for the job's outcome.

        Raises:
            RuntimeError: the process has ended; with what it said.
        """
        assert self._process.stdin is not None, "asked for"
        assert self._process.stdout is not None, "asked for"
        try:
            self._process.stdin.write(json.dumps(asdict(job)) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line.endswith("\n"):
            code = self._process.wait()
            self._errors.seek(0)
            raise RuntimeError(f"a decoding process ended with {code}: {self._errors.read()}")
        return decode.Outcome(**json.loads(line))

    def kill(self) -> None:
        """End it in the middle of a job."""
        self._process.kill()

    def close(self) -> None:
        """Wait until it has ended: no job follows."""
        self._process.communicate()
        self._errors.close()


def _in_processes(jobs: Sequence[decode.Job], done: Done) -> None:
    """Decode the jobs in as many processes as this one has cores; `done` is called here."""
    num_workers = min(len(jobs), len(os.sched_getaffinity(0)))
    idle: SimpleQueue[_Decoder] = SimpleQueue()

    def work(job: decode.Job) -> decode.Outcome:
        decoder = idle.get()
        try:
            return decoder.decode(job)
        finally:
            idle.put(decoder)

    with ExitStack() as stack:
        decoders = []
        for _ in range(num_workers):
            decoders.append(_Decoder())
            stack.callback(decoders[-1].close)
            idle.put(decoders[-1])
        # Each thread waits for one process.
        pool = stack.enter_context(ThreadPoolExecutor(max(1, num_workers)))
        jobs_of = {pool.submit(work, job): job for job in jobs}
        try:
            for future in as_completed(jobs_of):
                done(jobs_of[future], future.result())
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for decoder in decoders:
                decoder.kill()
            raise


def _record(folder: Path) -> Path:
    return folder / ".partial.json"


def _about(seconds: float) -> str:
    return f"about {seconds:.0f} s" if seconds < 100 else f"about {seconds / 60:.0f} min"
