"""Pictures that DataLoader workers open one by one; an item is a function of (index, seed)."""

import os
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from dist_train.config.augmentation import parts_in_force
from dist_train.config.schema import ConfigError, DataConfig
from dist_train.config.user_code import UserCodeError, is_of_machine, told
from dist_train.data.decode import largest_of_deep, read_rgb, why_unreadable
from dist_train.data.folder_scan import PictureFile
from dist_train.data.pictures import Pictures
from dist_train.data.user_item import form, image_and_label

Size = tuple[int, int]  # (height, width), pixels


@dataclass(frozen=True, kw_only=True, slots=True)
class Look:
    """What a picture is before it is made ready."""

    size: Size
    is_float: bool  # a float tensor
    largest: int | None  # pixel, of a PIL image of 16 bits


class Items(Protocol):
    """A map-style data set of (picture, label)."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> Any: ...


class FileItems:
    """Picture files, opened when they are asked for."""

    def __init__(self, root: Path, files: Sequence[PictureFile]) -> None:
        self._root = str(root)
        # arrays, not lists: counting references would copy every page into every worker
        self.paths = np.array([os.fsencode(file.path) for file in files])  # below the root
        self.labels = np.array([file.label for file in files], dtype=np.int64)

    def __len__(self) -> int:
        return len(self.paths)

    def path(self, index: int) -> str:
        """Return where a file is."""
        return os.path.join(self._root, os.fsdecode(self.paths[index]))

    def __getitem__(self, index: int, /) -> tuple[Image.Image, int]:
        path = self.path(index)
        try:
            return read_rgb(path), int(self.labels[index])
        except Exception as error:  # Pillow's plugins raise nearly anything for a broken file
            if is_of_machine(error):
                raise
            raise ConfigError(
                f"{path} {why_unreadable(error)}, and could be when the run began: "
                "copy it again and start the same command"
            ) from error


class ArrayItems:
    """Pictures in memory, one by one."""

    def __init__(self, pictures: Pictures) -> None:
        self.pictures = pictures

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int, /) -> tuple[Tensor, int]:
        image = np.ascontiguousarray(self.pictures.images[index].transpose(2, 0, 1))
        return torch.tensor(image), int(self.pictures.labels[index])


class WorkerPictures(Dataset[tuple[Tensor, int]]):
    """Opens, augments or crops one picture for each key (index, seed).

    With a seed the picture is augmented for training; with None it is made for evaluation. Pictures
    are brought to image_size, until `keep_size` is called.
    """

    def __init__(
        self, items: Items, config: DataConfig, *, num_classes: int, size: Size | str | None = None
    ) -> None:
        """Take items as they are.

        Args:
            items: of one split.
            config: what is `in_force`.
            num_classes: labels are below it.
            size: of every picture; a text that names two that differ; None: not known.
        """
        self.items = items
        self.size = size
        self._config = config
        self._num_classes = num_classes
        self._kept: Size | None = None
        # By whether they are for evaluation: the first image's index, shape and type.
        self._alike: dict[bool, tuple[int, torch.Size, torch.dtype]] = {}
        self._training, self._evaluation = _transforms(config, None)

    def keep_size(self, size: Size) -> None:
        """Leave pictures at the size that all have; another one is refused when it is met.

        Raises:
            ConfigError: the crop that is asked for is too wide for them.
        """
        padding = self._config.crop_padding
        if "crop" in parts_in_force(self._config, self._config.name) and padding >= min(size):
            raise ConfigError(
                f"data.crop_padding={padding} is too much for images of {shown(size)}: set it to "
                f"{min(size) - 1} or less, or data.image_size"
            )
        self._kept = size
        self._training, self._evaluation = _transforms(self._config, size)

    def look_at(self, index: int) -> Look:
        """Return what one picture is before it is made ready.

        Raises:
            ConfigError: it cannot be had.
        """
        try:
            with _seeded(index):
                item = self._item(index)
                image, _ = image_and_label(item, _named(index), num_classes=self._num_classes)
        except UserCodeError as error:
            raise ConfigError(str(error)) from error
        return Look(
            size=_size(image),
            is_float=isinstance(image, Tensor) and image.is_floating_point(),
            largest=largest_of_deep(item[0]) if isinstance(item[0], Image.Image) else None,
        )

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, key: tuple[int, int | None]) -> tuple[Tensor, int]:
        """Return the picture (channels, height, width) and its label.

        uint8 of image_size or of the size that is kept, except that a float tensor of the user's
        own passes as it is, in float32.

        Raises:
            ConfigError: the file is unreadable, or the item is of a wrong form; named.
            UserCodeError: the data set raises; the item is named.
        """
        index, seed = key
        with _seeded(index if seed is None else seed):
            image, label = self._checked(index)
            if isinstance(image, Tensor) and image.is_floating_point():
                image = image.as_subclass(Tensor)
            else:
                image = self._transformed(image, index, training=seed is not None)
        first, shape, dtype = self._alike.get(seed is None, (index, image.shape, image.dtype))
        if image.shape != shape or image.dtype != dtype:
            raise ConfigError(
                f"item {index} of the data set is a picture of {image.dtype} and shape "
                f"{tuple(image.shape)}, item {first} one of {dtype} and shape {tuple(shape)} "
                f"(channels, height, width): make all alike{_how(image, shape)}"
            )
        return image, label

    def first(self, index: int, seed: int | None) -> tuple[int, int, int]:
        """Look at one picture; those to come must be alike. Returns (c, h, w).

        Raises:
            ConfigError: it cannot be had.
        """
        try:
            image, _ = self[index, seed]
        except UserCodeError as error:
            raise ConfigError(str(error)) from error
        self._alike[seed is None] = (index, image.shape, image.dtype)
        channels, height, width = image.shape
        return channels, height, width

    def image_bytes(self) -> int:
        """Return the bytes of a picture as a worker sends it; first() has looked at one."""
        _, shape, dtype = next(iter(self._alike.values()))
        return shape.numel() * dtype.itemsize

    def _transformed(self, image: Image.Image | Tensor, index: int, *, training: bool) -> Tensor:
        if self._kept is not None and _size(image) != self._kept:
            raise ConfigError(
                f"item {index} of the data set is a picture of {shown(_size(image))} pixels (width "
                f"x height), those looked at when the run began are {shown(self._kept)}: "
                "data.image_size=N brings all to N x N, or make them alike"
            )
        try:
            made = (self._training if training else self._evaluation)(image)
        except Exception as error:  # of a form that a transform does not take
            if is_of_machine(error):
                raise
            what = f"item {index} of the data set, a picture that is {form(image)}"
            raise UserCodeError(told(f"{what}, cannot be cropped and resized", error)) from error
        return made.as_subclass(Tensor)

    def _checked(self, index: int) -> tuple[Image.Image | Tensor, int]:
        return image_and_label(self._item(index), _named(index), num_classes=self._num_classes)

    def _item(self, index: int) -> Any:
        try:
            return self.items[index]
        except (Exception, SystemExit) as error:
            if isinstance(error, ConfigError) or is_of_machine(error):
                raise
            raise UserCodeError(told(f"{_named(index)} cannot be had", error)) from error


def shown(size: Size) -> str:
    """Return a size as text: width x height."""
    return f"{size[1]}x{size[0]}"


def _named(index: int) -> str:
    return f"item {index} of the data set"


def _size(image: Image.Image | Tensor) -> Size:
    if isinstance(image, Tensor):
        return image.shape[-2], image.shape[-1]
    return image.height, image.width


def _how(image: Tensor, other: torch.Size) -> str:
    """Say how pictures can be made alike that differ in shape or type."""
    if image.shape[0] != other[0]:
        return ", in a PIL image's mode, too (image.convert('RGB'))"
    if image.shape != other:
        return " (float tensors keep the size that the data set gives them)"
    return ", uint8 or float"


def _transforms(
    config: DataConfig, kept: Size | None
) -> tuple[Callable[[Any], Any], Callable[[Any], Any]]:
    """Return what makes a training picture and what makes one for evaluation."""
    from torchvision.transforms import v2

    size = config.image_size
    parts = parts_in_force(config, config.name)
    whole: list[torch.nn.Module] = []
    if kept is None:
        whole = [v2.Resize(round(size * 256 / 224), antialias=True), v2.CenterCrop(size)]
    training: list[torch.nn.Module] = [*whole]
    if "crop" in parts and kept is None:
        training = [v2.RandomResizedCrop(size, antialias=True)]
    elif "crop" in parts and kept is not None and config.crop_padding:
        padded = v2.RandomCrop(list(kept), padding=config.crop_padding, padding_mode="reflect")
        training = [padded]
    if "flip" in parts and config.flip:
        training.append(v2.RandomHorizontalFlip())
    if config.randaugment:
        training.append(v2.RandAugment())
    return v2.Compose([*training, v2.ToImage()]), v2.Compose([*whole, v2.ToImage()])


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Seed torch's CPU, NumPy's and Python's global generators, which transforms draw from.

    Afterwards they are as before: without workers this is the training process. Not
    torch.manual_seed, which would seed the GPU's generator too.
    """
    torch_state = torch.default_generator.get_state()
    numpy_state, python_state = np.random.get_state(), random.getstate()
    torch.default_generator.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)
    try:
        yield
    finally:
        torch.default_generator.set_state(torch_state)
        np.random.set_state(numpy_state)
        random.setstate(python_state)
