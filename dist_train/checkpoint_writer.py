"""The thread that writes checkpoints: one at a time, and training never waits for it in vain.

A save that fails is told at the next boundary and tried again, later and later, while training
goes on. Only rank 0 has a writer: nothing here is collective.
"""

import contextlib
import shutil
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dist_train.checkpoint import HostBuffers, write_checkpoint
from dist_train.checkpoint_folder import list_checkpoints, refuse_link, step_of
from dist_train.checkpoint_upkeep import prune, sync_folder, tidy

FIRST_RETRY_SEC, LAST_RETRY_SEC = 1.0, 60.0
TELL_AGAIN_SEC = 600.0


@dataclass(frozen=True, kw_only=True, slots=True)
class SaveCost:
    """What one save took."""

    stall_sec: float  # of the step: copying the state
    thread_sec: float  # of one core, in the background


@dataclass(frozen=True, kw_only=True, slots=True)
class _Job:
    state: dict[str, Any]
    step: int
    best_step: int | None
    must: bool  # it stands for what cannot be saved later: the end, a stop, the best
    keep_older: bool
    stall_sec: float
    began: float  # time.monotonic()


class CheckpointWriter:
    """Writes the states of one run in a thread, one at a time, and prunes old ones."""

    def __init__(
        self,
        folder: Path,
        *,
        keep_last: int,
        on_saved: Callable[[int], None],
        on_error: Callable[[str], None],
        on_recovered: Callable[[str], None] = lambda text: None,
    ) -> None:
        self.folder = folder
        self.cost: SaveCost | None = None  # of the last save that worked
        self.last_sec = 0.0  # of the last save that worked, from the copy to the disk
        self.slowest_sec = 0.0  # of all of them
        self.last_saved: int | None = None
        self.last_error: Exception | None = None  # of the last try; None once one worked
        self._keep_last = keep_last
        self._on_saved = on_saved  # called in the thread, with the step
        self._on_error = on_error
        self._on_recovered = on_recovered
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._buffers = HostBuffers()
        self._job: _Job | None = None  # being written, or failed and not to be lost
        self._pending: Future[SaveCost] | None = None
        self._owed = False  # a save is due and was put off
        self._note: str | None = None  # from the thread, beside its result
        self._failures = 0
        self._failing_since = self._told_at = self._retry_at = 0.0
        refuse_link(folder)
        folder.mkdir(mode=0o755, parents=True, exist_ok=True)
        for parent in folder.absolute().parents[:3]:  # as many as a run may have made
            with contextlib.suppress(PermissionError):
                sync_folder(parent)
        tidy(folder)

    @property
    def wants_save(self) -> bool:
        """Whether a save that was put off, or that failed, could be made now."""
        self.poll()
        return self._owed and self._pending is None and time.monotonic() >= self._retry_at

    def save(
        self,
        state: dict[str, Any],
        *,
        step: int,
        best_step: int | None,
        must: bool = True,
        keep_older: bool = False,
    ) -> bool:
        """Copy `state` to host memory now and write it in the background.

        Tensors may change as soon as this returns.

        Args:
            state: tensors and plain values.
            step: whose state it is.
            best_step: the checkpoint to keep besides the newest ones.
            must: wait for the save before this one. Otherwise, while that is being written or is
                to be tried again later, this one is put off: `wants_save` tells when it can be.
            keep_older: delete no checkpoint for this one.

        Returns:
            Whether it was taken; False: it was put off.
        """
        if must:
            self.wait()
        self.poll()
        if not must and self.is_busy:
            self._owed = True
            return False
        start = time.monotonic()
        was_pinned = not self._buffers.not_pinned
        copied = self._buffers.copy(state)
        if was_pinned and self._buffers.not_pinned:
            self._on_error(
                f"no more host memory can be pinned ({self._buffers.not_pinned}): saves are copied "
                "through other memory, and hold training up longer"
            )
        self._job = _Job(
            state=copied,
            step=step,
            best_step=best_step,
            must=must,
            keep_older=keep_older,
            stall_sec=time.monotonic() - start,
            began=start,
        )
        self._owed = False
        self._pending = self._thread.submit(self._write, self._job)
        return True

    @property
    def is_writing(self) -> bool:
        """Whether a save is on its way to the disk."""
        return self._pending is not None and not self._pending.done()

    @property
    def writing_sec(self) -> float:
        """For how long a save has been on its way to the disk; 0 if none is."""
        job = self._job
        return time.monotonic() - job.began if job is not None and self.is_writing else 0.0

    @property
    def is_busy(self) -> bool:
        """Whether a save that may be put off would be."""
        return self._job is not None or time.monotonic() < self._retry_at

    def poll(self) -> None:
        """See, without waiting, what became of the last save; try one again that must not be lost.

        Call it at every boundary.
        """
        if self._pending is not None and self._pending.done():
            self._settle()
        if self._job is not None and self._pending is None and time.monotonic() >= self._retry_at:
            self._pending = self._thread.submit(self._write, self._job)

    def wait(self, retry_sec: float = 0.0) -> bool:
        """Wait until the last save is on the disk; False, after telling, if it failed.

        Args:
            retry_sec: how long to go on trying one that fails; 0 is one more try.
        """
        end = time.monotonic() + retry_sec
        tried_again = False
        while True:
            if self._pending is not None:
                self._settle()
            if self._job is None:
                return self.last_error is None
            now = time.monotonic()
            if tried_again and now >= end:
                return False
            if tried_again:
                time.sleep(max(0.0, min(self._retry_at, end) - now))
            tried_again = True
            self._pending = self._thread.submit(self._write, self._job)

    def close(self) -> None:
        """Wait for the last save and end the thread."""
        self.wait()
        self._thread.shutdown()

    def _settle(self) -> None:
        """Take the result of the save that is pending; waits for it."""
        assert self._pending is not None
        pending, self._pending = self._pending, None
        job = self._job
        assert job is not None
        try:
            self.cost = pending.result()
        except Exception as error:  # a disk, a memory limit: training is worth more than a save
            self._failed(job, error)
            return
        self._job, self.last_error, self.last_saved = None, None, job.step
        note, self._note = self._note, None
        if note is not None:
            self._on_error(note)
        if self._failures:
            took = time.monotonic() - self._failing_since
            self._on_recovered(
                f"checkpoints are saved again, of step {job.step}, after {self._failures} failed "
                f"tries in {took:.0f} s"
            )
        self._failures, self._retry_at = 0, 0.0

    def _failed(self, job: _Job, error: Exception) -> None:
        now = time.monotonic()
        again = _kind(error) == _kind(self.last_error)
        news = not again or now - self._told_at > TELL_AGAIN_SEC
        if not self._failures:
            self._failing_since = now
        self.last_error = error
        self._failures += 1
        pause = min(LAST_RETRY_SEC, FIRST_RETRY_SEC * 2 ** (self._failures - 1))
        self._retry_at = now + pause
        self._owed = True
        if not job.must:
            self._job = None  # a newer state is worth more than this one
        if news:
            self._told_at = now
            kept = list_checkpoints(self.folder)
            newest = f"the one of step {step_of(kept[0])} is kept" if kept else "there is none yet"
            what = str(error) if isinstance(error, OSError) else repr(error)
            self._on_error(
                f"checkpoint of step {job.step} not saved: {what}; {newest}, training goes on and "
                f"tries again every {FIRST_RETRY_SEC:.0f} to {LAST_RETRY_SEC:.0f} s"
            )

    def _write(self, job: _Job) -> SaveCost:
        start, began = time.thread_time(), time.monotonic()
        self._mend_folder()
        write_checkpoint(self.folder, job.state, step=job.step)
        self.last_sec = job.stall_sec + time.monotonic() - began
        self.slowest_sec = max(self.slowest_sec, self.last_sec)
        self._on_saved(job.step)
        try:
            if not job.keep_older:
                keep, best = self._keep_last, job.best_step
                prune(self.folder, keep_last=keep, newest=job.step, keep_step=best)
        except OSError as error:  # this save stands
            self._note = f"old checkpoints cannot be deleted: {error}"
        return SaveCost(stall_sec=job.stall_sec, thread_sec=time.thread_time() - start)

    def _mend_folder(self) -> None:
        """Make the folder again if it is gone, and clear what an earlier try could not.

        The run's own folder is not made again: a disk that is not mounted would be covered by it.
        """
        if not self.folder.exists():
            self.folder.mkdir(mode=0o755)
            sync_folder(self.folder.parent)
        for litter in self.folder.glob(".writing-*"):
            shutil.rmtree(litter, ignore_errors=True)


def _kind(error: Exception | None) -> object:
    return error.errno if isinstance(error, OSError) else repr(error)
