"""A data set of a user's own: coloured stripes, as arrays in memory."""

from typing import Any

import numpy as np


class Stripes:
    """Images of 12 x 12 pixels in three classes: the left half has the colour of the class."""

    num_classes = 3

    def __init__(self, *, train: bool) -> None:
        rng = np.random.default_rng(7 if train else 8)
        count = 96 if train else 30
        self.targets = np.arange(count) % self.num_classes
        self.data = rng.integers(0, 128, (count, 12, 12, 3), dtype=np.uint8)
        self.data[np.arange(count), :, :6, self.targets] += 120

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return self.data[index], int(self.targets[index])
