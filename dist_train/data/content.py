"""A digest of what is trained and tested on: other data of the same number are noticed."""

import hashlib
import os

import numpy as np

from dist_train.data.pictures import Pictures
from dist_train.data.worker_dataset import ArrayItems, FileItems, WorkerPictures

LOOKED_AT = 1000  # images of a split, evenly spaced
DIGITS = 16


def content_of(*splits: Pictures | WorkerPictures) -> str:
    """Return a digest of the splits' labels, of names of files, and of some images or their sizes.

    Empty where a split's items are made by the user's own code: nothing can be read without it.
    """
    whole = hashlib.sha256()
    for split in splits:
        items = split if isinstance(split, Pictures) else split.items
        if isinstance(items, ArrayItems):
            items = items.pictures
        if isinstance(items, Pictures):
            whole.update(np.asarray(items.labels, dtype=np.int64).tobytes())
            for index in _some(len(items)):
                whole.update(np.asarray(items.images[index]).tobytes())
        elif isinstance(items, FileItems):
            whole.update(items.labels.tobytes())
            whole.update(b"\0".join(items.paths.tolist()))
            for index in _some(len(items)):
                whole.update(str(_size(items.path(index))).encode())
        else:
            return ""
    return whole.hexdigest()[:DIGITS]


def _some(count: int) -> range:
    return range(0, count, max(1, count // LOOKED_AT))


def _size(path: str) -> int:
    try:
        return os.stat(path).st_size
    except OSError:
        return -1
