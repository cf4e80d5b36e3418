"""A folder of pictures per class: in memory if they are of one size and fit, else by workers."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from dist_train.config.schema import ConfigError, DataConfig
from dist_train.data.cache import SignOfLife, cache_root, unseen
from dist_train.data.decode import deep_remark, largest_of_deep
from dist_train.data.folder_scan import PictureFile, scan_folder
from dist_train.data.image_size import LOOKED_AT, other_size_asked
from dist_train.data.picture_cache import Verified, verified_pictures
from dist_train.data.pictures import Pictures
from dist_train.data.splits import Source
from dist_train.data.worker_dataset import FileItems, WorkerPictures


def load_image_folder(config: DataConfig, sign: SignOfLife = unseen) -> Source:
    """Read ROOT/train/<class>/* and ROOT/test/<class>/*, every file having been decoded once.

    Args:
        config: its root, and where pictures may be kept.
        sign: called while they are decoded.

    Raises:
        ConfigError: names the folder or file that is wrong, and how to mend it.
    """
    assert config.root is not None, "checked with the settings"
    folder = scan_folder(config.root)
    verified = verified_pictures(
        folder.root,
        [*folder.train, *folder.test],
        cache_dir=cache_root(config),
        max_bytes=_max_bytes(config),
        sign=sign,
    )
    if verified.pixels is None and config.loader == "memory":
        raise ConfigError(
            f"data.loader=memory needs pictures of one size, but {verified.uneven}: "
            "use data.loader=workers, or resize them"
        )
    pixels = verified.pixels
    if other_size_asked(config, (verified.height, verified.width)) and config.loader == "auto":
        pixels = None
    splits = {}
    first_row = 0
    for split, files in (("train", folder.train), ("test", folder.test)):
        if pixels is None:
            splits[split] = WorkerPictures(
                FileItems(folder.root, files),
                config,
                num_classes=len(folder.classes),
                size=verified.uneven or (verified.height, verified.width),
            )
        else:
            rows = pixels[first_row : first_row + len(files)]
            splits[split] = Pictures(images=rows, labels=_labels(files))
        first_row += len(files)
    remarks = folder.remarks
    if pixels is None and config.loader == "auto":
        remarks += (_why_workers(config, verified, first_row),)
    remarks += _deep(folder.root, [*folder.train, *folder.test])
    return Source(name="image_folder", classes=folder.classes, remarks=remarks, **splits)


def _why_workers(config: DataConfig, verified: Verified, num: int) -> str:
    """Say why pictures are opened one by one."""
    to = f", to data.image_size={config.image_size}"
    if verified.uneven is not None:
        why = f"they differ in size: {verified.uneven}"
        cure = "images of one size are kept in memory as they are"
    elif verified.pixels is not None:
        why = f"they are {verified.width}x{verified.height}"
        cure = "without it they are kept in memory as they are"
    else:
        to = ""
        gib = num * verified.height * verified.width * 3 / 2**30
        why = f"they take {gib:.3g} GiB of memory, more than data.in_memory_gib"
        why += f"={config.in_memory_gib:g}"
        cure = "data.loader=memory keeps them there as they are"
    return f"images go through workers{to}, as {why}; {cure}"


def _deep(root: Path, files: Sequence[PictureFile]) -> tuple[str, ...]:
    """Say what becomes of images of 16 bits, if there are some among a few."""
    for index in np.unique(np.linspace(0, len(files) - 1, LOOKED_AT, dtype=np.int64)):
        path = str(root / files[index].path)
        with Image.open(path) as image:
            largest = largest_of_deep(image)
        if largest is not None:
            return (deep_remark(path, largest),)
    return ()


def _max_bytes(config: DataConfig) -> int:
    if config.loader == "workers":
        return 0
    if config.loader == "memory":
        return 2**63
    return int(config.in_memory_gib * 2**30)


def _labels(files: Sequence[PictureFile]) -> np.ndarray:
    return np.array([file.label for file in files], dtype=np.int64)
