"""Take a data set's arrays as a whole, where its items are known to be their rows and no more.

They are for torchvision's own classes, for a data set that says so (`items_are_data = True`), and
where every item has been compared. Anything else would ignore what `__len__` and `__getitem__` do.
"""

import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dist_train.data.pictures import Pictures
from dist_train.data.torchvision_sets import ARRAYS, CHANNELS_FIRST, own_name

MARK = "items_are_data"
MOST_COMPARED = 100_000  # items of a split: a second or two
TRANSFORMS = ("transform", "transforms", "target_transform")


def whole_arrays(dataset: Any) -> Pictures | str:
    """Return the pictures of a data set, or why they are not taken whole: what it has or does.

    Whether they are does not depend on chance, as long as random items draw from the generators
    of torch, NumPy and Python.
    """
    known = own_name(type(dataset))
    if any(getattr(dataset, name, None) is not None for name in TRANSFORMS):
        return "has a transform"
    names = ARRAYS.get(known or "", ("data", "targets"))
    data, targets = (getattr(dataset, name, None) for name in names)
    if not isinstance(data, np.ndarray | Tensor) or targets is None:
        return "does not keep its images in an array .data and its labels in .targets"
    images, labels = np.asarray(data), np.asarray(targets)
    if known in CHANNELS_FIRST:
        images = np.ascontiguousarray(images.transpose(0, 2, 3, 1))
    if images.ndim == 3:
        images = images[..., None]
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] > 4:
        return f"has .data of {images.dtype} and shape {tuple(np.shape(data))}"
    if len(dataset) != len(images):
        return f"has {len(dataset)} items, and .data {len(images)}"
    pictures = Pictures(images=images, labels=labels)
    if known in ARRAYS or _marked(dataset):
        return pictures
    return _why_not_its_items(dataset, pictures) or pictures


def _marked(dataset: Any) -> bool:
    """Say whether the data set itself, or its very class, is marked: no other may pass it on."""
    own = getattr(dataset, "__dict__", {})
    return own.get(MARK, vars(type(dataset)).get(MARK)) is True


def _why_not_its_items(dataset: Any, pictures: Pictures) -> str | None:
    """Compare every item with its row; None: they are the same."""
    images, labels = pictures.images, pictures.labels
    if labels.shape != (len(images),):
        return None  # refused for that
    if len(dataset) > MOST_COMPARED:
        return (
            f"has {len(dataset):,} items, too many to compare with .data and .targets (an "
            f"attribute {MARK} = True says that they are the same)"
        )
    before = _generators()
    try:
        for index, (image, label) in enumerate(zip(images, labels, strict=True)):
            if not _is_item(dataset[index], image, label):
                return f"has an item {index} that is not (.data[{index}], .targets[{index}])"
        return None if _same(before, _generators()) else "draws random numbers for its items"
    except (Exception, SystemExit) as error:  # told where the items are read
        return f"has items that cannot be compared with .data ({type(error).__name__})"
    finally:
        _restore(before)


def _is_item(item: Any, image: np.ndarray, label: Any) -> bool:
    if not isinstance(item, Sequence) or len(item) != 2:
        return False
    picture = item[0]
    if not isinstance(picture, Image.Image | np.ndarray | Tensor):
        return False
    pixels = np.asarray(picture)
    if pixels.dtype != np.uint8 or pixels.size != image.size:
        return False
    rows = pixels if pixels.ndim == 2 or pixels.shape == image.shape else pixels.transpose(1, 2, 0)
    return np.array_equal(rows.reshape(image.shape), image) and bool(item[1] == label)


def _generators() -> tuple[Any, ...]:
    return torch.default_generator.get_state(), np.random.get_state(), random.getstate()


def _same(before: tuple[Any, ...], now: tuple[Any, ...]) -> bool:
    numpy_before, numpy_now = before[1], now[1]
    return (
        torch.equal(before[0], now[0])
        and np.array_equal(numpy_before[1], numpy_now[1])
        and numpy_before[2:] == numpy_now[2:]
        and before[2] == now[2]
    )


def _restore(states: tuple[Any, ...]) -> None:
    torch.default_generator.set_state(states[0])
    np.random.set_state(states[1])
    random.setstate(states[2])
