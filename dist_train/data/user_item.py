"""One item of a data set as (image, label): every clear form is taken, others are told in words."""

import operator
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dist_train.config.schema import ConfigError
from dist_train.data.decode import to_rgb

FEW = (1, 2, 3, 4)  # channels, where an array does not say which axis they are


def image_and_label(item: Any, what: str, *, num_classes: int) -> tuple[Image.Image | Tensor, int]:
    """Return an item's image (PIL L or RGB, or uint8 or float32 (c, h, w)) and its label.

    Args:
        item: what the data set returned.
        what: the item, for a message.
        num_classes: labels are below it.

    Raises:
        ConfigError: it is no such pair, in one line.
    """
    try:
        image, raw_label = item
    except (TypeError, ValueError):
        raise ConfigError(
            f"{what} is {form(item)}, not (picture, label): return a pair whose label is a whole "
            "number"
        ) from None
    if isinstance(item, dict):
        keys = ", ".join(repr(key) for key in item)
        raise ConfigError(
            f"{what} is a dict of {keys}, not (picture, label): return the two values as a pair"
        )
    label = whole_number(raw_label)
    if label is None:
        raise ConfigError(
            f"{what} is {form(item)}, not (picture, label): its label {_shown(raw_label)} is no "
            f"whole number: {_cure(raw_label)}"
        )
    if not 0 <= label < num_classes:
        raise ConfigError(
            f"{what} has label {label}, outside 0..{num_classes - 1}: number the labels from 0, "
            "or give it all its classes"
        )
    return _image(image, what), label


def whole_number(label: Any) -> int | None:
    """Return a whole number of any kind and width (True is 1), or None."""
    if isinstance(label, Tensor | np.ndarray) and label.ndim > 0:
        label = label.reshape(-1)[0] if label.shape == (1,) else None
    if isinstance(label, np.bool_):
        return int(label)
    try:
        return operator.index(label)
    except TypeError:
        return None


def form(thing: object) -> str:
    """Return in words what a thing is."""
    if isinstance(thing, Tensor | np.ndarray):
        return f"a {type(thing).__name__} of {thing.dtype} and shape {tuple(thing.shape)}"
    if isinstance(thing, tuple | list):
        return f"a {type(thing).__name__} of ({', '.join(type(part).__name__ for part in thing)})"
    return f"a {type(thing).__name__}"


def _shown(label: object) -> str:
    text = repr(label)
    return f"({form(label)})" if len(text) > 40 or "\n" in text else text


def _cure(label: object) -> str:
    if isinstance(label, str | bytes):
        return "number the classes, and give their names as .classes"
    if isinstance(label, Tensor | np.ndarray) and label.ndim > 0:
        return "return the number of the class, for one-hot rows int(label.argmax())"
    return "return int(label)"


def _image(image: Any, what: str) -> Image.Image | Tensor:
    if isinstance(image, Image.Image):
        if image.mode in ("L", "RGB"):
            return image
        try:
            return to_rgb(image)
        except ValueError as error:
            raise ConfigError(
                f"{what} has a PIL image that is refused: {error}: scale it to 8 bits, or return a "
                "float tensor of shape (channels, height, width)"
            ) from error
    if isinstance(image, np.ndarray):
        image = _tensor(image, what)
    if isinstance(image, Tensor) and image.ndim == 3:
        if image.is_floating_point():
            return image.detach().float()
        if image.dtype == torch.uint8:
            return image
    raise ConfigError(
        f"{what} has a picture that is {form(image)}: return a PIL image, a uint8 or float tensor "
        "of shape (channels, height, width), or such an array (uint8: 0..255)"
    )


def _tensor(image: np.ndarray, what: str) -> Tensor | np.ndarray:
    """Return an array as a tensor (c, h, w), or as it is if it can be none."""
    if image.dtype != np.uint8 and image.dtype.kind != "f":
        return image
    if image.ndim == 2:
        image = image[..., None]
    if image.ndim != 3:
        return image
    first, last = image.shape[0] in FEW, image.shape[2] in FEW
    if first == last:
        raise ConfigError(
            f"{what} has a picture that is {form(image)}, which does not say where its channels "
            "are: return a tensor of shape (channels, height, width)"
        )
    image = image.transpose(2, 0, 1) if last else image
    return torch.from_numpy(np.array(image, dtype=np.uint8 if image.dtype == np.uint8 else "f4"))
