"""Data sets of a user's own whose images go through workers: of one size, of several, some odd."""

from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn


class OneSize:
    """Grey PIL images of 20 x 16 (width x height) in two classes, without arrays to take whole."""

    num_classes = 2
    count = 100

    def __init__(self, *, train: bool) -> None:
        self.first = 0 if train else self.count

    def __len__(self) -> int:
        return self.count

    def pixels(self, index: int) -> np.ndarray:
        """Return the image as this data set has it, (height, width)."""
        height, width = self.size(index)
        rng = np.random.default_rng(self.first + index)
        return rng.integers(0, 256, (height, width), dtype=np.uint8)

    def size(self, index: int) -> tuple[int, int]:  # of others it depends on it
        return 16, 20

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return Image.fromarray(self.pixels(index)), index % 2


class Square(OneSize):
    """Of 12 x 12."""

    def size(self, index: int) -> tuple[int, int]:
        return 12, 12


class Several(OneSize):
    """Of a size that depends on the index."""

    def size(self, index: int) -> tuple[int, int]:
        return 16, 20 + index % 3


class OddInTest(OneSize):
    """The test split has another size."""

    def size(self, index: int) -> tuple[int, int]:
        return (16, 20) if self.first == 0 else (18, 20)


class OneOdd(OneSize):
    """Item 50 of the training split has another size: none of those that are looked at."""

    def size(self, index: int) -> tuple[int, int]:
        return (17, 20) if self.first + index == 50 else (16, 20)


class Deep(OneSize):
    """PIL images of 16 bits, of which 12 are used."""

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return Image.fromarray(self.pixels(index).astype(np.uint16) * 16 + 15), index % 2


class Floats(OneSize):
    """Float tensors (1, height, width)."""

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return torch.from_numpy(self.pixels(index)[None] / np.float32(255)), index % 2


class UnevenFloats(Floats):
    """One of them is wider."""

    def size(self, index: int) -> tuple[int, int]:
        return 16, 20 + (index == 3)


def grey_net(num_classes: int, *, channels: int = 1) -> nn.Module:
    """Take images of one channel and of any size."""
    layers = (nn.Conv2d(channels, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return nn.Sequential(*layers, nn.Linear(4, num_classes))


def colour_net(num_classes: int) -> nn.Module:
    """Take images of three channels."""
    return grey_net(num_classes, channels=3)


def flat_net(num_classes: int) -> nn.Module:
    """Take grey images of 28 x 28."""
    return nn.Sequential(nn.Flatten(), nn.Linear(28 * 28, num_classes))


def colour_flat_net(num_classes: int) -> nn.Module:
    """Take images of three channels and 32 x 32."""
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4 * 30 * 30, num_classes))


def failing_net(num_classes: int) -> nn.Module:
    """Take no images."""
    return nn.Sequential(nn.Flatten(), nn.Linear(5, num_classes))
