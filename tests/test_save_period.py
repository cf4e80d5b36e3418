"""checkpoint.every_steps=auto: the period that loses the least, the same result, said once."""

import json
import math
import random
import signal
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from dist_train import save_period
from dist_train.config import ConfigError
from dist_train.config.compose import compose
from dist_train.save_period import SavePeriod, assumed_mtbf_sec, best_period_sec
from tests.faults import Fault, train_with
from tests.ranks import run_ranks, start_ranks_of
from tests.settings import small


def lost_share(period_sec: float, cost_sec: float, mtbf_sec: float) -> float:
    """Return the share of time lost to saves and to work done twice, by simulation."""
    dice = random.Random(0)
    useful = clock = 0.0
    while clock < 3000 * mtbf_sec:
        fails_in = dice.expovariate(1 / mtbf_sec)
        rounds = int(fails_in // (period_sec + cost_sec))
        useful += rounds * period_sec
        clock += fails_in
    return 1 - useful / clock


@pytest.mark.parametrize(("cost_sec", "mtbf_sec"), [(0.15, 60), (1, 3600), (10, 600)])
def test_no_other_period_loses_less(cost_sec: float, mtbf_sec: float) -> None:
    best = best_period_sec(cost_sec, mtbf_sec)
    lost = lost_share(best, cost_sec, mtbf_sec)
    for factor in (0.4, 0.6, 1.7, 2.5):
        assert lost < lost_share(factor * best, cost_sec, mtbf_sec), factor


def test_the_period_is_youngs_where_a_save_is_cheap_and_never_beyond_a_failure() -> None:
    assert math.isclose(best_period_sec(0.01, 86400), math.sqrt(2 * 0.01 * 86400), rel_tol=1e-3)
    assert best_period_sec(100, 10) == 10


def test_failures_are_assumed_from_the_ranks_or_given() -> None:
    assert assumed_mtbf_sec(8, None) == 24 * 3600
    assert math.isclose(assumed_mtbf_sec(1024, None), 7.9 * 3600)
    assert assumed_mtbf_sec(8, 2.0) == 7200


def test_failures_that_were_seen_count_if_they_are_more(monkeypatch: pytest.MonkeyPatch) -> None:
    quiet = SavePeriod(2, None, failures=0, failing_sec=0.0)
    assert "is assumed for 2 ranks (set checkpoint.mtbf_hours)" in quiet.decide(0.1, 0.2)
    stormy = SavePeriod(2, None, failures=10, failing_sec=600.0)
    assert "is what this run has seen (10 in 10 min)" in stormy.decide(0.1, 0.2)
    assert stormy.period_sec < quiet.period_sec / 20
    told = SavePeriod(2, 5.0, failures=1, failing_sec=1e6)
    assert "is what checkpoint.mtbf_hours says" in told.decide(0.1, 0.2)


def test_the_setting_is_a_number_auto_or_nothing() -> None:
    def of(word: str) -> Any:
        return compose([f"checkpoint.every_steps={word}"]).config.checkpoint.every_steps

    assert (of("7"), of("auto"), of("null")) == (7, "auto", None)
    for word, told in (("often", "must be a whole number or auto"), ("0", "must be at least 1")):
        with pytest.raises(ConfigError, match=told):
            of(word)
    with pytest.raises(ConfigError, match=r"checkpoint.mtbf_hours=0.* must be above 0"):
        compose(["checkpoint.mtbf_hours=0"])


def events(folder: Path, kind: str) -> list[dict[str, Any]]:
    lines = (folder / "events.jsonl").read_text().splitlines()
    return [e for e in map(json.loads, lines) if e["event"] == kind]


def train_auto(config: Any, fault: Fault | None) -> dict[str, Any]:
    """Call train(config) with a first save after the shortest time."""
    save_period.FIRST_SAVE_SEC = 0.05
    return train_with(config, fault)


AUTO = ("checkpoint.every_steps=auto", "checkpoint.mtbf_hours=0.000001", "log_every=1")


@pytest.mark.slow
def test_auto_saves_by_the_clock_survives_a_kill_and_changes_no_bit(tmp_path: Path) -> None:
    length = ("train.steps=60",)
    clean = run_ranks(train_with, 2, small(tmp_path / "clean", *length), None)[0]
    run, mark = tmp_path / "run", tmp_path / "fired"
    config = small(run, *length, *AUTO)
    fault = Fault(rank=1, step=40, place="before the step", number=signal.SIGKILL, mark=str(mark))
    start_ranks_of(train_auto, 2, config, fault)
    assert mark.exists()
    saved = [e["step"] for e in events(run, "saved")]
    assert len(saved) > 1
    again = run_ranks(train_auto, 2, config, None)[0]
    assert again["weights_sha256"] == clean["weights_sha256"]
    [resumed] = events(run, "resumed")
    assert resumed["step"] == saved[-1]
    [died] = events(run, "earlier_attempt_died")
    assert died["lasted_sec"] > 0
    told = (run / "log" / "rank0.txt").read_text()
    assert told.count("checkpoint.every_steps=auto: a save every") == 2, "once an attempt"


def agreed_saves(config: Any) -> list[int]:
    """Return the steps at which this rank was told to save."""
    from dist_train import train as loop
    from dist_train.run import Run

    steps: list[int] = []
    real = Run.save

    def save(run: Run, parts: Any, progress: Any, meter: Any, **options: Any) -> None:
        steps.append(progress.step)
        real(run, parts, progress, meter, **options)

    save_period.FIRST_SAVE_SEC = 0.05
    with mock.patch.object(Run, "save", save):
        loop.train(config)
    return steps


@pytest.mark.slow
def test_all_ranks_agree_on_the_steps_that_auto_saves(tmp_path: Path) -> None:
    steps = run_ranks(agreed_saves, 3, small(tmp_path, "train.steps=60", *AUTO))
    assert steps[0] == steps[1] == steps[2]
    assert len(steps[0]) > 2
