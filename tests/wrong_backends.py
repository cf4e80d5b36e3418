"""Backends that hang or lie, for the sums with which DDP is tried out."""

import contextlib
import os
import threading
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

from dist_train import ddp_check
from dist_train.ddp import BucketGradients


def on_rank_1() -> bool:
    return os.environ["RANK"] == "1"


def hangs(tensor: torch.Tensor, *, in_backward: bool) -> None:
    """Never return, on rank 1."""
    if on_rank_1() and not in_backward:
        threading.Event().wait()


def hangs_later(tensor: torch.Tensor, *, in_backward: bool) -> None:
    """Never return inside a backward, on rank 1."""
    if on_rank_1() and in_backward:
        threading.Event().wait()


def is_left_out(tensor: torch.Tensor, *, in_backward: bool) -> None:
    """Take no part on rank 1: the backend of the others waits for it."""
    if on_rank_1() and in_backward:
        raise RuntimeError("a sum that failed")


def lies(tensor: torch.Tensor, *, in_backward: bool) -> None:
    """Add a little on rank 1."""
    if on_rank_1() and not in_backward:
        tensor.add_(1)


def lies_later(tensor: torch.Tensor, *, in_backward: bool) -> None:
    """Add a little on rank 1, inside a backward."""
    if on_rank_1() and in_backward:
        tensor.add_(1)


def swallows_nan(tensor: torch.Tensor, *, in_backward: bool) -> None:
    """Send zeros in the place of NaN."""
    tensor.nan_to_num_(0.0)


TIMED_OUT = ("no answer in 2 s", "Timed out waiting")
# What comes before the sums of the trial; whether DDP is right without a failure, and what is told
# of it, by whichever rank is first.
BACKENDS: dict[str, tuple[Callable[..., None], bool, tuple[str, ...]]] = {
    "hangs": (hangs, False, TIMED_OUT),
    "hangs later": (hangs_later, True, TIMED_OUT),
    "is left out": (is_left_out, True, (*TIMED_OUT, "a sum that failed")),
    "lies": (lies, False, ("a sum is wrong",)),
    "lies later": (lies_later, True, ("the sum of gradients is wrong",)),
    "swallows NaN": (swallows_nan, True, ("a failure of rank 1 is not seen",)),
}


@contextlib.contextmanager
def backend(name: str) -> Iterator[None]:
    """Let the sums of the trial be those of a wrong backend, but for those of plain DDP."""
    if not name:
        yield
        return
    wrong, real, new_group = BACKENDS[name][0], dist.all_reduce, dist.new_group
    own = []

    def all_reduce(tensor: torch.Tensor, *args: Any, **arguments: Any) -> Any:
        if any(arguments.get("group") is group for group in own):
            wrong(tensor, in_backward=bool(arguments.get("async_op")))
        return real(tensor, *args, **arguments)

    def made(*args: Any, **arguments: Any) -> Any:
        group = new_group(*args, **arguments)
        if threading.current_thread() is not threading.main_thread():
            own.append(group)
        return group

    with (
        mock.patch.object(dist, "new_group", made),
        mock.patch.object(dist, "all_reduce", all_reduce),
        mock.patch.object(ddp_check, "DEADLINE_SEC", 2.0),
        mock.patch.object(ddp_check, "GLOO_SEC", 1.0),
    ):
        yield


@contextlib.contextmanager
def wrong_without_a_failure() -> Iterator[None]:
    """Let plain DDP go through the hook, too: its sums are then those of the wrong backend."""

    def hooked(self: BucketGradients, *args: Any, **kwargs: Any) -> None:
        kwargs["recoverable"] = True
        made(self, *args, **kwargs)

    made = BucketGradients.__init__
    with mock.patch.object(BucketGradients, "__init__", hooked):
        yield
