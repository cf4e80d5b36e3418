"""Which settings make another run, and which a resume may change."""

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest

from dist_train.config import Config, ConfigError, OptimConfig
from dist_train.config.compose import compose
from dist_train.config.identity import (
    NOT_IN_HASH,
    PATHS,
    check_same_run,
    config_hash,
    full_hash,
    is_free,
    run_dir_of,
)
from dist_train.config.typed import leaves

IN_HASH = {
    "seed": 1,
    "deterministic": True,
    "precision": "bf16",
    "train.global_batch_size": 64,
    "train.drop_last": False,
    "train.order": "fixed",
    "train.num_shards": 4,
    "train.early_stop_patience": 3,
    "model.factory": "a:b",
    "model.args": {"width": 3},
    "model.memory_format": "contiguous",
    "parallel.sync_batchnorm": True,
    "data.name": "cifar10",
    "data.args": {"num_train": 3},
    "data.val_fraction": 0.2,
    "data.loader": "workers",
    "data.image_size": 64,
    "data.resize": "always",
    "data.augment": "none",
    "data.crop_padding": 1,
    "data.flip": False,
    "data.cutout": 2,
    "data.randaugment": True,
    "data.mixup": 0.2,
    "data.cutmix": 0.2,
    "data.mean": (0.5,),
    "data.std": (0.5,),
    **{f"optim.{field.name}": "another" for field in dataclasses.fields(OptimConfig)},
    "eval.every_epochs": 2,
    "eval.every_steps": 2,
    "eval.views": 6,
}


def changed(key: str, value: Any) -> Config:
    """Return the defaults with one setting changed."""
    parts = key.split(".")
    if len(parts) == 1:
        return dataclasses.replace(Config(), **{key: value})
    group = dataclasses.replace(getattr(Config(), parts[0]), **{parts[1]: value})
    return dataclasses.replace(Config(), **{parts[0]: group})


def test_every_key_is_decided_in_the_hash_or_not() -> None:
    keys = {key for key, _ in leaves(Config)}
    out = {key for key in keys if is_free(key)}
    assert keys - out == set(IN_HASH)
    assert all(any(key.startswith(free) for key in out) for free in NOT_IN_HASH)


@pytest.mark.parametrize("key", IN_HASH)
def test_what_changes_the_result_makes_another_run(key: str) -> None:
    new = changed(key, IN_HASH[key])
    assert config_hash(new) != config_hash(Config())
    with pytest.raises(ConfigError) as raised:
        check_same_run(new, Config(), Path("runs/x"))
    assert f"resume_allow=[{key}]" in str(raised.value)
    check_same_run(dataclasses.replace(new, resume_allow=(key,)), Config(), Path("runs/x"))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("experiment", "other"),
        ("run_dir", "elsewhere"),
        ("threads", 3),
        ("device", "cuda"),
        ("train.epochs", 7),
        ("train.steps", 7),
        ("train.micro_batch_size", 7),
        ("parallel.sync", "ddp"),
        ("data.root", "/elsewhere"),
        ("data.num_workers", 7),
        ("checkpoint.keep_last", 7),
        ("tracking.tensorboard", True),
    ],
)
def test_what_does_not_change_the_result_makes_no_other_run(key: str, value: object) -> None:
    new = changed(key, value)
    assert config_hash(new) == config_hash(Config())
    if key not in PATHS:
        assert full_hash(new) != full_hash(Config()), "ranks must agree on it all the same"
    check_same_run(new, Config(), Path("runs/x"))


def test_the_folder_of_a_run() -> None:
    config = compose(["experiment=cifar10_tutorial"]).config
    assert re.fullmatch(r"runs/cifar10_tutorial-[0-9a-f]{8}", str(run_dir_of(config)))
    assert run_dir_of(dataclasses.replace(config, run_dir="mine")) == Path("mine")
