"""Items of users' data sets: every clear form is taken, any other is told with its fix."""

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from dist_train.config.schema import ConfigError
from dist_train.data.user_item import image_and_label

GREY = np.arange(30, dtype=np.uint8).reshape(6, 5)
COLOUR = np.arange(90, dtype=np.uint8).reshape(6, 5, 3)
FIRST = COLOUR.transpose(2, 0, 1)


def taken(image: Any, label: Any = 1) -> tuple[Any, int]:
    return image_and_label((image, label), "item 3", num_classes=4)


def refusal(item: Any) -> str:
    with pytest.raises(ConfigError) as raised:
        image_and_label(item, "item 3", num_classes=4)
    assert "\n" not in str(raised.value)
    return str(raised.value)


@pytest.mark.parametrize(
    "label",
    [
        *(np.dtype(kind).type(1) for kind in ("i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "?")),
        *(torch.tensor(1, dtype=kind) for kind in (torch.uint8, torch.int16, torch.int32)),
        torch.tensor(True),
        torch.tensor([1]),
        np.array([1], dtype=np.uint16),
        np.array(1),
        True,
    ],
)
def test_whole_numbers_of_any_kind_are_labels(label: Any) -> None:
    assert taken(Image.fromarray(COLOUR), label)[1] == 1


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (COLOUR, torch.tensor(FIRST.copy())),
        (FIRST, torch.tensor(FIRST.copy())),
        (GREY, torch.tensor(GREY)[None]),
        (GREY[..., None], torch.tensor(GREY)[None]),
        (COLOUR / 255, torch.tensor(FIRST / 255).float()),
        (torch.tensor(FIRST / 255), torch.tensor(FIRST / 255).float()),
        (torch.tensor(FIRST / 255).half(), torch.tensor(FIRST / 255).half().float()),
        (torch.tensor(FIRST / 255).bfloat16(), torch.tensor(FIRST / 255).bfloat16().float()),
        ((FIRST / 255).astype(np.float16), torch.tensor((FIRST / 255).astype("f2")).float()),
    ],
)
def test_arrays_and_tensors_of_a_clear_form_are_images(image: Any, expected: torch.Tensor) -> None:
    found, _ = taken(image)
    assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
    assert torch.equal(found, expected)


def test_deep_images_are_scaled_and_keep_their_values() -> None:
    deep = Image.fromarray(GREY.astype(np.uint16) * 257)
    assert deep.mode == "I;16"
    found, _ = taken(deep)
    assert found.mode == "RGB"
    assert np.array_equal(np.asarray(found)[..., 0], GREY)


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_ordinary_images_are_left_alone(mode: str) -> None:
    image = Image.fromarray(COLOUR).convert(mode)
    assert taken(image)[0] is image


@pytest.mark.parametrize(
    ("item", "told"),
    [
        ((Image.new("I", (5, 6)), 1), "(mode I) have no agreed white: scale it to 8 bits, or"),
        ((Image.new("F", (5, 6)), 1), "(mode F) have no agreed white: scale it to 8 bits, or"),
        (
            {"image": COLOUR, "label": 1},
            "item 3 is a dict of 'image', 'label', not (picture, label): return the two values",
        ),
        ((COLOUR, np.eye(4)[1]), "is no whole number: return the number of the class, for one-hot"),
        ((COLOUR, "cat"), "its label 'cat' is no whole number: number the classes, and give"),
        ((COLOUR, 1.0), "its label 1.0 is no whole number: return int(label)"),
        ((COLOUR, 4), "has label 4, outside 0..3"),
        ((COLOUR, 1, 2), "a tuple of (ndarray, int, int), not (picture, label)"),
        (None, "is a NoneType, not (picture, label)"),
        ((np.zeros((3, 7, 3), "u1"), 1), "shape (3, 7, 3), which does not say where its channels"),
        ((np.zeros((13, 8, 9), "f4"), 1), "shape (13, 8, 9), which does not say where its channel"),
        ((np.zeros((8, 9, 3), "i8"), 1), "a picture that is a ndarray of int64 and shape (8, 9, 3"),
        ((torch.zeros(3, 8, 9, dtype=torch.int32), 1), "a Tensor of torch.int32 and shape (3, 8, "),
        ((torch.zeros(8, 9), 1), "a Tensor of torch.float32 and shape (8, 9): return"),
        (("path.png", 1), "a picture that is a str: return a PIL image"),
    ],
)
def test_any_other_item_is_told_in_one_line(item: Any, told: str) -> None:
    assert told in refusal(item)
