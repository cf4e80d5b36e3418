"""The same command continues across versions: folders that an earlier version made."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from dist_train.checkpoint import load_state
from dist_train.checkpoint_folder import read_verified
from dist_train.config import Config, ConfigError
from dist_train.config.compose import compose
from dist_train.config.earlier import LATER, keys_missing
from dist_train.config.identity import run_dir_of
from dist_train.config.typed import flatten
from dist_train.train import train

# A run of COMMAND that an earlier version stopped at step 4, with its checkpoint.
BEGUN = Path(__file__).parent / "data" / "run_begun_earlier"
NAME = "cifar10_tutorial-2b1c47bd"
COMMAND = (
    "experiment=cifar10_tutorial",
    "data.name=tests.own_arrays:Stripes",
    "data.val_fraction=0",
    "data.crop_padding=2",
    "data.cutout=3",
    "model.factory=tests.nets:plain_net",
    "model.args={width: 4}",
    "train.global_batch_size=24",
    "optim.warmup_epochs=0",
    "optim.schedule=constant",
    "threads=1",
    "precision=fp32",
    "device=cpu",
    "log_every=2",
    "checkpoint.keep_best=false",
    "checkpoint.keep_last=1",
)

# Commands, and the folders that an earlier version (0.1.0) trained them in.
OF_CIFAR = [
    ("", "cifar10_resnet9-25dc35c3"),
    ("experiment=quickstart", "quickstart-b05a875c"),
    ("experiment=cifar10_tutorial", "cifar10_tutorial-11b71dec"),
    ("experiment=cifar10_resnet9 seed=3", "cifar10_resnet9-8803be72"),
    ("experiment=cifar10_resnet18 optim.lr=0.4 train.epochs=7", "cifar10_resnet18-b7ea4379"),
    ("experiment=cifar10_speed precision=fp32", "cifar10_speed-8cb558cf"),
    ("data=synthetic model=wide_resnet", "cifar10_resnet9-20c5ea18"),
    ("optim=adamw data.mixup=0.2 train.order=fixed", "cifar10_resnet9-316e2cc2"),
]
OF_OTHERS = [
    ("experiment=cifar10_speed", "cifar10_speed-1167da66"),
    ("data=image_folder data.root=/x", "cifar10_resnet9-31247e8c"),
    (
        "data.name=tests.own_arrays:Stripes model.factory=torchvision.models:resnet18 "
        "model.args={}",
        "cifar10_resnet9-3a2838cd",
    ),
    (
        "experiment=cifar10_tutorial data.name=tests.own_arrays:Stripes "
        "model.factory=tests.nets:plain_net",
        "cifar10_tutorial-87f374fd",
    ),
    (
        "data.name=tests.own_arrays:Stripes data.flip=true data.crop_padding=2",
        "cifar10_resnet9-1c716a7e",
    ),
    ("model.factory=tests.nets:paced_net model.args.sec=0.1", "cifar10_resnet9-1c84a7cf"),
    ("model.factory=mine:net", "cifar10_resnet9-2fe842b4"),
    ("model.factory=mine:net model.args.width=64", "cifar10_resnet9-23499154"),
    ("experiment=quickstart data.name=mine:stripes model.factory=mine:net", "quickstart-156f0178"),
    ("experiment=quickstart model.factory=mine:net model.args={}", "quickstart-724ad1ec"),
    (
        "experiment=cifar10_tutorial data.name=image_folder data.root=/d",
        "cifar10_tutorial-4e27a857",
    ),
    ("data.name=mine:data data.image_size=224", "cifar10_resnet9-956623f9"),
    ("data.name=mine:data data.image_size=96", "cifar10_resnet9-1ca8d939"),
]


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return Path("runs")


def composed(command: str) -> Config:
    return compose(command.split()).config


def weights(run_dir: Path, step: int) -> dict[str, torch.Tensor]:
    return load_state(read_verified(run_dir / "checkpoints" / f"step_{step:08}"))["model"]


@pytest.mark.parametrize(("command", "name"), OF_CIFAR)
def test_a_setting_that_came_later_does_not_move_a_run(command: str, name: str) -> None:
    assert run_dir_of(composed(command)).name == name


@pytest.mark.parametrize(("command", "name"), OF_CIFAR + OF_OTHERS)
def test_a_run_begun_by_an_earlier_version_is_found(runs: Path, command: str, name: str) -> None:
    shutil.copytree(BEGUN, runs / name)
    assert run_dir_of(composed(command)) == runs / name


def test_another_run_is_not_taken_for_an_earlier_one(runs: Path) -> None:
    for _, name in OF_CIFAR + OF_OTHERS:
        shutil.copytree(BEGUN, runs / name)
    anew = run_dir_of(composed("data.name=tests.own_arrays:Stripes data.augment=none"))
    assert not anew.exists()
    config = composed("experiment=cifar10_speed")
    shutil.rmtree(runs)
    now = run_dir_of(config)
    (now / "checkpoints").mkdir(parents=True)
    shutil.copytree(BEGUN, runs / "cifar10_speed-1167da66")
    assert run_dir_of(config) == now, "a run of this version is there"


def test_a_run_of_this_version_is_not_one_that_was_begun_earlier(runs: Path) -> None:
    train(compose([*COMMAND, "train.steps=4"]).config)
    [folder] = runs.iterdir()
    assert keys_missing(folder) == ()


def test_the_run_goes_on_as_it_was_begun(runs: Path, capsys: Any) -> None:
    shutil.copytree(BEGUN, runs / NAME)
    assert keys_missing(runs / NAME) == tuple(LATER)
    summary = train(compose([*COMMAND, "train.steps=6"]).config)
    told = capsys.readouterr().out
    assert summary["run_dir"] == str(runs / NAME)
    assert "what the command leaves open is as this run was begun: " in told
    assert "data.augment=standard" in told
    assert "parallel.sync=flat" in told, "before there was auto"
    assert f"{NAME}/checkpoints/step_00000004 at step 4" in told

    # Once more, now that config.yaml and environment.json are this version's.
    train(compose([*COMMAND, "train.steps=8"]).config)
    assert "data.augment=standard" in capsys.readouterr().out
    assert keys_missing(runs / NAME) == tuple(LATER)

    for choice in ("standard", "none"):
        others = [f"data.augment={choice}", f"run_dir={choice}", "train.steps=8"]
        train(compose([*COMMAND, *others]).config)
    # The first steps were taken on another machine: not to the bit.
    ours, same, other = (weights(d, 8) for d in (runs / NAME, Path("standard"), Path("none")))
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, same[name], rtol=1e-3, atol=1e-4)
    assert any((ours[name] - other[name]).abs().max() > 1e-2 for name in ours)


def test_a_version_between_lacked_only_what_came_after_it(
    runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a setting that is newer still, and of one that such a run already had, with a value."""
    config = compose([*COMMAND, "data.augment=none", "train.steps=4"]).config
    train(config)
    [begun] = runs.iterdir()
    (begun / "environment.json").unlink()
    text = (begun / "config.yaml").read_text()
    (begun / "config.yaml").write_text(text.replace("  memory_format: auto\n", ""))
    assert keys_missing(begun) == ("model.memory_format",)
    assert run_dir_of(config) == begun
    summary = train(compose([*COMMAND, "data.augment=none", "train.steps=6"]).config)
    assert summary["memory_format"] == "channels_last"
    assert summary["augmentation"].startswith("none")


def test_a_value_that_was_given_wins_or_is_refused(runs: Path) -> None:
    shutil.copytree(BEGUN, runs / NAME)
    words = [*COMMAND, "train.steps=6", f"run_dir={runs / NAME}", "data.augment=none"]
    with pytest.raises(ConfigError, match=r"data.augment=none \(the run has standard\)"):
        train(compose(words).config)


def test_its_settings_file_means_what_it_meant(tmp_path: Path) -> None:
    config = compose([], config_file=BEGUN / "config.yaml").config
    assert {key: flatten(config)[key] for key in LATER} == LATER
    short = tmp_path / "short.yaml"  # a user's own, which names what he wants
    short.write_text("data:\n  crop_padding: 2\n")
    config = compose(["train.epochs=1"], config_file=short).config
    assert {key: flatten(config)[key] for key in LATER} != LATER
