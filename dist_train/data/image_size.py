"""Which size images get: their own, if all have one and no other is asked for, else image_size."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dist_train.config.augmentation import size_asked
from dist_train.config.schema import DataConfig
from dist_train.data.decode import deep_remark
from dist_train.data.worker_dataset import Size, WorkerPictures, shown

LOOKED_AT = 32  # pictures of a split, evenly spaced, where nothing is known of the others


@dataclass(frozen=True, kw_only=True, slots=True)
class Settled:
    """What is done to the size of all images."""

    size: str  # in words, and why
    resized: bool
    remarks: tuple[str, ...] = ()  # what else was seen, in sentences


def other_size_asked(config: DataConfig, size: Size) -> bool:
    """Say whether images of one size are to be brought to another."""
    return size_asked(config) and size != (config.image_size, config.image_size)


def settle_size(splits: Sequence[WorkerPictures], config: DataConfig) -> Settled:
    """Let the splits keep the one size that all their pictures have, or bring them to image_size.

    The same pictures give the same answer on every rank and at every start: a fixed number of
    them is looked at, where nothing is known of all. One of another size is refused when it is met.

    Raises:
        ConfigError: a picture that is looked at cannot be had, or its size and crop do not fit.
    """
    side = f"{config.image_size}x{config.image_size}"
    brought = f"all are resized and centre-cropped to {side}"
    if config.resize == "always":
        return Settled(size=f"{brought} (data.resize=always)", resized=True)
    sizes: dict[Size, str] = {}  # with the first picture of each
    remarks: tuple[str, ...] = ()
    for pictures in splits:
        if isinstance(pictures.size, str):
            return Settled(size=f"{brought}, as they differ: {pictures.size}", resized=True)
        if pictures.size is not None:
            sizes.setdefault(pictures.size, "images")
            continue
        num = len(pictures)
        for index in np.unique(np.linspace(0, num - 1, min(num, LOOKED_AT), dtype=np.int64)):
            look, name = pictures.look_at(int(index)), f"item {index}"
            if look.is_float:
                applies = "; data.image_size does not apply to them" if size_asked(config) else ""
                size = f"{shown(look.size)}, float tensors as they are{applies}"
                return Settled(size=size, resized=False)
            if look.largest is not None and not remarks:
                remarks = (deep_remark(f"{config.name}: {name}", look.largest),)
            sizes.setdefault(look.size, name)
    if len(sizes) > 1:
        (one, first), (other, second) = list(sizes.items())[:2]
        differing = f"{first} is {shown(one)}, {second} {shown(other)} (width x height)"
        text = f"{brought}, as they differ: {differing}"
        return Settled(size=text, resized=True, remarks=remarks)
    [size] = sizes
    if other_size_asked(config, size):
        text = f"{brought} (data.image_size) from {shown(size)}"
        return Settled(size=text, resized=True, remarks=remarks)
    for pictures in splits:
        pictures.keep_size(size)
    return Settled(size=f"{shown(size)}, as they are", resized=False, remarks=remarks)
