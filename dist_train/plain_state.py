"""What a state may hold: tensors of ordinary types, plain values, and containers of them."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dist_train.config import ConfigError
from dist_train.state_file import DTYPES


class NotPlainError(ConfigError, TypeError):
    """A state holds what could be saved and never be read again, by the user's own code."""


Place = tuple[str | int, ...]
RULE = (
    "a checkpoint holds dictionaries, lists, plain values and tensors of ordinary types, and could "
    "not be read again"
)


def plain(value: Any, tensor: Callable[[Tensor, Place], Any], place: Place = ()) -> Any:
    """Return `value` with dictionaries and lists made anew, NumPy's numbers as Python's.

    Args:
        value: a state, or a part of one.
        tensor: what to put in a tensor's place; given the tensor and where it is.
        place: where `value` is.

    Raises:
        NotPlainError: it holds what could be saved and never be read again; says where.
    """
    if isinstance(value, Tensor):
        check_tensor(value, place)
        return tensor(value.detach(), place)
    if isinstance(value, dict):
        for key in value:
            if type(key) not in (str, int):
                raise NotPlainError(f"{shown(place)} has a key {key!r}: {RULE}")
        return {key: plain(item, tensor, (*place, key)) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item, tensor, (*place, i)) for i, item in enumerate(value)]
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or type(value) in (str, int, float, bool):
        return value
    raise NotPlainError(f"{shown(place)} is a {type(value).__name__}: {RULE}")


def check_tensor(tensor: Tensor, place: Place) -> None:
    """Raise NotPlainError if the tensor is not of an ordinary type and layout."""
    if str(tensor.dtype).removeprefix("torch.") not in DTYPES or tensor.is_quantized:
        raise NotPlainError(f"{shown(place)} is of {tensor.dtype}: {RULE}")
    if tensor.layout is not torch.strided or tensor.is_nested:
        raise NotPlainError(f"{shown(place)} is a tensor of layout {tensor.layout}: {RULE}")


def shown(place: Place) -> str:
    """Return where in a state something is, in words."""
    return "state" + "".join(f"[{key!r}]" for key in place)
