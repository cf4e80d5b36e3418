"""Data of the user's own are augmented as far as the user says so, and it is said what is done."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from dist_train.config import Config, ConfigError
from dist_train.config.augmentation import described, in_force, parts_in_force
from dist_train.config.compose import CHECKOUT, compose, to_yaml
from dist_train.config.earlier import LATER
from dist_train.config.identity import config_hash
from dist_train.config.schema import DataConfig
from dist_train.data.loaders import Data, open_data
from dist_train.data.memory_loader import MemoryLoader
from dist_train.data.worker_loader import WorkerLoader
from dist_train.distributed import single_process
from dist_train.dry_run import describe
from dist_train.order import GlobalOrderSampler
from tests.ranks import run_ranks
from tests.settings import SMALL

ALL = ("crop", "flip", "cutout")


@pytest.mark.parametrize(
    ("augment", "name", "parts"),
    [
        ("auto", "cifar10", ALL),
        ("auto", "synthetic", ALL),
        ("auto", "torchvision.datasets:CIFAR10", ALL),
        ("auto", "image_folder", ()),
        ("auto", "mine:data", ()),
        ("standard", "mine:data", ALL),
        ("none", "cifar10", ()),
        (("crop", "flip"), "cifar10", ("crop", "flip")),
        (("cutout",), "mine:data", ("cutout",)),
        ((), "cifar10", ()),
        (("auto", "flip"), "mine:data", ("flip",)),
        (("auto", "flip"), "cifar10", ALL),
    ],
)
def test_which_parts_are_done(augment: Any, name: str, parts: tuple[str, ...]) -> None:
    data = DataConfig(name=name, augment=augment, cutout=8, mixup=0.2, randaugment=True)
    assert parts_in_force(data, name) == parts
    done = in_force(data, name)
    assert (bool(done.crop_padding), bool(done.flip), bool(done.cutout)) == tuple(
        part in parts for part in ALL
    )
    assert (done.mixup > 0, done.randaugment) == (augment != "none", augment != "none")
    assert in_force(done, name) == done, "of what is settled nothing changes"


@pytest.mark.parametrize(
    ("words", "augment"),
    [
        (["data.name=mine:data"], "auto"),
        (["data.name=mine:data", "experiment=cifar10_speed"], "auto"),
        (["data.name=mine:data", "data.crop_padding=4"], ("auto", "crop")),
        (["data.name=mine:data", "data.flip=true", "data.cutout=8"], ("auto", "flip", "cutout")),
        (["data=image_folder", "data.root=mine", "data.flip=false", "data.crop_padding=0"], "auto"),
        (
            ["data=image_folder", "data.root=mine", "data.augment=standard", "data.flip=true"],
            "standard",
        ),
        (["data=image_folder", "data.root=mine", "data.augment=none", "data.flip=true"], "none"),
        (
            ["data=image_folder", "data.root=mine", "data.augment=[crop]", "data.flip=true"],
            ("crop",),
        ),
        (["data.name=cifar10", "data.crop_padding=2"], "auto"),
        (["data=synthetic", "data.crop_padding=2"], "auto"),
        (["data.root=mine", "data.crop_padding=2"], ("auto", "crop")),
    ],
)
def test_a_setting_of_the_command_is_the_users_word(words: list[str], augment: Any) -> None:
    assert compose(words).config.data.augment == augment


def test_a_setting_of_a_users_own_file_is_the_users_word(tmp_path: Path) -> None:
    for group, text in (
        ("experiment/mine", "# @package _global_\ndata:\n  cutout: 4\n"),
        ("experiment/plain", "# @package _global_\noptim:\n  lr: 0.3\n"),
        ("data/sheep", "name: mine:sheep\nflip: true\n"),
    ):
        (tmp_path / group).parent.mkdir(exist_ok=True)
        (tmp_path / f"{group}.yaml").write_text(text)

    def augment(*words: str) -> Any:
        return compose(["train.epochs=1", *words], config_dir=tmp_path).config.data.augment

    assert augment("experiment=mine", "data.name=mine:data") == ("auto", "cutout")
    assert augment("experiment=plain", "data.name=mine:data") == "auto"
    assert augment("data=sheep") == ("auto", "flip")
    assert augment("data=sheep", "experiment=mine", "data.flip=false") == ("auto", "cutout")


def test_a_config_file_decides_as_it_was_written(tmp_path: Path) -> None:
    def again(text: str, *words: str) -> Any:
        (tmp_path / "config.yaml").write_text(text)
        return compose([*words], config_file=tmp_path / "config.yaml").config.data.augment

    whole = to_yaml(compose(["data.name=mine:data"]).config)
    assert again(whole) == "auto", "it names every setting, which is nobody's wish"
    assert again(whole, "data.flip=true") == ("auto", "flip")
    own = to_yaml(compose(["data.name=mine:data", "data.flip=true"]).config)
    assert again(own) == ("auto", "flip")
    assert again(own, "data.crop_padding=3") == ("auto", "crop", "flip")
    by_hand = "train: {epochs: 1}\ndata: {name: mine:data, crop_padding: 2}\n"
    assert again(by_hand) == ("auto", "crop")
    values = yaml.safe_load(whole)
    del values["data"]["augment"]
    assert again(yaml.safe_dump(values)) == "standard", "as an earlier version trained"


def test_no_experiment_here_speaks_for_the_user_where_a_setting_is_off_by_default() -> None:
    for path in CHECKOUT.glob("*/*.yaml"):
        data = (yaml.safe_load(path.read_text()) or {}).get("data") or {}
        assert not {"randaugment", "mixup", "cutmix", "augment"} & set(data), path


def test_settings_of_a_part_do_not_move_the_folder_of_a_cifar10_run() -> None:
    one = compose(["data.crop_padding=2"]).config
    assert config_hash(one) == config_hash(compose(["data.crop_padding=2", "data.root=a"]).config)
    bare = compose(["data.name=mine:data"]).config
    assert config_hash(bare) != config_hash(
        compose(["data.name=mine:data", "data.flip=true"]).config
    )


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("data.augment=[crop,blur]", "data.augment[1]=blur is not a choice"),
        ("data.augment=non", "data.augment=non has the wrong type: it must be a list or auto or"),
        ("data.augment=true", "data.augment=True has the wrong type"),
    ],
)
def test_another_word_is_refused(words: str, told: str) -> None:
    with pytest.raises(ConfigError) as raised:
        compose([words])
    assert told in str(raised.value)


def test_what_is_done_is_said() -> None:
    data = DataConfig(augment="standard", cutout=8, mixup=0.2)
    done = in_force(data, "x")
    assert described(done, in_memory=True, resized=False) == (
        "crop of +-4 pixels, flip, cutout of 8, mixup 0.2"
    )
    assert described(done, in_memory=False, resized=False) == (
        "crop of +-4 pixels, flip, no cutout (it is for images in memory), mixup 0.2"
    )
    assert described(done, in_memory=False, resized=True) == (
        "random-resized crop to 224, flip, no cutout (it is for images in memory), mixup 0.2"
    )
    nothing = in_force(DataConfig(name="x:y"), "x:y")
    assert described(nothing, in_memory=True, resized=False) == "none"
    assert described(nothing, in_memory=False, resized=False) == "none"
    assert described(nothing, in_memory=False, resized=True) == (
        "none (resized and centre-cropped to 224 as in evaluation)"
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Pictures of noise, 12 x 12, two classes, 40 for training and 10 for the test."""
    generator = np.random.default_rng(0)
    for split, num in (("train", 20), ("test", 5)):
        for name in ("a", "b"):
            (tmp_path / "root" / split / name).mkdir(parents=True)
            for i in range(num):
                noise = generator.integers(256, size=(12, 12, 3), dtype=np.uint8)
                Image.fromarray(noise).save(tmp_path / "root" / split / name / f"{i:02}.png")
    return tmp_path / "root"


def words_of(folder: Path, *words: str) -> list[str]:
    mine = [word for word in SMALL if not word.startswith("data.")]
    mine += [f"data.root={folder}", f"data.cache_dir={folder.parent / 'cache'}"]
    mine += ["data.name=image_folder", "data.val_fraction=0", "data.image_size=12"]
    return [*mine, f"run_dir={folder.parent / 'run'}", "train.steps=2", *words]


def opened(folder: Path, *words: str) -> tuple[Config, Data]:
    config = compose(words_of(folder, "data.num_workers=0", *words)).config
    return config, open_data(config, single_process())


def differing(data: Data) -> int:
    """Return how many of a step's training images are not as evaluation would give them."""
    sampler = GlobalOrderSampler(data.num_train, global_batch_size=24, rank=0, world_size=1, seed=0)
    loader = data.loader
    assert isinstance(loader, MemoryLoader | WorkerLoader)
    [batch] = loader.train_batches(sampler, 0, 1)
    indices = sampler.take(0).indices
    if isinstance(loader, MemoryLoader):
        plain = loader._normalise(loader._images[torch.from_numpy(indices)])
    else:
        plain = loader._normalised(torch.stack([loader._train[int(i), None][0] for i in indices]))
    return int((plain != batch.images).flatten(1).any(1).sum())


@pytest.mark.parametrize("experiment", ["cifar10_tutorial", "cifar10_resnet9", "cifar10_speed"])
@pytest.mark.parametrize("loader", ["memory", "workers"])
def test_a_folder_is_trained_on_as_it_is(folder: Path, experiment: str, loader: str) -> None:
    words = [f"experiment={experiment}", "optim=sgd", f"data.loader={loader}"]
    _, data = opened(folder, *words, "precision=fp32")
    assert differing(data) == 0
    assert data.augmentation.startswith("none")


def test_a_folder_of_many_sizes_is_resized_and_centre_cropped(folder: Path) -> None:
    Image.effect_noise((30, 20), 80).convert("RGB").save(folder / "train" / "a" / "x.png")
    _, data = opened(folder)
    assert isinstance(data.loader, WorkerLoader)
    assert differing(data) == 0
    _, data = opened(folder, "data.augment=standard")
    assert differing(data) > 12
    assert data.augmentation == "random-resized crop to 12, flip"


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("data.augment=standard", "crop of +-4 pixels, flip"),
        ("data.crop_padding=2", "crop of +-2 pixels"),
        ("data.flip=true", "flip"),
        ("data.cutout=5", "cutout of 5"),
    ],
)
def test_what_the_user_asks_for_is_done(folder: Path, words: str, told: str) -> None:
    _, data = opened(folder, words)
    assert data.augmentation == told
    assert differing(data) > 5


def test_random_augmentation_of_images_in_memory_is_refused(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"randaugment=true works on single images.*is in memory"):
        opened(folder, "data.randaugment=true")


def test_a_dry_run_says_it_and_how_to_augment(folder: Path) -> None:
    def row(*words: str) -> str:
        lines = describe(compose(words_of(folder, *words)).config).splitlines()
        return next(line for line in lines if line.startswith("augmentation"))

    assert row() == "augmentation   none; data.augment=standard crops and flips"
    assert row("data.augment=none") == "augmentation   none"
    assert row("data.augment=standard") == "augmentation   crop of +-4 pixels, flip"


def trained(words: list[str]) -> dict[str, Any]:
    from dist_train.train import train

    return train(compose(words).config)


def test_a_run_says_it_in_its_first_lines_and_its_summary(folder: Path) -> None:
    summary = run_ranks(trained, 0, words_of(folder))[0]
    assert summary["augmentation"] == "none"
    said = (folder.parent / "run" / "log" / "rank0.txt").read_text()
    assert "augmentation: none; data.augment=standard crops and flips\n" in said


@pytest.mark.slow
def test_an_unfinished_run_of_an_earlier_version_is_augmented_as_it_was(folder: Path) -> None:
    words = words_of(folder)
    run_ranks(trained, 0, [*words, "data.augment=standard", "train.steps=1"])
    path = folder.parent / "run" / "config.yaml"
    values = yaml.safe_load(path.read_text())
    for key in LATER:
        group, name = key.split(".")
        del values[group][name]
    path.write_text(yaml.safe_dump(values))
    as_it_goes_on = describe(compose(words).config)
    assert "augmentation   crop of +-4 pixels, flip\n" in as_it_goes_on
    (path.parent / "environment.json").write_text(json.dumps({}))
    assert run_ranks(trained, 0, words)[0]["augmentation"] == "crop of +-4 pixels, flip"
