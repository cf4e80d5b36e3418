"""`python -m dist_train` with one fault at a chosen rank, step and place: for verify-resume.

The loop knows nothing of it: its functions are wrapped by name, in this process only, and then the
ordinary main() runs. DIST_TRAIN_FAULT holds the fault as JSON; DIST_TRAIN_RANDOM_NOTES a folder
in which each rank notes whether the training drew from Python's or NumPy's global generators.
"""

import hashlib
import json
import os
import random
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from dist_train import train as loop
from dist_train.__main__ import main
from dist_train.tasks import classification

FAULT_VARIABLE = "DIST_TRAIN_FAULT"
NOTES_VARIABLE = "DIST_TRAIN_RANDOM_NOTES"

Place = Literal[
    "before the step", "in the backward", "after the step", "in the evaluation", "in the save"
]


@dataclass(frozen=True, kw_only=True, slots=True)
class Fault:
    """Send `number` to this process on `rank` at the first visit of `place` from `step` on."""

    rank: int
    step: int
    place: Place
    number: int
    mark: str  # a file that is made when it fires


def arm(fault: Fault) -> None:
    """Wrap the function of the fault's place, for as long as this process lives."""
    step, fired = -1, False

    def fire() -> None:
        nonlocal fired
        if step >= fault.step and not fired:
            fired = True
            Path(fault.mark).touch()
            os.kill(os.getpid(), fault.number)

    def before(owner: Any, name: str) -> None:
        real: Callable[..., Any] = getattr(owner, name)

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            fire()
            return real(*args, **kwargs)

        setattr(owner, name, wrapped)

    take, train_on = loop.train_step, loop._train_on

    def begun(parts: Any, data: Any, progress: Any, *args: Any) -> bool:
        nonlocal step  # a resumed run may evaluate and save before its first step
        step = progress.step - 1
        return train_on(parts, data, progress, *args)

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal step
        step = kwargs["step"]
        if fault.place == "before the step":
            fire()
        result = take(*args, **kwargs)
        if fault.place == "after the step":
            fire()
        return result

    loop.train_step, loop._train_on = counted, begun
    if fault.place == "in the backward":
        build = loop.build_parts

        def built(*args: Any, **kwargs: Any) -> Any:
            parts = build(*args, **kwargs)
            params = parts.replica.params
            for param in params[: len(params) // 2 + 1]:  # their gradients come late: half is done
                param.register_hook(lambda gradient: fire())
            return parts

        loop.build_parts = built
    elif fault.place == "in the evaluation":
        before(classification, "eval_sums")
    elif fault.place == "in the save":
        before(os, "fsync")  # a checkpoint's first file is written, and has no name yet


def note_randomness(path: Path) -> None:
    """Write down after each step whether a global generator has moved during it."""
    take = loop.train_step

    def watched(*args: Any, **kwargs: Any) -> Any:
        first = _generators()
        result = take(*args, **kwargs)
        moved = [name for name, state in _generators().items() if state != first[name]]
        if moved:
            path.write_text(" and ".join(moved))
        return result

    loop.train_step = watched


def _generators() -> dict[str, str]:
    states = {"random": random.getstate(), "numpy.random": np.random.get_state()}
    return {
        name: hashlib.sha256(repr(state).encode()).hexdigest() for name, state in states.items()
    }


if __name__ == "__main__":
    rank = int(os.environ.get("RANK", "0"))
    if os.environ.get(NOTES_VARIABLE):
        note_randomness(Path(os.environ[NOTES_VARIABLE]) / f"rank{rank}.txt")
    if os.environ.get(FAULT_VARIABLE):
        given = Fault(**json.loads(os.environ[FAULT_VARIABLE]))
        if given.rank == rank:
            arm(given)
    sys.exit(main())
