"""What a row of the campaign is, and what one trial of it is given."""

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.reliability.clean import CleanRuns

Work = Callable[["Trial"], float | None]


class BrokenPromiseError(AssertionError):
    """The promise was broken; says how."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """What a row of one long trial is asked for."""

    minutes: float | None = None  # None: the row's own
    mean_sec: float = 60.0  # between two kills of a storm


@dataclass(kw_only=True, slots=True)
class Trial:
    """One trial: everything random in it comes from `seed`."""

    seed: int
    folder: Path  # empty, its own
    clean: CleanRuns
    options: Options = field(default_factory=Options)
    fired: bool = False  # set when the fault was injected; a trial without is a failed one
    faults: int = 1  # injected in this trial; all of them count as missed if it fails
    notes: dict[str, Any] = field(default_factory=dict)
    dice: random.Random = field(default_factory=random.Random)

    def __post_init__(self) -> None:
        self.dice.seed(f"trial {self.seed}")

    def one_of(self, kinds: tuple[str, ...]) -> str:
        """Return this seed's kind: they come in turn, so that N trials hold each equally often."""
        kind = kinds[self.seed % len(kinds)]
        self.notes["kind"] = kind
        return kind


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One promise, the fault that tests it, and how often."""

    id: str
    promise: str
    injection: str
    num_trials: int
    measures: str = ""  # what the seconds are
    work: Work | None = None  # one trial; None: not built
    small: int = 1  # trials of the small form that continuous integration runs
    small_minutes: float | None = None  # a long trial's length there
    faults: int = 1  # injected by each trial
    limit_sec: float = 240.0
    needs: str = ""  # beyond what the tests need: such as "root"
    cannot_run: Callable[[], str | None] = lambda: None  # why this machine cannot, or None
    promised: bool = True  # False: the table reports the share of `noticed` faults instead
    known: str = ""  # why it is known to fail: told, and no news to continuous integration


def check(condition: object, reason: str) -> None:
    """Fail the trial with `reason` unless `condition` holds."""
    if not condition:
        raise BrokenPromiseError(reason)
