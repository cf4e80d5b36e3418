"""What a source of pictures hands to the loaders."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:  # worker_dataset imports torch; reading a folder does not need it
    from dist_train.data.worker_dataset import WorkerPictures


@dataclass(frozen=True, kw_only=True, slots=True)
class Pictures:
    """One split, decoded, all pictures of one size."""

    images: np.ndarray  # (num, height, width, channels), uint8; may be a read-only memmap
    labels: np.ndarray  # (num,), int64

    def __len__(self) -> int:
        return len(self.images)


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """A data set in two splits, checked: what is wrong with it was refused before."""

    name: str  # cifar10 | image_folder | synthetic | package.module:callable
    classes: tuple[str, ...]
    train: "Pictures | WorkerPictures"
    test: "Pictures | WorkerPictures"
    notice: str | None = None  # a sentence that the user must see
    root: str | None = None  # where the files are

    @property
    def num_classes(self) -> int:
        return len(self.classes)
