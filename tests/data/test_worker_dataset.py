"""The DataLoader path: an item is a function of its key, and a bad one is named."""

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from dist_train.config.schema import ConfigError, DataConfig
from dist_train.data.folder_scan import PictureFile
from dist_train.data.sources import load_source
from dist_train.data.worker_dataset import FileItems, WorkerPictures


def noise(index: int) -> np.ndarray:
    return np.random.default_rng(index).integers(0, 256, (40, 50, 3), dtype=np.uint8)


class Items:
    """Pictures of a kind, some of them drawing from the global generators."""

    def __init__(self, kind: str = "pil", label: Any = 1) -> None:
        self.kind, self.label = kind, label

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> Any:
        picture = noise(index)
        if self.kind == "pil":
            return Image.fromarray(picture), self.label
        if self.kind == "uint8":
            return torch.tensor(picture).permute(2, 0, 1), self.label
        if self.kind == "random":
            value = float(torch.rand(())) + np.random.rand() + random.random()
            return torch.full((3, 4, 4), value), self.label
        if self.kind == "int32":
            return picture.astype(np.int32), self.label
        return picture, self.label


def dataset(items: Items | FileItems, **settings: Any) -> WorkerPictures:
    return WorkerPictures(items, DataConfig(image_size=16, **settings), num_classes=3)


@pytest.mark.parametrize("kind", ["pil", "uint8", "ndarray"])
@pytest.mark.parametrize("randaugment", [False, True])
@pytest.mark.parametrize("seed", [None, 5])
def test_items_are_uint8_of_image_size(kind: str, randaugment: bool, seed: int | None) -> None:
    image, label = dataset(Items(kind), randaugment=randaugment)[2, seed]
    assert type(image) is torch.Tensor
    assert (image.shape, image.dtype, label) == ((3, 16, 16), torch.uint8, 1)


@pytest.mark.parametrize("kind", ["pil", "uint8", "random"])
def test_an_item_is_a_function_of_its_key(kind: str) -> None:
    pictures = dataset(Items(kind), randaugment=True)
    first = pictures[3, 7][0]
    pictures[4, 9]
    torch.rand(3)
    assert torch.equal(pictures[3, 7][0], first)
    assert not torch.equal(pictures[3, 8][0], first)
    assert torch.equal(pictures[3, None][0], pictures[3, None][0])


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")  # as most users start workers
def test_workers_make_the_same_items() -> None:
    keys = [(index, 1000 + index) for index in range(8)]
    pictures = dataset(Items(), randaugment=True)
    here = [pictures[key][0] for key in keys]
    loader = DataLoader(
        pictures,
        batch_size=2,
        sampler=keys,
        num_workers=2,
        multiprocessing_context="fork",
    )
    assert torch.equal(torch.cat([batch[0] for batch in loader]), torch.stack(here))


def test_global_generators_are_left_alone() -> None:
    torch.manual_seed(1)
    np.random.seed(1)
    random.seed(1)
    expected = (torch.rand(2).tolist(), np.random.rand(), random.random())
    torch.manual_seed(1)
    np.random.seed(1)
    random.seed(1)
    pictures = dataset(Items("random"), randaugment=True)
    assert len({float(pictures[0, seed][0][0, 0, 0]) for seed in (None, 1, 2)}) == 3
    assert (torch.rand(2).tolist(), np.random.rand(), random.random()) == expected


def test_float_tensors_pass_as_they_are() -> None:
    image, _ = dataset(Items("random"))[0, 3]
    assert image.shape == (3, 4, 4)
    assert image.dtype == torch.float32


def test_evaluation_resizes_and_crops_the_centre() -> None:
    flat = Image.fromarray(np.full((40, 50, 3), 77, np.uint8))
    items = Items()
    items.__class__ = type("Flat", (Items,), {"__getitem__": lambda *_: (flat, 0)})
    assert dataset(items)[0, None][0].unique().tolist() == [77]


def test_without_flip_and_with_flip_differ() -> None:
    differing = [
        not torch.equal(dataset(Items())[0, s][0], dataset(Items(), flip=False)[0, s][0])
        for s in range(12)
    ]
    assert 0 < sum(differing) < 12


@pytest.mark.parametrize("label", [3, -1])
def test_a_label_out_of_range_names_the_index(label: int) -> None:
    with pytest.raises(ConfigError, match=f"item 4 .* has label {label}, outside 0..2"):
        dataset(Items(label=label))[4, None]


@pytest.mark.parametrize("label", ["cat", 1.0, None])
def test_a_label_that_is_no_number_names_the_index(label: object) -> None:
    with pytest.raises(ConfigError, match=r"item 5 .* a tuple of \(Image, "):
        dataset(Items(label=label))[5, 1]


def test_a_picture_of_a_wrong_form_names_the_index() -> None:
    with pytest.raises(ConfigError, match=r"item 6 .* a ndarray of int32 and shape \(40, 50, 3\)"):
        dataset(Items("int32"))[6, 1]


def test_an_unreadable_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "bad.png").write_text("words")
    items = FileItems(tmp_path, [PictureFile("bad.png", 0, 5, 0)])
    with pytest.raises(ConfigError, match=r"bad\.png is no picture"):
        dataset(items)[0, 1]


def test_pictures_in_memory_go_through_workers_if_asked() -> None:
    args = {"num_train": 6, "num_test": 3}
    source = load_source(DataConfig(name="synthetic", args=args, loader="workers", image_size=16))
    assert isinstance(source.train, WorkerPictures)
    image, label = source.train[4, 1]
    assert (image.shape, label) == ((3, 16, 16), 4)


def test_file_items_hold_path_and_label(tmp_path: Path) -> None:
    path = tmp_path / "ü 1.png"
    Image.fromarray(noise(1)).save(path)
    stat = path.stat()
    items = FileItems(tmp_path, [PictureFile(path.name, 2, stat.st_size, stat.st_mtime_ns)])
    image, label = items[0]
    assert label == 2
    np.testing.assert_array_equal(np.asarray(image), noise(1))
