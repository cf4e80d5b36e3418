"""This process's own job: what SLURM says of it, and how it is put back into the queue.

A controller that does not answer is no controller that does not know: it is asked until it
answers, or the job's time is over.
"""

import contextlib
import os
import sys
import time
from collections.abc import Callable
from typing import TypeVar

from launch import scontrol

PAUSES_SEC = (1.0, 2.0, 5.0, 10.0)  # between two questions; the last one again and again
OVER_TIME_SEC = 600.0  # after the limit, while no controller ends the job, it can still be requeued
REQUEUE_SEC = 30.0  # for SLURM to say that a requeued job waits

T = TypeVar("T")


class ThisJob:
    """The job that this process belongs to, if it does."""

    def __init__(self, gives_up: Callable[[], bool]) -> None:
        """Ask nothing yet.

        Args:
            gives_up: whether the person at the keyboard does not want to wait for SLURM.
        """
        self.job_id = scontrol.this_job()
        self._gives_up = gives_up
        told = os.environ.get("SLURM_JOB_END_TIME", "")  # of newer versions
        self._end_time = float(told) if told.isdigit() else None

    def ask(self) -> scontrol.Job | None:
        """Return what SLURM says of this job; None outside of one, or if SLURM has none such.

        Raises:
            NoAnswerError: it does not answer, and the job's time is over.
        """
        job_id = self.job_id
        if job_id is None or not scontrol.is_available():
            return None
        job = self._patiently(lambda: _look(job_id))
        if job is not None:
            self._end_time = job.end_time
        return job

    def address_of(self, node: str) -> str | None:
        """Return the address at which SLURM itself reaches a node; None if it does not say."""
        with contextlib.suppress(scontrol.SlurmError):
            return self._patiently(lambda: scontrol.address_of(node))
        return None

    def requeue(self) -> scontrol.Job | None:
        """Put this job back into the queue; returns it as it waits there, None if it is not seen.

        Raises:
            SlurmError: SLURM refuses.
            NoAnswerError: it does not answer, and the job's time is over.
        """
        job_id = self.job_id
        assert job_id is not None

        def once() -> None:
            try:
                scontrol.requeue(job_id)
            except scontrol.NoAnswerError:
                if not self._has_left():  # it may have been heard, and the answer lost
                    raise
            except scontrol.SlurmError as refusal:  # as an earlier request was heard?
                if "pending" not in str(refusal) and not self._has_left():
                    raise

        self._patiently(once)
        end = time.monotonic() + REQUEUE_SEC
        while time.monotonic() < end:
            job = self.ask()
            if job is not None and not job.is_running:
                return job
            time.sleep(0.5)
        return None

    def _has_left(self) -> bool:
        """Say whether SLURM has put the job back already. Raises NoAnswerError."""
        assert self.job_id is not None
        job = _look(self.job_id)
        return job is not None and job.is_waiting

    def _patiently(self, ask: Callable[[], T]) -> T:
        """Return what `ask` returns as soon as SLURM answers.

        Raises:
            SlurmError: SLURM refuses.
            NoAnswerError: it does not answer, and the job's time is over.
        """
        number = 0
        while True:
            try:
                answer = ask()
            except scontrol.NoAnswerError as silence:
                late = self._end_time is not None and time.time() > self._end_time + OVER_TIME_SEC
                if late or self._gives_up():
                    raise
                if number == 0:
                    say(f"{silence}: asked again until it does")
                time.sleep(PAUSES_SEC[min(number, len(PAUSES_SEC) - 1)])
                number += 1
                continue
            if number:
                say("SLURM answers again")
            return answer


def _look(job_id: str) -> scontrol.Job | None:
    """Return what SLURM says of the job. Raises NoAnswerError: nothing, for whatever reason."""
    try:
        return scontrol.job_of(job_id)
    except scontrol.SlurmError as error:
        raise scontrol.NoAnswerError(str(error)) from None


def say(text: str) -> None:
    """Write a line into the job's output."""
    sys.stdout.write(f"dist-train: {text}\n")
    sys.stdout.flush()
