"""What differs first between two runs of one command: lines of metrics, tensors, surroundings."""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dist_train.checkpoint import load_state

OF_THE_CLOCK = ("time", "attempt", "wall_sec", "train_sec", "tracker_id", "train_images_per_sec")
# A stop in an evaluation saves the step without it, and the resume evaluates first: what comes of
# that is in metrics.jsonl and summary.json.
OF_EVALUATION = (
    "evaluated_step",
    "last_eval",
    "best_accuracy",
    "best_step",
    "evals_without_better",
)
GROUPS_OF_THE_CLOCK = ("perf", "memory")
SHOWN = 5


@dataclass(frozen=True, kw_only=True, slots=True)
class Difference:
    """The first differences found, in the order in which a person would ask."""

    first_step: int
    metric: str | None  # the first line of metrics.jsonl that differs
    last_equal_state: int | None  # step of the newest checkpoint that is the same in both
    first_other_state: int | None
    tensors: list[str]  # that differ there
    result: list[str]  # of summary.json
    surroundings: list[str]

    def lines(self) -> list[str]:
        """Return what to show."""
        told = [f"metrics.jsonl: {self.metric}"] if self.metric else []
        if self.first_other_state is not None:
            before = "no earlier one is equal"
            if self.last_equal_state is not None:
                before = f"that of step {self.last_equal_state} is equal"
            told.append(
                f"state: differs in the checkpoint of step {self.first_other_state}; {before}"
            )
            told += [f"    {tensor}" for tensor in self.tensors[:SHOWN]]
            if len(self.tensors) > SHOWN:
                told.append(f"    and {len(self.tensors) - SHOWN} more")
        return told + [f"result: {line}" for line in self.result]


def compare(first: Path, second: Path) -> Difference | None:
    """Compare two finished run folders to the bit; None if nothing but clocks differs."""
    metric, metric_step = _first_line(first, second)
    equal, other, tensors = _first_state(first, second)
    result = _result(first, second)
    if metric is None and other is None and not result:
        return None
    steps = [step for step in (metric_step, other) if step is not None]
    return Difference(
        first_step=min(steps, default=0),
        metric=metric,
        last_equal_state=equal,
        first_other_state=other,
        tensors=tensors,
        result=result,
        surroundings=_surroundings(first, second),
    )


def moved_generators(notes: Path) -> str:
    """Return which global generators the ranks drew from, or an empty text."""
    told = {path.read_text() for path in notes.glob("rank*.txt")}
    return ", ".join(sorted(told))


def _first_line(first: Path, second: Path) -> tuple[str | None, int | None]:
    mine, theirs = (_metrics(folder) for folder in (first, second))
    for a, b in zip(mine, theirs, strict=False):
        if a != b:
            keys = [key for key in a | b if a.get(key) != b.get(key)]
            what = ", ".join(f"{key} {a.get(key)} and {b.get(key)}" for key in keys[:SHOWN])
            return f"step {a.get('step')}: {what}", int(a.get("step", 0))
    if len(mine) != len(theirs):
        return f"{len(mine)} lines and {len(theirs)}", min(len(mine), len(theirs))
    return None, None


def _metrics(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [_without_clocks(json.loads(line)) for line in lines]


def _without_clocks(record: dict[str, Any]) -> dict[str, Any]:
    return {
        key: value
        for key, value in record.items()
        if key not in OF_THE_CLOCK and key.split("/")[0] not in GROUPS_OF_THE_CLOCK
    }


def _first_state(first: Path, second: Path) -> tuple[int | None, int | None, list[str]]:
    """Return the newest step of equal states, the first of other ones, and what differs there."""
    names = {path.name for path in (first / "checkpoints").glob("step_*")}
    names &= {path.name for path in (second / "checkpoints").glob("step_*")}
    equal = None
    for name in sorted(names):
        mine, theirs = (
            dict(_leaves(load_state((folder / "checkpoints" / name / "state.pt").read_bytes())))
            for folder in (first, second)
        )
        other = [
            f"{key}: {_how(mine.get(key), theirs.get(key))}"
            for key in mine | theirs
            if not _same(mine.get(key), theirs.get(key))
        ]
        if other:
            return equal, int(name[5:]), other
        equal = int(name[5:])
    return equal, None, []


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, item in value.items():
            if key not in OF_THE_CLOCK + OF_EVALUATION:
                yield from _leaves(item, f"{path}.{key}" if path else str(key))
    elif isinstance(value, list | tuple):
        for number, item in enumerate(value):
            yield from _leaves(item, f"{path}[{number}]")
    else:
        yield path, value


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        alike = a.dtype == b.dtype and a.shape == b.shape
        # As bytes: a NaN equals itself, and -0.0 is not 0.0.
        return alike and torch.equal(_bytes(a), _bytes(b))
    if isinstance(a, float) and isinstance(b, float) and math.isnan(a):
        return math.isnan(b)
    return type(a) is type(b) and bool(a == b)


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def _how(a: Any, b: Any) -> str:
    if isinstance(a, Tensor) and isinstance(b, Tensor) and a.shape == b.shape:
        gap = (a.double() - b.double()).abs().max().item()
        count = int((a != b).sum())
        return f"{count} of {a.numel()} values differ, by {gap:.3g} at most"
    return f"{a} and {b}"


def _result(first: Path, second: Path) -> list[str]:
    mine, theirs = (json.loads((f / "summary.json").read_text()) for f in (first, second))
    keys = [
        k for k in mine if k not in OF_THE_CLOCK and k != "run_dir" and mine[k] != theirs.get(k)
    ]
    return [f"{key} {mine[key]} and {theirs.get(key)}" for key in keys]


def _surroundings(first: Path, second: Path) -> list[str]:
    mine, theirs = (json.loads((f / "environment.json").read_text()) for f in (first, second))
    keys = ("torch", "python", "host", "cpu", "threads", "gpus", "world_size", "git")
    return [f"{k} {mine.get(k)} and {theirs.get(k)}" for k in keys if mine.get(k) != theirs.get(k)]
