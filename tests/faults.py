"""Faults at a chosen (rank, step, place), inside the process; each leaves a mark when it fires."""

import ctypes
import faulthandler
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch

PLACES = (
    "before the step",
    "after the backward",
    "after the step",
    "in the evaluation",
    "in the save",
    "between manifest and rename",
)
# Where a rank can hang as well, and how.
MORE_PLACES = ("in the data", "in the forward", "in the backward", "in the optimizer", "in the log")
HANGS = ("stop", "python loop", "c loop", "c call", "deadlock", "blocked write")


@dataclass(frozen=True, kw_only=True, slots=True)
class Fault:
    """Strike on `rank` at the first visit of `place` from `step` on: a signal, or another kind."""

    rank: int
    step: int
    place: str
    number: int = signal.SIGKILL
    mark: str = ""  # a file that is made when the fault fires
    kind: str = "signal"  # or one of KINDS or of HANGS


KINDS: dict[str, Callable[[], Any]] = {
    "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "exception": lambda: _raise(RuntimeError("an injected exception")),
    "broken device": lambda: _raise(torch.AcceleratorError("CUDA error: misaligned address")),
    "exit": lambda: os._exit(1),
    "exit 0": lambda: os._exit(0),
    "sys.exit": lambda: sys.exit(0),
    "abort": os.abort,
    "segfault": faulthandler._sigsegv,  # type: ignore[attr-defined] # made for tests
    "KeyboardInterrupt": lambda: _raise(KeyboardInterrupt()),
}


def _raise(error: BaseException) -> None:
    raise error


def train_with(config: Any, fault: Fault | None) -> dict[str, Any]:
    """Call train(config) in this rank with the fault armed."""
    from dist_train import train as loop

    with ExitStack() as stack:
        if fault is not None and int(os.environ.get("RANK", "0")) == fault.rank:
            arm(fault, stack)
        return loop.train(config)


def arm(fault: Fault, stack: ExitStack) -> None:
    """Patch the place so that the fault fires there once."""
    from dist_train import checkpoint
    from dist_train import train as loop
    from dist_train.heartbeat import Pulse
    from dist_train.parallel import Replica
    from dist_train.recovery import NonFiniteGuard
    from dist_train.tasks import classification
    from dist_train.tracking import JsonlTracker

    now = {"step": -1, "fired": False}

    def fire() -> None:
        if now["step"] >= fault.step and not now["fired"]:
            now["fired"] = True
            Path(fault.mark).touch()
            if fault.kind in KINDS:
                KINDS[fault.kind]()
            elif fault.kind == "signal":
                os.kill(os.getpid(), fault.number)
            else:
                hang(fault.kind)

    def around(
        owner: Any, name: str, *, before: bool, only: Callable[..., bool] | None = None
    ) -> None:
        real = getattr(owner, name)

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            if before and (only is None or only(*args)):
                fire()
            result = real(*args, **kwargs)
            if not before and (only is None or only(*args)):
                fire()
            return result

        stack.enter_context(mock.patch.object(owner, name, wrapped))

    real_step = loop.train_step

    def counted(*args: Any, **kwargs: Any) -> Any:
        now["step"] = kwargs["step"]
        if fault.place == "before the step":
            fire()
        result = real_step(*args, **kwargs)
        if fault.place == "after the step":
            fire()
        return result

    stack.enter_context(mock.patch.object(loop, "train_step", counted))
    if fault.place == "after the backward":
        around(Replica, "reduce", before=True)
    elif fault.place == "in the evaluation":
        around(classification, "eval_sums", before=True)
    elif fault.place == "in the data":
        around(Pulse, "at", before=False, only=lambda pulse, phase, step: phase == "data")
    elif fault.place == "in the forward":
        around(Replica, "__call__", before=True)
    elif fault.place == "in the backward":
        around_backward(classification, fire, stack)
    elif fault.place == "in the optimizer":
        around(NonFiniteGuard, "after_step", before=True)
    elif fault.place == "in the log":
        around(JsonlTracker, "log", before=True)
    elif fault.place == "in the save":
        around(checkpoint, "_write_state", before=True)
    elif fault.place == "between manifest and rename":
        around(checkpoint, "_write_file", before=False)


def around_backward(classification: Any, fire: Callable[[], None], stack: ExitStack) -> None:
    """Fire when the gradient of the loss is computed."""
    real = classification.loss_sum

    def with_hook(*args: Any, **kwargs: Any) -> Any:
        loss = real(*args, **kwargs)
        loss.register_hook(lambda gradient: fire())
        return loss

    stack.enter_context(mock.patch.object(classification, "loss_sum", with_hook))


def hang(how: str) -> None:
    """Never come back."""
    if how == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif how == "python loop":
        while True:
            pass
    elif how == "c loop":  # backtracks for ages, and holds the interpreter's lock
        re.match(r"(a+)+$", "a" * 60 + "b")
    elif how == "c call":  # PyDLL does not release the interpreter's lock
        ctypes.PyDLL(None).sleep(1000)
    elif how == "deadlock":
        lock = threading.Lock()
        lock.acquire()
        lock.acquire()
    elif how == "blocked write":
        _, full = os.pipe()
        while True:
            os.write(full, bytes(1 << 16))
    time.sleep(1000)  # what sends this process on in between does not help it


class StuckPictures:
    """A data set of which one picture is never there, the first time that anybody asks."""

    num_classes = 2

    def __init__(self, train: bool, stuck: int = -1, mark: str = "") -> None:
        self.stuck, self.mark = (stuck if train else -1), Path(mark)
        self.targets = [i % 2 for i in range(240)]

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        if index == self.stuck and not self.mark.exists():
            self.mark.touch()
            hang("deadlock")
        generator = torch.Generator().manual_seed(index)
        return torch.rand(3, 12, 12, generator=generator), self.targets[index]
