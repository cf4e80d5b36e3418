"""What is asked of a user's data set before anything is trained: its length, its labels."""

from typing import Any

import numpy as np
from torch.utils.data import IterableDataset

from dist_train.config.schema import ConfigError
from dist_train.config.user_code import user_code
from dist_train.data.worker_dataset import WorkerPictures

LABELS = ("targets", "labels", "_labels")  # where data sets keep them, torchvision's among them


def check_map_style(dataset: Any, call: str) -> None:
    """Raise ConfigError unless a data set has a length above 0 and items by number.

    Args:
        dataset: what the user's callable returned.
        call: how it was called, for a message.
    """
    lacks = not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__"))
    if lacks or isinstance(dataset, IterableDataset):
        raise ConfigError(
            f"{call} returns a {type(dataset).__name__}, no map-style data set: return an object "
            "with __len__ and __getitem__(index) -> (picture, label)"
        )
    with user_code(f"len() of what {call} returns fails"):
        length = len(dataset)
    if length == 0:
        raise ConfigError(f"{call} returns an empty data set")


def num_classes_of(dataset: Any, name: str) -> int | None:
    """Return one more than the largest of the labels that a data set keeps; None: it keeps none.

    Raises:
        ConfigError: they are no whole numbers.
    """
    found = _kept_labels(dataset)
    if found is None:
        return None
    attribute, labels = found
    if labels.ndim != 1 or labels.dtype.kind not in "iub":
        first = repr(labels[0].tolist()) if len(labels) else "nothing"
        raise ConfigError(
            f"data.name={name}: .{attribute} holds labels of {labels.dtype} and shape "
            f"{labels.shape} (the first: {' '.join(first.split())[:60]}): number the classes from "
            "0, one whole number for each item, or give the data set an attribute num_classes (or "
            "classes, a list of names)"
        )
    return int(labels.max()) + 1 if len(labels) else None


def check_kept_labels(dataset: Any, pictures: WorkerPictures, *, num_classes: int) -> None:
    """Look at the first item whose kept label is out of range: it is refused, if it is one.

    The item counts: what a data set keeps need not be what its items give.

    Raises:
        ConfigError: the item has a label out of range.
    """
    found = _kept_labels(dataset)
    if found is None or found[1].ndim != 1 or found[1].dtype.kind not in "iub":
        return
    labels = found[1]
    wrong = np.flatnonzero((labels < 0) | (labels >= num_classes))
    if len(labels) == len(pictures) and len(wrong) > 0:
        with user_code(f"item {wrong[0]} of the data set cannot be had"):
            pictures[int(wrong[0]), None]


def _kept_labels(dataset: Any) -> tuple[str, np.ndarray] | None:
    """Return the attribute that holds the labels, and them; None: there is none, or no array."""
    for name in LABELS:
        kept = getattr(dataset, name, None)
        if kept is not None and hasattr(kept, "__len__"):
            try:
                return name, np.asarray(kept)
            except ValueError:  # rows of several lengths
                return None
    return None
