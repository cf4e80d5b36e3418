"""Undisturbed runs, one for each configuration, and the comparison with them."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.reliability.in_ranks import train_in_rank
from tests.ranks import run_ranks
from tests.settings import metrics, small

FREE = ("attempt", "time", "memory/peak_gib")  # of a line of metrics; and everything of perf/


@dataclass(frozen=True, kw_only=True, slots=True)
class Clean:
    """What an undisturbed run ends with."""

    weights_sha256: str
    lines: list[dict[str, Any]]
    train_sec: float  # from the first line of metrics to the last


class CleanRuns:
    """Runs each configuration once and remembers the end."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._found: dict[tuple[int, tuple[str, ...]], Clean] = {}

    def of(self, world_size: int, words: tuple[str, ...], *, timeout_sec: float = 120.0) -> Clean:
        """Return the end of an undisturbed run of `words` on `world_size` ranks."""
        key = (world_size, words)
        if key not in self._found:
            folder = self._folder / f"clean_{len(self._found)}"
            folder.mkdir(parents=True)
            config = small(folder / "run", *words)
            run_ranks(train_in_rank, world_size, folder, config, (), timeout_sec=timeout_sec)
            self._found[key] = Clean(
                weights_sha256=summary_of(folder / "run")["weights_sha256"],
                lines=lines_of(folder / "run"),
                train_sec=seconds_of(folder / "run"),
            )
        return self._found[key]

    def difference(self, run_dir: Path, world_size: int, words: tuple[str, ...]) -> str | None:
        """Say how a finished run differs from the undisturbed one; None: not at all."""
        clean = self.of(world_size, words)
        summary = summary_of(run_dir)
        if summary.get("state") != "finished":
            return f"the run is not finished: {status_of(run_dir)}"
        mine, theirs = lines_of(run_dir), clean.lines
        for here, there in zip(mine, theirs, strict=False):
            if here != there:
                changed = sorted(k for k in here | there if here.get(k) != there.get(k))
                return f"metrics differ first at step {there.get('step')} in {', '.join(changed)}"
        if len(mine) != len(theirs):
            return f"metrics.jsonl has {len(mine)} lines instead of {len(theirs)}"
        if summary["weights_sha256"] != clean.weights_sha256:
            return "the final weights differ from the undisturbed run's"
        return None


def summary_of(run_dir: Path) -> dict[str, Any]:
    """Return summary.json, empty if there is none."""
    path = run_dir / "summary.json"
    return json.loads(path.read_text()) if path.is_file() else {}


def status_of(run_dir: Path) -> dict[str, Any]:
    """Return status.json, empty if there is none."""
    path = run_dir / "status.json"
    return json.loads(path.read_text()) if path.is_file() else {}


def events_of(run_dir: Path, kind: str) -> list[dict[str, Any]]:
    """Return the events of one kind."""
    path = run_dir / "events.jsonl"
    lines = path.read_text().splitlines() if path.is_file() else []
    return [event for event in map(json.loads, lines) if event["event"] == kind]


def lines_of(run_dir: Path) -> list[dict[str, Any]]:
    """Return the lines of metrics.jsonl without what may differ between two equal runs."""
    return [
        {k: v for k, v in line.items() if k not in FREE and not k.startswith("perf/")}
        for line in metrics(run_dir)
    ]


def seconds_of(run_dir: Path) -> float:
    """Return the seconds between the first and the last line of metrics."""
    times = [line["time"] for line in metrics(run_dir)]
    return times[-1] - times[0]
