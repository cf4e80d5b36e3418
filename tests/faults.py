"""Faults at a chosen (rank, step, place), inside the process; each leaves a mark when it fires."""

import os
import signal
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

PLACES = (
    "before the step",
    "after the backward",
    "after the step",
    "in the evaluation",
    "in the save",
    "between manifest and rename",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Fault:
    """Send `number` to this process on `rank` at the first visit of `place` from `step` on."""

    rank: int
    step: int
    place: str
    number: int = signal.SIGKILL
    mark: str = ""  # a file that is made when the fault fires


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
    from dist_train.parallel import Replica
    from dist_train.tasks import classification

    now = {"step": -1, "fired": False}

    def fire() -> None:
        if now["step"] >= fault.step and not now["fired"]:
            now["fired"] = True
            Path(fault.mark).touch()
            os.kill(os.getpid(), fault.number)

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
    elif fault.place == "in the save":
        around(checkpoint, "_write_file", before=True)
    elif fault.place == "between manifest and rename":
        around(
            checkpoint, "_write_file", before=False, only=lambda path, data: "manifest" in path.name
        )
