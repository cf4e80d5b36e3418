"""A rank of `dist-train bench` with something wrong: what benchmarks/bench_truth.py injects.

`FAULT` in the environment is a word and a number: `data 0.005` (seconds that every batch comes
late), `slow 1.5` (rank 1 computes so many times as long), `sleep 0.001` (seconds added to every
optimizer step).
"""

import os
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from dist_train.bench import worker
from dist_train.data.memory_loader import MemoryLoader

VARIABLE = "FAULT"
SLOW_RANK = "1"


class Asleep(torch.autograd.Function):
    """Sleeps in the forward and in the backward."""

    @staticmethod
    def forward(ctx: Any, images: Tensor, forward_sec: float, backward_sec: float) -> Tensor:
        ctx.sec = backward_sec
        time.sleep(forward_sec)
        return images.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        time.sleep(ctx.sec)
        return grads[0], None, None


class SleepingNet(nn.Module):
    """Takes its time and no core: so many ranks can be had on few cores."""

    def __init__(
        self, num_classes: int, forward_sec: float = 0.02, backward_sec: float = 0.04, size: int = 0
    ) -> None:
        """Make it.

        Args:
            num_classes: of the logits.
            forward_sec: how long a forward takes.
            backward_sec: how long a backward takes.
            size: parameters that are summed over the ranks, besides a few.
        """
        super().__init__()
        self.head = nn.Linear(1, num_classes)
        self.bulk = nn.Parameter(torch.zeros(size))
        self._sec = forward_sec, backward_sec

    def forward(self, images: Tensor) -> Tensor:
        """Return logits, (n, classes)."""
        small = self.head(images[:, 0, 0, :1]) + self.bulk.sum()
        return Asleep.apply(small, *self._sec)


def sleeping_net(num_classes: int, **args: Any) -> nn.Module:
    """Make it, for model.factory."""
    return SleepingNet(num_classes, **args)


def arm(word: str, amount: float) -> None:
    """Bring the fault about in this process."""
    if word == "data":
        augmented = MemoryLoader._augmented

        def late(self: Any, *args: Any) -> Any:
            time.sleep(amount)
            return augmented(self, *args)

        MemoryLoader._augmented = late  # type: ignore[method-assign] # this process is the fault
        return
    build = worker.build_parts

    def parts_with_fault(*args: Any) -> Any:
        parts = build(*args)
        if word == "sleep":
            parts.take_step = _longer(parts.take_step, amount)
        elif word == "slow" and os.environ.get("RANK") == SLOW_RANK:
            _slow_down(parts.replica.module, amount)
        return parts

    worker.build_parts = parts_with_fault


def _longer(step: Callable[[], None], sec: float) -> Callable[[], None]:
    def take() -> None:
        step()
        time.sleep(sec)

    return take


def _slow_down(module: nn.Module, factor: float) -> None:
    """Let forward and backward take `factor` times as long."""
    since = 0.0

    def begin(*_: Any) -> None:
        nonlocal since
        since = time.perf_counter()

    def rest(*_: Any) -> None:
        time.sleep((factor - 1) * (time.perf_counter() - since))
        begin()

    module.register_forward_pre_hook(begin)
    module.register_forward_hook(rest)
    next(module.parameters()).register_post_accumulate_grad_hook(rest)  # its gradient comes last


if __name__ == "__main__":
    if VARIABLE in os.environ:
        word, amount = os.environ[VARIABLE].split()
        arm(word, float(amount))
    worker.main()
    worker.leave()
