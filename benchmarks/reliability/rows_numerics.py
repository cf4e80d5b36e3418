"""Rows D: numbers that are not finite."""

import math
import time

import torch

from benchmarks.reliability.clean import events_of, status_of
from benchmarks.reliability.faults_inside import NotFinite
from benchmarks.reliability.in_ranks import how_it_ended, trained
from benchmarks.reliability.row import Row, Trial, check
from benchmarks.reliability.rows_crash import HARD
from dist_train.checkpoint import load_state
from dist_train.checkpoint_folder import list_checkpoints, read_verified
from tests.settings import small

PLACES = ("loss", "gradient", "input")
VALUES = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}
STEPS = 30
WORDS = (*HARD, f"train.steps={STEPS}", "checkpoint.every_steps=4")


def d1(trial: Trial) -> float | None:
    """One rank's loss, gradient or input is not finite in one step."""
    where, name = trial.one_of(PLACES), trial.dice.choice(sorted(VALUES))
    world_size = 2 + trial.dice.randrange(2)
    rank, step = trial.dice.randrange(world_size), trial.dice.choice((0, 1, 9, 17, STEPS - 1))
    trial.notes |= {"value": name, "rank": rank, "step": step, "ranks": world_size}
    begin = time.monotonic()
    mark = trial.folder / "fired"
    fault = NotFinite(
        rank=rank, first=step, last=step, where=where, value=VALUES[name], mark=str(mark)
    )
    config = small(trial.folder / "run", *WORDS)
    outcomes = trained(trial.folder, config, fault, world_size=world_size)
    trial.fired = mark.exists()
    check(all(o.error is None for o in outcomes), how_it_ended(outcomes, trial.folder))
    skipped = [event["step"] for event in events_of(trial.folder / "run", "skipped_step")]
    check(skipped == [step], f"skipped steps {skipped} instead of [{step}]")
    digests = {o.value["weights_sha256"] for o in outcomes}
    check(len(digests) == 1, f"the replicas differ: {digests}")
    sec = time.monotonic() - begin
    # Another cause on another rank in the same step: skipped too, so with the same result.
    other = NotFinite(
        rank=(rank + 1) % world_size,
        first=step,
        last=step,
        where=PLACES[(PLACES.index(where) + 1) % 3],
        value=math.nan,
        mark=str(trial.folder / "fired too"),
    )
    twin = trial.folder / "twin"
    twin.mkdir()
    again = trained(twin, small(twin / "run", *WORDS), other, world_size=world_size)
    check(again[0].error is None, how_it_ended(again, twin))
    same = again[0].value["weights_sha256"] in digests
    check(same, "a step skipped for another cause on another rank leaves other weights")
    return sec


def d2(trial: Trial) -> float | None:
    """Every step from some step on is not finite."""
    where, limit = trial.dice.choice(PLACES), trial.dice.randrange(1, 5)
    rank, first = trial.dice.randrange(2), trial.dice.randrange(5, 15)
    trial.notes |= {"where": where, "rank": rank, "step": first, "limit": limit}
    mark = trial.folder / "fired"
    fault = NotFinite(
        rank=rank, first=first, last=None, where=where, value=math.nan, mark=str(mark)
    )
    words = (*WORDS, f"guards.max_consecutive={limit}", "checkpoint.every_steps=1")
    begin = time.monotonic()
    config = small(trial.folder / "run", *words)
    outcomes = trained(trial.folder, config, fault, world_size=2)
    sec = time.monotonic() - begin
    trial.fired = mark.exists()
    names = {type(o.error).__name__ for o in outcomes}
    check(names == {"NonFiniteError"}, how_it_ended(outcomes, trial.folder))
    status = status_of(trial.folder / "run")
    check((status["state"], status["exit_code"]) == ("failed", 93), f"status is {status}")
    found = list_checkpoints(trial.folder / "run" / "checkpoints")
    check(found, "no checkpoint is kept")
    for path in found:
        state = load_state(read_verified(path))
        bad = [name for name, t in _tensors(state) if not torch.isfinite(t.double()).all()]
        check(not bad, f"{path.name} holds numbers that are not finite: {bad[:3]}")
    told = str(outcomes[0].error)
    check(f"rank {rank}" in told or where == "gradient", f"the rank is not named: {told}")
    return sec


def _tensors(value: object, name: str = "") -> list[tuple[str, torch.Tensor]]:
    if isinstance(value, torch.Tensor):
        return [(name, value)] if value.is_floating_point() else []
    if isinstance(value, dict):
        return [pair for key, item in value.items() for pair in _tensors(item, f"{name}.{key}")]
    if isinstance(value, list | tuple):
        return [pair for i, item in enumerate(value) for pair in _tensors(item, f"{name}.{i}")]
    return []


ROWS = (
    Row(
        id="D1",
        promise="a loss, gradient or input that is not finite on one rank: all ranks skip that "
        "step, replicas stay equal",
        injection="NaN or infinity in loss, gradient or input of one rank at one step",
        num_trials=50,
        measures="the whole run",
        work=d1,
        small=2,
    ),
    Row(
        id="D2",
        promise="steps that stay not finite end the run with 93; no checkpoint holds a NaN",
        injection="NaN in every step from one on",
        num_trials=10,
        measures="the whole run",
        work=d2,
    ),
)
