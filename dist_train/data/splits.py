"""What a source of pictures hands to the loaders."""

from dataclasses import dataclass

from dist_train.data.pictures import Pictures
from dist_train.data.worker_dataset import WorkerPictures


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """A data set in two splits, checked: what is wrong with it was refused before."""

    name: str  # cifar10 | image_folder | synthetic | package.module:callable
    classes: tuple[str, ...]
    train: Pictures | WorkerPictures
    test: Pictures | WorkerPictures
    notice: str | None = None  # a sentence that the user must see
    remarks: tuple[str, ...] = ()  # what else to say, in sentences: what was taken for what

    @property
    def num_classes(self) -> int:
        return len(self.classes)
