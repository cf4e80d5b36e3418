"""Which size images get: their own, if all have one and no other is asked for, else image_size."""

from collections.abc import Sequence

import numpy as np

from dist_train.config.augmentation import size_asked
from dist_train.config.schema import DataConfig
from dist_train.data.worker_dataset import Size, WorkerPictures, shown

LOOKED_AT = 32  # pictures of a split, evenly spaced, where nothing is known of the others


def other_size_asked(config: DataConfig, size: Size) -> bool:
    """Say whether images of one size are to be brought to another."""
    return size_asked(config) and size != (config.image_size, config.image_size)


def settle_size(splits: Sequence[WorkerPictures], config: DataConfig) -> tuple[str, bool]:
    """Let the splits keep the one size that all their pictures have, or bring them to image_size.

    The same pictures give the same answer on every rank and at every start: a fixed number of
    them is looked at, where nothing is known of all. One of another size is refused when it is met.

    Returns:
        (what is done and why, whether it is to resize).

    Raises:
        ConfigError: a picture that is looked at cannot be had, or its size and crop do not fit.
    """
    side = f"{config.image_size}x{config.image_size}"
    brought = f"all are resized and centre-cropped to {side}"
    if config.resize == "always":
        return f"{brought} (data.resize=always)", True
    sizes = {}  # of the first picture of each size
    for pictures in splits:
        if isinstance(pictures.size, str):
            return f"{brought}, as they differ: {pictures.size}", True
        if pictures.size is not None:
            sizes.setdefault(pictures.size, "images")
            continue
        num = len(pictures)
        for index in np.unique(np.linspace(0, num - 1, min(num, LOOKED_AT), dtype=np.int64)):
            size, is_float = pictures.size_of(int(index))
            if is_float:
                applies = "; data.image_size does not apply to them" if size_asked(config) else ""
                return f"{shown(size)}, float tensors as they are{applies}", False
            sizes.setdefault(size, f"item {index}")
    if len(sizes) > 1:
        (one, first), (other, second) = list(sizes.items())[:2]
        differing = f"{first} is {shown(one)}, {second} {shown(other)} (width x height)"
        return f"{brought}, as they differ: {differing}", True
    [size] = sizes
    if other_size_asked(config, size):
        return f"{brought} (data.image_size) from {shown(size)}", True
    for pictures in splits:
        pictures.keep_size(size)
    return f"{shown(size)}, as they are", False
