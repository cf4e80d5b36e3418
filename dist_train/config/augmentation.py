"""What is done to images: decided here once, from the settings and the source's name.

The settings of experiments are made for CIFAR-10, and hold for it and the generated images. Other
data are augmented as far as the user says so: `data.augment` in one word, or settings of its parts
in the command or the user's own files. Images of one size keep it, unless the user sets another.
"""

import dataclasses
from collections.abc import Collection

from dist_train.config.schema import Config, DataConfig

FULL_NAME = "torchvision.datasets:CIFAR10"
CIFAR10_OR_STAND_IN = ("auto", "cifar10", "synthetic", FULL_NAME)  # names of data
PARTS = {"data.crop_padding": "crop", "data.flip": "flip", "data.cutout": "cutout"}
SIZE = "data.image_size"
DECIDED_BY = {**dict.fromkeys(PARTS, "data.augment"), SIZE: "data.resize"}
HINT = "data.augment=standard crops and flips"


def with_own_settings(config: Config, own: Collection[str]) -> Config:
    """Return the settings with what is the user's own wish named: parts of the augmentation, size.

    Args:
        config: of the run, as composed.
        own: dotted keys that the command or a file of the user's own sets.
    """
    data, words = config.data, _words(config.data)
    if SIZE in own and data.resize == "auto" and not size_asked(data):
        data = dataclasses.replace(data, resize="needed")
        config = dataclasses.replace(config, data=data)
    if "auto" not in words or data.name in ("cifar10", "synthetic", FULL_NAME):
        return config
    wanted = [
        part
        for key, part in PARTS.items()
        if part in words or (key in own and getattr(data, key.removeprefix("data.")))
    ]
    augment = ("auto", *wanted) if wanted else "auto"
    return dataclasses.replace(config, data=dataclasses.replace(data, augment=augment))


def size_asked(data: DataConfig) -> bool:
    """Say whether images of one size are brought to image_size, if it is not theirs."""
    if data.resize == "auto":
        return data.image_size != DataConfig().image_size
    return data.resize == "needed"


def parts_in_force(data: DataConfig, name: str) -> tuple[str, ...]:
    """Return which of crop, flip and cutout training images of the source `name` may get.

    How much of each is what its own setting says.
    """
    words = _words(data)
    if "standard" in words or ("auto" in words and name in CIFAR10_OR_STAND_IN):
        return tuple(PARTS.values())
    return tuple(part for part in PARTS.values() if part in words)


def in_force(data: DataConfig, name: str) -> DataConfig:
    """Return the settings with all that is not done to training images of `name` switched off."""
    parts = parts_in_force(data, name)
    some = data.augment != "none"
    return dataclasses.replace(
        data,
        augment=parts,
        crop_padding=data.crop_padding if "crop" in parts else 0,
        flip=data.flip if "flip" in parts else False,
        cutout=data.cutout if "cutout" in parts else 0,
        randaugment=data.randaugment and some,
        mixup=data.mixup if some else 0.0,
        cutmix=data.cutmix if some else 0.0,
    )


def described(data: DataConfig, *, in_memory: bool, resized: bool) -> str:
    """Say in a few words what settings that are `in_force` do to training images.

    Args:
        data: the settings.
        in_memory: whether the images are, not opened by workers.
        resized: whether they are brought to image_size.
    """
    done = []
    if not resized and data.crop_padding:
        done.append(f"crop of +-{data.crop_padding} pixels")
    if resized and "crop" in data.augment:
        done.append(f"random-resized crop to {data.image_size}")
    if data.flip:
        done.append("alternating flip" if data.flip == "alternating" else "flip")
    if data.cutout:
        done.append(
            f"cutout of {data.cutout}" if in_memory else "no cutout (it is for images in memory)"
        )
    if data.randaugment:
        done.append("RandAugment")
    done += [f"{name} {a:g}" for name, a in (("mixup", data.mixup), ("cutmix", data.cutmix)) if a]
    if resized and "crop" not in data.augment:
        done.append(f"resized and centre-cropped to {data.image_size} as in evaluation")
        return ", ".join(done) if len(done) > 1 else f"none ({done[0]})"
    return ", ".join(done) or "none"


def hint(data: DataConfig, name: str) -> str:
    """Return what to add where nothing was decided for the source `name`, or nothing."""
    undecided = "auto" in _words(data) and not parts_in_force(data, name)
    return f"; {HINT}" if undecided and name not in CIFAR10_OR_STAND_IN else ""


def _words(data: DataConfig) -> tuple[str, ...]:
    return (data.augment,) if isinstance(data.augment, str) else data.augment
