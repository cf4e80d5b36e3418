"""Small networks for the tests, and wrong ones."""

from typing import Any

import torch
from torch import Tensor, nn


def plain_net(num_classes: int, *, width: int = 8) -> nn.Module:
    """No BatchNorm and no dropout: the same function at any number of ranks."""
    return nn.Sequential(
        nn.Conv2d(3, width, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(width, 2 * width, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(2 * width, num_classes),
    )


def noisy_net(num_classes: int, *, width: int = 8) -> nn.Module:
    """BatchNorm and dropout: what makes a resume hard."""
    return nn.Sequential(
        nn.Conv2d(3, width, 3, padding=1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.Dropout(0.2),
        nn.MaxPool2d(2),
        nn.Conv2d(width, 2 * width, 3, padding=1, bias=False),
        nn.BatchNorm2d(2 * width),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Dropout(0.2),
        nn.Linear(2 * width, num_classes),
    )


def double_net(num_classes: int) -> nn.Module:
    """plain_net in float64."""
    return _Double(plain_net(num_classes).double())


class _Double(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, images: Tensor) -> Tensor:
        return self.inner(images.double())


def no_module(num_classes: int) -> Any:
    """A factory that returns no module."""
    return "a network"


def thousand_classes(num_classes: int) -> nn.Module:
    """A factory that does not listen."""
    return plain_net(1000)


class NanAt(nn.Module):
    """Passes pictures through, and turns them to NaN in chosen forward calls."""

    def __init__(self, calls: set[int]) -> None:
        super().__init__()
        self.calls, self.count = calls, 0

    def forward(self, x: Tensor) -> Tensor:
        if self.training and torch.is_grad_enabled():
            self.count += 1
            if self.count - 1 in self.calls:
                return x * float("nan")
        return x
