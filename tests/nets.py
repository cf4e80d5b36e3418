"""Small networks for the tests, and wrong ones."""

import os
import random
import time
from typing import Any

import torch
from torch import Tensor, nn

from tests.faults import KINDS


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


class LastUnused(nn.Sequential):
    """A sequence whose last layer takes no part in the forward."""

    def forward(self, input: Tensor) -> Tensor:
        x = input
        for layer in list(self.children())[:-1]:
            x = layer(x)
        return x


def unused_net(num_classes: int) -> nn.Module:
    """noisy_net with parameters that no gradient reaches."""
    return LastUnused(*noisy_net(num_classes).children(), nn.Linear(5, 3))


def paced_net(num_classes: int, *, sec: float, width: int = 8) -> nn.Module:
    """noisy_net that takes so long for a forward in training, and no core meanwhile."""
    return _Paced(noisy_net(num_classes, width=width), sec)


def paced_plain_net(num_classes: int, *, sec: float, width: int = 8) -> nn.Module:
    """plain_net, likewise."""
    return _Paced(plain_net(num_classes, width=width), sec)


class _Paced(nn.Module):
    def __init__(self, inner: nn.Module, sec: float) -> None:
        super().__init__()
        self.inner, self.sec = inner, sec

    def forward(self, images: Tensor) -> Tensor:
        if self.training:
            time.sleep(self.sec)
        return self.inner(images)


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


class FailAt(nn.Module):
    """Passes pictures through; on one rank it fails in a chosen training forward of an attempt."""

    def __init__(self, kind: str, rank: int, call: int) -> None:
        super().__init__()
        own = os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0"))
        self.kind, self.call = kind, call if int(own) == rank else -1

    def forward(self, x: Tensor) -> Tensor:
        if self.training and torch.is_grad_enabled():
            self.call -= 1
            if self.call == 0:
                KINDS[self.kind]()
        return x


def failing_net(num_classes: int, *, kind: str, rank: int = 1, call: int = 5) -> nn.Module:
    """plain_net after a FailAt. The throw-away forward of the start counts as a call."""
    return nn.Sequential(FailAt(kind, rank, call), plain_net(num_classes))


class Counting(nn.Module):
    """plain_net with state that no state_dict holds: a resume cannot give it back."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.inner, self.count = plain_net(num_classes), 0

    def forward(self, x: Tensor) -> Tensor:
        self.count += self.training and torch.is_grad_enabled()
        return self.inner(x) * (1 + 0.01 * self.count)


class Drawing(nn.Module):
    """plain_net that draws from Python's own generator, which nobody seeds."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.inner = plain_net(num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x * (1 + random.random()))


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


class NowAndThen(nn.Module):
    """plain_net whose last layer takes no part in one training forward of one rank."""

    def __init__(self, num_classes: int, rank: int, call: int) -> None:
        super().__init__()
        self.inner, self.added = plain_net(num_classes), nn.Linear(num_classes, num_classes)
        own = os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0"))
        self.call = call if int(own) == rank else -1

    def forward(self, x: Tensor) -> Tensor:
        x = self.inner(x)
        if self.training and torch.is_grad_enabled():
            self.call -= 1
            if self.call == 0:
                return x
        return x + self.added(x)
