"""A change that should change no numbers changes none: the losses of 20 steps, written down."""

from pathlib import Path

import pytest

from dist_train.config.compose import compose
from tests.faults import train_with
from tests.ranks import run_ranks
from tests.settings import metrics

# Mean loss of steps 1-5, 6-10, 11-15 and 16-20. Another CPU or torch moves them by about 1e-6.
LOSSES = (2.32972, 2.29136, 2.24985, 2.24440)
SETTINGS = (
    "experiment=cifar10_tutorial",
    "data=synthetic",
    "data.args.num_train=480",
    "data.args.num_test=40",
    "data.args.image_size=16",
    "data.val_fraction=0",
    "train.steps=20",
    "train.global_batch_size=48",
    "optim.warmup_epochs=0",
    "log_every=5",
    "threads=1",
    "device=cpu",
    "precision=fp32",
)


@pytest.mark.parametrize("world_size", [0, 1], ids=["one process", "one rank"])
def test_golden_loss(world_size: int, tmp_path: Path) -> None:
    config = compose([*SETTINGS, f"run_dir={tmp_path}/run"]).config
    run_ranks(train_with, world_size, config, None)
    records = metrics(tmp_path / "run")
    losses = [record["train/loss"] for record in records if "train/loss" in record]
    assert losses == pytest.approx(LOSSES, abs=1e-3)
