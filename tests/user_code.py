"""Models and data sets as users write them, with the mistakes that they make in them."""

from typing import Any

import torch
from torch import Tensor, nn

from tests.nets import plain_net

NUM_ITEMS, NUM_CLASSES = 48, 4


def broken_net(num_classes: int) -> nn.Module:
    """Look for a setting that nobody gave."""
    return plain_net(num_classes, width={}["depth"])


def failing_net(num_classes: int, *, late: bool = False) -> nn.Module:
    """plain_net that raises in its forward, or late, in its backward."""
    return nn.Sequential(_Failing(late), plain_net(num_classes))


def norm_net(num_classes: int) -> nn.Module:
    """End with a BatchNorm of one value a channel and sample: one sample has no variance."""
    pooled = (nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return nn.Sequential(*pooled, nn.BatchNorm1d(8), nn.Linear(8, num_classes))


def squeezed_net(num_classes: int) -> nn.Module:
    """Drop all dimensions of one, also that of the batch."""
    return nn.Sequential(plain_net(num_classes), _Squeezed())


class _Squeezed(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.squeeze()


class _Failing(nn.Module):
    def __init__(self, late: bool) -> None:
        super().__init__()
        self.late = late
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        if not self.late:
            assert x is None
        return _FailingBackward.apply(x * self.scale)


class _FailingBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride] # as torch's
        return grad * (1 // 0)


class Items:
    """A data set of which some items, or itself, cannot be used."""

    num_classes = NUM_CLASSES

    def __init__(self, train: bool, kind: str) -> None:
        self.kind, self.train = kind, train
        self.targets = [i % NUM_CLASSES for i in range(NUM_ITEMS)]
        if kind == "closure":
            self.f = lambda image: image
        if kind == "late" and not train:
            self.targets[30] = 9

    def __len__(self) -> int:
        return NUM_ITEMS

    def __getitem__(self, index: int) -> tuple[Any, int]:
        size = 12
        if index == 3 and self.train and self.kind == "unlucky":
            raise KeyError("image")
        if index == 3 and self.train and self.kind == "uneven":
            size = 13
        image = torch.full((3, size, 12), float(index % NUM_CLASSES))
        return image, self.targets[index]
