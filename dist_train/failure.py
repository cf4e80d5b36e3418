"""How an attempt fails: the first cause is recorded once, and the ranks that follow it are quiet.

When a rank ends, the collectives of the others fail too: what they raise says nothing. They wait
a moment for the first cause; if none comes, some rank has died without a word.
"""

import contextlib
import dataclasses
import faulthandler
import json
import sys
import time
import traceback
from collections.abc import Iterator
from pathlib import Path

import torch.distributed as dist

from dist_train import chain
from dist_train.chain import Cause
from dist_train.config.redact import redact
from dist_train.config.user_code import UserCodeError
from dist_train.distributed import RankFailedError, Ranks
from dist_train.preemption import stop_reason
from dist_train.step_failure import StepFailedError

FOLLOW_SEC = 2.0  # for the first cause to be written down
AFTER_SIGNAL_SEC = 0.3  # the same, once the launcher is ending this rank too
STORE_KEY = "first_cause"
MICRO_BATCH_KEY = "micro_batch_size"
# What gloo says when the other end is gone; its "enforce fail" is a cause of its own.
LOST = ("connection closed", "connection reset", "broken pipe", "timed out", "timeout", "connect")
# The same of NCCL: ncclRemoteError, torch's watchdog, and a communicator that was given up.
LOST_BY_NCCL = ("remote process exited", "timed out", "timeout", "aborted")
# ncclGetErrorString of what a rank, its GPU or its machine has itself.
CAUSES_BY_NCCL = (
    "unhandled cuda error",
    "unhandled system error",
    "internal error",
    "invalid argument",
    "invalid usage",
    "out of memory",
)


class RepeatedFailureError(RuntimeError):
    """The same failure has come too often: a restart would only repeat it."""

    exit_code = chain.EXIT_CODE


def is_follower(error: BaseException) -> bool:
    """Say whether an error only tells that another rank has failed."""
    if isinstance(error, RankFailedError | dist.DistNetworkError | dist.DistStoreError):
        return True
    text = str(error).lower()
    if isinstance(error, dist.DistBackendError) and "nccl" in text:
        own = any(word in text for word in CAUSES_BY_NCCL)  # also as what it was aborted for
        return not own and any(word in text for word in LOST_BY_NCCL)
    of_gloo = isinstance(error, dist.DistBackendError) or (
        type(error) is RuntimeError and "gloo" in text
    )
    return of_gloo and "enforce fail" not in text and any(word in text for word in LOST)


class ChainNotes:
    """What this attempt writes into its chain, on every rank."""

    def __init__(self, folder: Path, ranks: Ranks, micro_batch_size: int | None) -> None:
        self._folder = folder
        self._ranks = ranks
        self.micro_batch_size = micro_batch_size  # that earlier attempts remembered, or None

    def remember_micro_batch(self, size: int) -> None:
        """Let the next attempt begin with micro-batches of at most `size`. Not collective."""
        if self._folder.is_dir():
            with contextlib.suppress(OSError):  # the disk may be full: the next one finds out anew
                chain.remember_micro_batch(self._folder, self._ranks.chain, size)
        elif self._ranks.store is not None:
            self._ranks.store.set(MICRO_BATCH_KEY, str(size))

    def first_cause(self, error: BaseException, step: int) -> str | None:
        """Record this rank's error as the attempt's first cause, unless another was faster.

        Returns:
            The line that ends the chain, if this has come too often.
        """
        told = isinstance(error, StepFailedError)  # by the rank that failed, to all
        cause = Cause(
            attempt=self._ranks.attempt,
            rank=error.rank if told else self._ranks.rank,
            step=step,
            type="" if told or isinstance(error, UserCodeError) else type(error).__name__,
            message=redact(error.cause if told else str(error))[:2000],
        )
        if not self._folder.is_dir():  # on a machine that does not share the folder
            if self._ranks.store is not None:
                text = json.dumps(dataclasses.asdict(cause))
                with contextlib.suppress(RuntimeError):  # the store's machine may be the dead one
                    self._ranks.store.compare_set(STORE_KEY, "", text)
            return None
        trace = error.trace if told else "".join(traceback.format_exception(error))
        with contextlib.suppress(OSError):  # the disk may be the reason
            return chain.record(self._folder, self._ranks.chain, cause, trace)
        return None

    def follow(self, error: BaseException, step: int) -> RankFailedError:
        """Wait a moment for the first cause; returns an error that names it, or that it is none."""
        shared = self._folder.is_dir()
        if shared:
            with contextlib.suppress(OSError):
                chain.witness(self._folder, self._ranks.chain, rank=self._ranks.rank, step=step)
        end = time.monotonic() + FOLLOW_SEC
        cause = None
        while cause is None and time.monotonic() < end:
            time.sleep(0.05)
            cause = self._told(shared)
            if stop_reason() is not None:
                end = min(end, time.monotonic() + AFTER_SIGNAL_SEC)
        if cause is not None:
            return RankFailedError(cause.sentence())
        text = " ".join(redact(str(error)).split())[:300]
        return RankFailedError(f"another rank ended without a word at step {step}: {text}")

    def _told(self, shared: bool) -> Cause | None:
        ranks = self._ranks
        cause = chain.cause_of(self._folder, ranks.chain, ranks.attempt) if shared else None
        if cause is not None or ranks.store is None:
            return cause
        with contextlib.suppress(RuntimeError):
            if shared and ranks.store.check([MICRO_BATCH_KEY]):
                self.remember_micro_batch(int(ranks.store.get(MICRO_BATCH_KEY)))
            if ranks.store.check([STORE_KEY]):
                cause = Cause(**json.loads(ranks.store.get(STORE_KEY)))
                if shared:
                    chain.record(self._folder, ranks.chain, cause)
        return cause


@contextlib.contextmanager
def stack_on_crash(folder: Path, ranks: Ranks) -> Iterator[None]:
    """Let a segmentation fault, an abort and their like leave this rank's stacks in log/."""
    if not folder.is_dir():
        yield
        return
    path = chain.crash_file(folder, ranks.attempt, ranks.rank)
    with path.open("w") as file:
        was_enabled = faulthandler.is_enabled()
        faulthandler.enable(file)
        try:
            yield
        finally:
            faulthandler.disable()
            if was_enabled and sys.__stderr__ is not None:
                faulthandler.enable(sys.__stderr__)
            if path.stat().st_size == 0:
                path.unlink(missing_ok=True)
