"""Images of one size keep it, unless another is asked for; it is said which size they get."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from dist_train.config import ConfigError
from dist_train.config.augmentation import size_asked
from dist_train.config.compose import compose, to_yaml
from dist_train.config.identity import config_hash
from dist_train.data.loaders import Data, open_data
from dist_train.data.memory_loader import MemoryLoader
from dist_train.data.worker_loader import WorkerLoader
from dist_train.distributed import single_process
from dist_train.dry_run import describe
from dist_train.order import GlobalOrderSampler
from tests import own_sizes
from tests.ranks import run_ranks
from tests.settings import SMALL

NO_DATA = [word for word in SMALL if not word.startswith("data.")]
OWN = [*NO_DATA, "data.num_workers=0", "data.mean=[0.5]", "data.std=[0.25]"]


def opened(name: str, *words: str) -> Data:
    config = compose([*OWN, f"data.name=tests.own_sizes:{name}", *words]).config
    return open_data(config, single_process())


def workers(data: Data) -> WorkerLoader:
    assert isinstance(data.loader, WorkerLoader)
    return data.loader


def normalised(pixels: np.ndarray) -> torch.Tensor:
    return (torch.from_numpy(pixels)[None].float() - 255 * 0.5) / (255 * 0.25)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_images_of_one_size_reach_the_model_bit_for_bit(num_workers: int) -> None:
    data = opened("OneSize", f"data.num_workers={num_workers}", "data.val_fraction=0.2")
    assert data.image_size == "20x16, as they are"
    assert data.augmentation == "none"
    assert data.loader.image_shape == (1, 16, 20)
    train, test = own_sizes.OneSize(train=True), own_sizes.OneSize(train=False)
    indices = workers(data)._train_indices
    sampler = GlobalOrderSampler(len(indices), global_batch_size=24, rank=0, world_size=1, seed=0)
    [batch] = data.loader.train_batches(sampler, 0, 1)
    chosen = indices[sampler.take(0).indices]
    assert torch.equal(batch.images, torch.stack([normalised(train.pixels(i)) for i in chosen]))
    for split, dataset, rows in (
        ("val", train, sorted({*range(100)} - {*indices.tolist()})),
        ("test", test, range(100)),
    ):
        [(_, whole)] = data.loader.eval_batches(split, 0, 1)
        assert torch.equal(
            whole.images, torch.stack([normalised(dataset.pixels(i)) for i in rows])
        ), split


@pytest.mark.parametrize("name", ["Several", "OddInTest"])
def test_images_of_several_sizes_are_all_brought_to_one(name: str) -> None:
    data = opened(name)
    assert data.loader.image_shape == (1, 224, 224)
    assert data.image_size.startswith(
        "all are resized and centre-cropped to 224x224, as they differ: item 0 is 20x16, item "
    )
    [(_, whole)] = opened(name, "data.image_size=14").loader.eval_batches("test", 0, 1)
    assert whole.images.shape == (100, 1, 14, 14)


@pytest.mark.parametrize("size", [14, 224])
def test_a_size_that_is_asked_for_is_obeyed(size: int) -> None:
    data = opened("OneSize", f"data.image_size={size}")
    assert data.loader.image_shape == (1, size, size)
    assert data.image_size == (
        f"all are resized and centre-cropped to {size}x{size} (data.image_size) from 20x16"
    )


def test_images_that_have_the_size_asked_for_lose_no_border() -> None:
    data = opened("Square", "data.image_size=12")
    assert data.image_size == "12x12, as they are"
    [(_, whole)] = data.loader.eval_batches("test", 0, 1)
    own = own_sizes.Square(train=False)
    assert torch.equal(whole.images, torch.stack([normalised(own.pixels(i)) for i in range(100)]))
    resized = opened("Square", "data.image_size=12", "data.resize=always")
    assert resized.image_size.endswith("to 12x12 (data.resize=always)")
    [(_, cropped)] = resized.loader.eval_batches("test", 0, 1)
    assert not torch.equal(cropped.images, whole.images)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_an_item_of_another_size_that_is_met_later_is_named(num_workers: int) -> None:
    data = opened("OneOdd", f"data.num_workers={num_workers}", "data.val_fraction=0")
    sampler = GlobalOrderSampler(100, global_batch_size=50, rank=0, world_size=1, seed=0)
    with pytest.raises(ConfigError) as raised:
        list(data.loader.train_batches(sampler, 0, 2))
    assert str(raised.value) == (
        "item 50 of the data set is a picture of 20x17 pixels (width x height), those looked at "
        "when the run began are 20x16: data.image_size=N brings all to N x N, or make them alike"
    )
    every = opened("OneOdd", "data.image_size=14", "data.val_fraction=0")
    assert len(list(every.loader.train_batches(sampler, 0, 2))) == 2


def test_float_tensors_stay_as_they_are_and_it_is_said() -> None:
    assert opened("Floats").image_size == "20x16, float tensors as they are"
    data = opened("Floats", "data.image_size=14")
    assert data.loader.image_shape == (1, 16, 20)
    assert data.image_size.endswith("data.image_size does not apply to them")
    with pytest.raises(ConfigError, match=r"item 3 .*float tensors keep the size") as raised:
        list(opened("UnevenFloats").loader.eval_batches("test", 0, 1))
    assert "convert" not in str(raised.value)


def test_a_crop_that_is_asked_for_is_that_of_images_in_memory() -> None:
    data = opened("OneSize", "data.crop_padding=3", "data.val_fraction=0")
    assert data.augmentation == "crop of +-3 pixels"
    pictures = workers(data)._train
    own = own_sizes.OneSize(train=True)
    for index in range(20):
        padded = np.pad(own.pixels(index), 3, mode="reflect")
        windows = np.lib.stride_tricks.sliding_window_view(padded, (16, 20)).reshape(-1, 16, 20)
        made = pictures[index, 1000 + index][0][0].numpy()
        assert (windows == made).all(axis=(1, 2)).any(), index
    with pytest.raises(ConfigError, match=r"crop_padding=16 is too much for images of 20x16"):
        opened("OneSize", "data.crop_padding=16")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Pictures of noise, 12 x 12, in two classes."""
    rng = np.random.default_rng(0)
    for split, num in (("train", 20), ("test", 5)):
        for name in ("a", "b"):
            (tmp_path / "root" / split / name).mkdir(parents=True)
            for i in range(num):
                image = Image.fromarray(rng.integers(0, 256, (12, 12, 3), dtype=np.uint8))
                image.save(tmp_path / "root" / split / name / f"{i:02}.png")
    return tmp_path / "root"


def of_folder(folder: Path, *words: str) -> Data:
    mine = [f"data.root={folder}", f"data.cache_dir={folder.parent / 'cache'}", *words]
    mine = [*NO_DATA, "data.name=image_folder", "data.num_workers=0", *mine]
    return open_data(compose(mine).config, single_process())


@pytest.mark.parametrize("words", ["data.loader=workers", "data.in_memory_gib=0"])
def test_a_folder_of_one_size_keeps_it_through_workers_too(folder: Path, words: str) -> None:
    data = of_folder(folder, words)
    assert isinstance(data.loader, WorkerLoader)
    assert data.image_size == of_folder(folder).image_size == "12x12, as they are"
    [(_, batch)] = data.loader.eval_batches("test", 0, 1)
    [path, *_] = sorted((folder / "test" / "a").iterdir())
    plain = torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1)
    expected = workers(data)._normalised(plain[None])[0]
    assert torch.equal(batch.images[0], expected)


def test_a_size_that_is_asked_for_is_obeyed_for_images_in_memory_too(folder: Path) -> None:
    data = of_folder(folder, "data.image_size=10")
    assert data.loader.image_shape == (3, 10, 10)
    assert "to data.image_size=10, as they are 12x12; without it" in data.remarks[-1]
    with pytest.raises(ConfigError, match=r"data.image_size=10, but those of .* are 12x12, and"):
        of_folder(folder, "data.image_size=10", "data.loader=memory")
    synthetic = [*NO_DATA, "data=synthetic", "data.args={num_train: 30, num_test: 20}"]
    data = open_data(compose([*synthetic, "data.image_size=16"]).config, single_process())
    assert data.loader.image_shape == (3, 16, 16)
    assert "as data.image_size=16 and those of synthetic (train) are 32x32" in data.remarks[-1]
    same = open_data(compose([*synthetic, "data.image_size=32"]).config, single_process())
    assert isinstance(same.loader, MemoryLoader)


def test_one_odd_picture_is_named(folder: Path) -> None:
    Image.new("RGB", (13, 12)).save(folder / "train" / "a" / "x.png")
    data = of_folder(folder)
    assert data.loader.image_shape == (3, 224, 224)
    assert "x.png is 13x12" in data.image_size
    assert "x.png is 13x12" in data.remarks[-1]


def test_it_is_said_once_what_becomes_of_16_bits(folder: Path) -> None:
    [_, told] = opened("Deep").remarks
    expected = (
        " has 16 bits: such images get three equal channels of 8 bits, value // 256, so that 65535 "
        "is white. Its largest value is 4095, so that only 4 significant bits are left: "
    )
    assert told.startswith(f"tests.own_sizes:Deep: item 0{expected}")
    assert of_folder(folder).remarks == ()
    whole = np.arange(0, 65536, 457, dtype=np.uint16)[:144].reshape(12, 12)
    for split in ("train", "test"):
        for path in folder.glob(f"{split}/b/*.png"):
            Image.fromarray(whole if split == "train" else whole // 16).save(path)
    [told] = of_folder(folder).remarks
    assert f"{folder}/train/b/" in told
    assert told.endswith("so that 65535 is white"), "all 8 bits are used"


@pytest.mark.parametrize(
    ("words", "resize", "asked"),
    [
        ([], "auto", False),
        (["data.image_size=64"], "auto", True),
        (["data.image_size=224"], "needed", True),
        (["data.image_size=224", "data.resize=always"], "always", False),
    ],
)
def test_a_size_of_the_command_is_the_users_word(
    words: list[str], resize: str, *, asked: bool, tmp_path: Path
) -> None:
    config = compose(words).config
    assert (config.data.resize, size_asked(config.data)) == (resize, asked)
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    again = compose([], config_file=tmp_path / "config.yaml").config
    assert again == config, "it names every setting, which is nobody's wish"


def test_a_file_of_the_users_own_asks_for_a_size(tmp_path: Path) -> None:
    text = "train: {epochs: 1}\ndata: {image_size: 224, augment: none}\n"
    (tmp_path / "mine.yaml").write_text(text)
    assert size_asked(compose([], config_file=tmp_path / "mine.yaml").config.data)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "sheep.yaml").write_text("name: mine:sheep\nimage_size: 224\n")
    assert size_asked(compose(["data=sheep"], config_dir=tmp_path).config.data)


def test_a_size_that_is_the_default_makes_another_run_when_it_is_asked_for() -> None:
    plain = compose(["data.name=mine:data"]).config
    asked = compose(["data.name=mine:data", "data.image_size=224"]).config
    assert config_hash(plain) != config_hash(asked)


def trained(words: list[str]) -> dict[str, Any]:
    from dist_train.train import train

    return train(compose(words).config)


def words_of(run_dir: Path, *words: str) -> list[str]:
    mine = ["data.name=tests.own_sizes:OneSize", "model.factory=tests.own_sizes:grey_net"]
    return [*OWN, *mine, "data.val_fraction=0", f"run_dir={run_dir}", "train.steps=2", *words]


def test_the_size_is_said_in_the_first_lines_in_the_summary_and_by_a_dry_run(
    tmp_path: Path,
) -> None:
    words = words_of(tmp_path / "run")
    rows = describe(compose(words).config).splitlines()
    assert "image size     20x16, as they are" in rows
    summary = run_ranks(trained, 0, words)[0]
    assert summary["image_size"] == "20x16, as they are"
    said = (tmp_path / "run" / "log" / "rank0.txt").read_text()
    assert "image size: 20x16, as they are\n" in said


def test_an_unfinished_run_of_an_earlier_version_gets_the_size_that_it_had(tmp_path: Path) -> None:
    words = words_of(tmp_path / "run")
    run_ranks(trained, 0, [*words, "data.resize=always", "data.image_size=14", "train.steps=1"])
    path = tmp_path / "run" / "config.yaml"
    values = yaml.safe_load(path.read_text())
    del values["data"]["resize"]
    path.write_text(yaml.safe_dump(values))
    (path.parent / "environment.json").write_text(json.dumps({}))
    summary = run_ranks(trained, 0, [*words, "data.image_size=14"])[0]
    assert summary["image_size"].endswith("to 14x14 (data.resize=always)")


@pytest.mark.parametrize(
    ("net", "name", "told"),
    [
        (
            "flat_net",
            "OneSize",
            "it takes images of 28x28, these are 20x16: data.image_size=28 brings them to that "
            "size",
        ),
        (
            "colour_net",
            "OneSize",
            "it takes images of 3 channels, these have 1: image.convert('RGB') gives grey images "
            "three channels",
        ),
        (
            "colour_flat_net",
            "OneSize",
            "it takes images of 32x32 and 3 channels, these are 20x16: data.image_size=32 brings "
            "them to that size (float tensors: your data set has to), and image.convert('RGB') "
            "gives grey images three channels",
        ),
        ("failing_net", "OneSize", "Make the model fit the data (model.args), or the data the"),
    ],
)
def test_a_net_that_refuses_images_is_told_what_differs(net: str, name: str, told: str) -> None:
    words = [*OWN, f"data.name=tests.own_sizes:{name}", f"model.factory=tests.own_sizes:{net}"]
    with pytest.raises(ConfigError) as raised:
        describe(compose(words).config)
    assert told in str(raised.value)
    assert ("data.image_size" in str(raised.value)) == ("data.image_size" in told)
    assert ("convert" in str(raised.value)) == ("convert" in told)
    if "data.image_size" in told and "convert" not in told:
        describe(compose([*words, "data.image_size=28"]).config)


def test_a_continued_run_refuses_images_of_another_size(tmp_path: Path) -> None:
    words = words_of(tmp_path / "run", "model.factory=tests.own_sizes:grey_net")
    run_ranks(trained, 0, [*words, "train.steps=1"])
    other = [*words, "data.name=tests.own_sizes:Square", "resume_allow=[data.name]"]
    with pytest.raises(ConfigError, match=r"trained on other data: .*image_shape 1x12x12 instead"):
        trained(other)
    allowed = [*words, "data.image_size=18", "resume_allow=[data.image_size]"]
    assert trained(allowed)["image_size"].endswith("(data.image_size) from 20x16")
