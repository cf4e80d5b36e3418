"""Choose the source of pictures by data.name, and check what it delivers."""

import dataclasses

import numpy as np

from dist_train.config.augmentation import in_force
from dist_train.config.schema import ConfigError, DataConfig
from dist_train.data.cache import SignOfLife, unseen
from dist_train.data.cifar10 import UnavailableError, is_unpacked, load_cifar10
from dist_train.data.image_folder import load_image_folder
from dist_train.data.image_size import other_size_asked
from dist_train.data.layouts import source_of
from dist_train.data.pictures import Pictures
from dist_train.data.splits import Source
from dist_train.data.synthetic import load_synthetic
from dist_train.data.user import load_user_source
from dist_train.data.worker_dataset import ArrayItems, WorkerPictures


def load_source(
    config: DataConfig, sign: SignOfLife = unseen, *, may_stand_in: bool = False
) -> Source:
    """Load the pictures that `data.name` means; may download and decode.

    Call it in one process of a node before the others if `needs_a_first`. Nodes may differ in what
    they find: compare names.

    Args:
        config: which source, and where.
        sign: called while pictures are decoded, by this process or the one that it waits for.
        may_stand_in: take generated pictures, with a notice, where CIFAR-10 is what no data.root
            is given for, and cannot be had.

    Raises:
        ConfigError: anything wrong with the name, the files or the labels, in one line.
    """
    if config.args and config.name in ("auto", "cifar10", "image_folder"):
        raise ConfigError(
            f"data.name={config.name} takes no data.args (given: {', '.join(config.args)}): "
            "remove them"
        )
    try:
        source = _load(config, sign)
    except UnavailableError as error:
        if not may_stand_in or config.name != "auto" or config.root is not None:
            raise
        notice = f"NOT CIFAR-10 but generated images: {error}"
        source = load_synthetic(config, notice=notice)
    for split, pictures in (("train", source.train), ("test", source.test)):
        if isinstance(pictures, Pictures):
            _check(pictures, f"{source.name} ({split})", num_classes=source.num_classes)
    odd = _image_of_another_size(source, config)
    if odd is not None and config.loader == "memory":
        raise ConfigError(
            f"data.image_size={config.image_size}, but {odd}, and data.loader=memory keeps images "
            "as they are: remove one of the two"
        )
    if config.loader != "workers" and odd is None:
        return source
    remarks = source.remarks
    if odd is not None and config.loader == "auto":
        remarks += (f"images go through workers, as data.image_size={config.image_size} and {odd}",)
    settled = in_force(config, source.name)
    return Source(
        name=source.name,
        classes=source.classes,
        train=_through_workers(source.train, settled, num_classes=source.num_classes),
        test=_through_workers(source.test, settled, num_classes=source.num_classes),
        notice=source.notice,
        remarks=remarks,
    )


def _image_of_another_size(source: Source, config: DataConfig) -> str | None:
    """Say which images in memory do not have the size that is asked for; None: all have it."""
    for split, pictures in (("train", source.train), ("test", source.test)):
        if isinstance(pictures, Pictures):
            height, width = pictures.images.shape[1:3]
            if other_size_asked(config, (height, width)):
                return f"those of {source.name} ({split}) are {width}x{height}"
    return None


def needs_a_first(config: DataConfig) -> bool:
    """Say whether one process of a node should load before the others.

    It should where something is downloaded, and where the user's own code may not expect company;
    whoever decodes pictures holds a lock meanwhile.
    """
    name = source_of(config)
    if name == "cifar10":
        return not is_unpacked(config)
    return ":" in name


def _load(config: DataConfig, sign: SignOfLife) -> Source:
    name = source_of(config)
    config = in_force(config, name)
    if ":" in name:
        return load_user_source(config)
    match name:
        case "cifar10":
            return load_cifar10(config)
        case "image_folder":
            source = load_image_folder(config, sign)
            if config.name != "auto":
                return source
            said = f"data.root={config.root} holds class folders: read as data=image_folder"
            return dataclasses.replace(source, remarks=(said, *source.remarks))
        case "synthetic":
            return load_synthetic(config)
    raise AssertionError(f"data.name={name} was checked")


def _check(pictures: Pictures, what: str, *, num_classes: int) -> None:
    images, labels = pictures.images, pictures.labels
    if len(images) == 0:
        raise ConfigError(f"{what} has no pictures: training and evaluation need some")
    if labels.shape != (len(images),):
        raise ConfigError(
            f"{what} has {len(images)} pictures but labels of shape {labels.shape}: "
            "give one label for each picture"
        )
    if labels.dtype.kind not in "iub":
        raise ConfigError(f"{what} has labels of {labels.dtype}: give whole numbers from 0")
    wrong = np.flatnonzero((labels < 0) | (labels >= num_classes))
    if len(wrong) > 0:
        raise ConfigError(
            f"{what} has label {labels[wrong[0]]} at index {wrong[0]}, outside "
            f"0..{num_classes - 1}: number the labels from 0, or give it all its classes"
        )


def _through_workers(
    pictures: Pictures | WorkerPictures, config: DataConfig, *, num_classes: int
) -> WorkerPictures:
    if isinstance(pictures, WorkerPictures):
        return pictures
    height, width = pictures.images.shape[1:3]
    items = ArrayItems(pictures)
    return WorkerPictures(items, config, num_classes=num_classes, size=(height, width))
