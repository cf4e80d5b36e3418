"""What went wrong in a step on one rank, in words that can be sent to the others."""

import traceback
from dataclasses import dataclass
from typing import Any, Literal

import torch

from dist_train.config import ConfigError
from dist_train.config.user_code import NEXT_LINE, UserCodeError, own_frame, place, said
from dist_train.ddp import NoGradientError
from dist_train.distributed import Ranks
from dist_train.memory import is_out_of_memory, memory_in_use

OF_THE_GROUP = ("gloo", "NCCL", "ProcessGroup", "Connection closed by peer", "Connection reset")


class StepFailedError(RuntimeError):
    """A step failed for good on some rank; raised on all of them, with the first cause's trace."""

    exit_code = 1

    def __init__(
        self, text: str, *, rank: int = 0, cause: str = "", trace: str = "", users: bool = False
    ) -> None:
        super().__init__(text)
        self.rank, self.cause, self.trace = rank, cause, trace
        self.users = users  # the user's own code: the text says where, and needs no traceback

    def __reduce__(self) -> tuple[Any, ...]:
        """Keep the cause when it is sent to another process."""
        return _remade, (str(self), self.rank, self.cause, self.trace, self.users)


@dataclass(frozen=True, kw_only=True, slots=True)
class Failure:
    """What went wrong on a rank; strings, to be sent to the others."""

    rank: int
    kind: Literal["memory", "no gradient", "mistake", "error"]
    text: str
    users: bool = False  # the user's own code: the text says where
    trace: str = ""
    memory: str = ""


def is_of_group(error: Exception) -> bool:
    """Say whether an exception means that the process group is broken: nobody can be reached."""
    return isinstance(error, torch.distributed.DistError) or (
        isinstance(error, RuntimeError) and any(word in str(error) for word in OF_THE_GROUP)
    )


def failure_of(error: Exception, shown: Exception, ranks: Ranks) -> Failure:
    """Return what the other ranks are told of an exception, whose activations are let go.

    Args:
        error: what was raised.
        shown: the same, or what in_words has made of it.
        ranks: of which this one failed.
    """
    kind = "mistake" if isinstance(shown, ConfigError) else "error"
    if is_out_of_memory(error):
        kind = "memory"
    elif isinstance(error, NoGradientError):
        kind = "no gradient"
    text = str(shown)
    if shown is error and kind in ("memory", "error"):
        text = f"{type(error).__name__}: {error}"
    failure = Failure(
        rank=ranks.rank,
        kind=kind,
        text=text,
        users=isinstance(shown, UserCodeError),
        trace="".join(traceback.format_exception(error)),
        memory=memory_in_use(ranks.device) if kind == "memory" else "",
    )
    error.__traceback__ = None  # its frames hold the activations
    return failure


def in_words(error: Exception, *, at_start: bool) -> Exception:
    """Return an error of the user's own code as one that says where; others as they are."""
    frame = own_frame(error)
    if isinstance(error, ConfigError) or (frame is None and not isinstance(error, UserCodeError)):
        return error
    text = str(error)
    if frame is not None and not isinstance(error, UserCodeError):
        text = NEXT_LINE.join([said(error), place(frame)])
        text = f"the first step fails: {text}" if at_start else text
    return ConfigError(text) if at_start else UserCodeError(text)


def failed(failure: Failure, text: str) -> StepFailedError:
    """Return what to raise on all ranks for the failure of one."""
    return _remade(text, failure.rank, failure.text, failure.trace, failure.users)


def _remade(text: str, rank: int, cause: str, trace: str, users: bool) -> StepFailedError:
    return StepFailedError(text, rank=rank, cause=cause, trace=trace, users=users)
