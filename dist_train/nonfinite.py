"""Gradient norms that are not finite: noticed without a collective, counted, the step skipped.

The norm that decides is that of the reduced gradients, so it is equal on all ranks and agreeing
costs nothing.
"""

import math
from typing import Any

import torch
from torch import Tensor

from dist_train.config import GuardConfig
from dist_train.gradients import Buffers
from dist_train.pinned import pinned


class NonFiniteError(RuntimeError):
    """Training diverged: too many steps in a row had a gradient norm that is not finite."""

    exit_code = 93  # the same steps would diverge again


class NonFiniteGuard:
    """Reads whether a step's gradient norm was finite, and counts those that were not.

    lag=0 reads the norm at once: one wait for the device a step. lag=1 lets the fused optimizer
    skip on the device and reads its flag a step later, through pinned memory.
    """

    def __init__(
        self,
        buffers: Buffers,
        optimizer: torch.optim.Optimizer,
        scaler: torch.amp.GradScaler | None,
        config: GuardConfig,
        device: torch.device,
    ) -> None:
        self._buffers = buffers
        self._optimizer = optimizer
        self._scaler = scaler
        self._config = config
        self._on_gpu = device.type == "cuda"
        self._unread: tuple[int, Tensor, Any] | None = None  # step, host flag, its event
        self.skip_flag: Tensor | None = None  # lag=1: 0-d on the device, 1.0 if to be skipped
        self.consecutive = self._before = 0

    @torch.no_grad()
    def read(self, grad_norm: Tensor, step: int) -> list[tuple[int, bool]]:
        """Return the steps whose verdict is now known, each with whether it was finite.

        Waits for the device unless lag=1: then the answer is that of the step before, and the
        optimizer is to be called in any case; the fused kernel itself does nothing if the norm is
        not finite.

        Args:
            grad_norm: 0-d, of the reduced gradients: equal on all ranks.
            step: the step at hand.
        """
        if self._config.lag == 0:
            return [self._count(step, math.isfinite(grad_norm.item()))]  # the one wait of the step
        known = self.settle()
        self.skip_flag = (~torch.isfinite(grad_norm)).to(torch.float32)
        self._buffers.restore(self.skip_flag)
        flag = torch.empty((), dtype=torch.float32)
        flag = pinned(flag) if self._on_gpu else flag
        flag.copy_(self.skip_flag, non_blocking=True)
        event = torch.cuda.Event() if self._on_gpu else None
        if event is not None:
            event.record()
        self._unread = (step, flag, event)
        if self._scaler is None:  # what GradScaler does for fused optimizers
            self._optimizer.found_inf = self.skip_flag  # type: ignore[attr-defined] # they read it
        return known

    def settle(self) -> list[tuple[int, bool]]:
        """Read the flag that lag=1 left open, if there is one."""
        if self._unread is None:
            return []
        step, flag, event = self._unread
        self._unread = None
        if event is not None:
            event.synchronize()  # recorded a whole step ago: passed unless the device is behind
        return [self._count(step, flag.item() == 0.0)]

    def after_step(self) -> None:
        """Tidy up after the optimizer was called, or not."""
        if self._scaler is not None:
            self._scaler.update()
        elif self.skip_flag is not None:
            del self._optimizer.found_inf  # type: ignore[attr-defined] # set in read

    @property
    def exhausted(self) -> bool:
        """Whether too many steps in a row were skipped; equal on all ranks."""
        return self.consecutive > self._config.max_consecutive

    def take_back(self) -> None:
        """Do not count the last verdict: its step is repeated."""
        self.consecutive = self._before

    def reset(self) -> None:
        """Forget what was counted: the run went back."""
        self.consecutive, self._unread = 0, None

    def _count(self, step: int, finite: bool) -> tuple[int, bool]:
        self._before = self.consecutive
        self.consecutive = 0 if finite else self.consecutive + 1
        return step, finite
