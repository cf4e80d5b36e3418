"""A run that was killed or stopped ends with the bits of one that was not."""

import random
import signal
from pathlib import Path

import pytest

from tests.faults import PLACES, Fault, train_with
from tests.ranks import start_ranks_of
from tests.settings import metrics, small

STEPS = 60
KILLS = 10
HARD = (
    "model.factory=tests.nets:noisy_net",
    f"train.steps={STEPS}",
    "train.micro_batch_size=7",
    "checkpoint.every_steps=4",
    "optim.ema_decay=0.9",
    "data.mixup=0.4",
    "data.cutmix=0.4",
)


def logged(folder: Path) -> list[tuple]:
    """Return what every line of metrics says of the training itself."""
    keys = ("step", "train/loss", "train/accuracy", "eval/accuracy", "eval/loss")
    return [tuple(m.get(key) for key in keys) for m in metrics(folder)]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict]:
    """Summaries of unbroken runs, by number of ranks."""
    found = {}
    for world_size in (1, 2, 3):
        folder = tmp_path_factory.mktemp("unbroken") / "run"
        outcome = start_ranks_of(train_with, world_size, small(folder, *HARD), None)[0]
        assert outcome.error is None, outcome.trace
        found[world_size] = outcome.value | {"logged": logged(folder)}
    return found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "world_size"),
    [
        pytest.param(signal.SIGKILL, 1, id="kill -9-1"),
        pytest.param(signal.SIGKILL, 2, id="kill -9-2"),
        pytest.param(signal.SIGKILL, 3, id="kill -9-3", marks=pytest.mark.exhaustive),
        pytest.param(signal.SIGTERM, 1, id="SIGTERM-1"),
        pytest.param(signal.SIGTERM, 2, id="SIGTERM-2", marks=pytest.mark.exhaustive),
        pytest.param(signal.SIGTERM, 3, id="SIGTERM-3"),
    ],
)
def test_ten_times_stopped_equals_an_unbroken_run(
    world_size: int, number: int, undisturbed: dict[int, dict], tmp_path: Path
) -> None:
    dice = random.Random(f"{world_size} {number}")
    config = small(tmp_path / "run", *HARD)
    places = PLACES if number == signal.SIGKILL else PLACES[:4]
    for attempt, first in enumerate(sorted(dice.sample(range(1, STEPS - 8), KILLS))):
        mark = tmp_path / f"fired_{attempt}"
        place = dice.choice(places)
        # Only rank 0 saves; the two batches of the validation split go to ranks 0 and 1.
        limit = {"in the save": 1, "between manifest and rename": 1, "in the evaluation": 2}
        rank = dice.randrange(min(world_size, limit.get(place, world_size)))
        fault = Fault(rank=rank, step=first, place=place, number=number, mark=str(mark))
        outcomes = start_ranks_of(train_with, world_size, config, fault)
        assert mark.exists(), f"{fault} never fired: {outcomes}"
        if number == signal.SIGKILL:
            assert outcomes[rank].exit_code == -signal.SIGKILL
        else:
            assert {o.value["state"] for o in outcomes} == {"preempted"}, outcomes[0].trace
    last = start_ranks_of(train_with, world_size, config, None)[0]
    assert last.error is None, last.trace
    clean = undisturbed[world_size]
    assert last.value["weights_sha256"] == clean["weights_sha256"]
    assert last.value["eval_accuracy"] == clean["eval_accuracy"]
    assert last.value["best_step"] == clean["best_step"]
    assert logged(tmp_path / "run") == clean["logged"]
