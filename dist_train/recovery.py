"""Steps whose gradients are not finite: skipped by all ranks together, and told where they began.

The norm that decides is that of the reduced gradients, so it is equal on all ranks and agreeing
costs nothing.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from dist_train.config import GuardConfig
from dist_train.distributed import Ranks


class NonFiniteError(RuntimeError):
    """Training diverged: too many steps in a row had a gradient norm that is not finite."""

    exit_code = 93  # the same steps would diverge again


class NonFiniteGuard:
    """Applies an optimizer step, or takes it back when the gradient norm is not finite.

    lag=0 reads the norm at once: one wait for the device a step. lag=1 lets the fused optimizer
    skip on the device and reads its flag a step later, through pinned memory.
    """

    def __init__(
        self,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        scaler: torch.amp.GradScaler | None,
        config: GuardConfig,
        device: torch.device,
    ) -> None:
        self._optimizer = optimizer
        self._scaler = scaler
        self._config = config
        self._buffers = [b for b in module.buffers() if b.numel() > 0]
        self._snapshot = [b.detach().clone() for b in self._buffers]
        self._pinned = device.type == "cuda"
        self._unread: tuple[int, Tensor, Any] | None = None  # step, host flag, its event
        self._skipped: list[int] = []
        self.skip_flag: Tensor | None = None  # lag=1: 0-d on the device, 1.0 if to be skipped
        self.consecutive = 0

    def before_step(self) -> None:
        """Remember the buffers: a forward that is not finite spoils running statistics."""
        if self._buffers:  # one kernel for all of them
            torch._foreach_copy_(self._snapshot, self._buffers)  # pyright: ignore[reportPrivateImportUsage] # torch's optimizers' own

    @torch.no_grad()
    def approves(self, grad_norm: Tensor, step: int) -> bool:
        """Say whether to call the optimizer; follow with `after_step`. Waits unless lag=1.

        With lag=1 the answer is always yes: the fused kernel itself does nothing if the norm is
        not finite, and what came of it is known a step later.

        Args:
            grad_norm: 0-d, of the reduced gradients: equal on all ranks.
            step: the step at hand.
        """
        if self._config.lag == 0:
            finite = math.isfinite(grad_norm.item())  # the one wait of the step
            self._count(step, finite)
            if not finite:
                self.restore_buffers()
            return finite
        self._settle()
        self.skip_flag = (~torch.isfinite(grad_norm)).to(torch.float32)
        self.restore_buffers(self.skip_flag)
        flag = torch.empty((), dtype=torch.float32, pin_memory=self._pinned)
        flag.copy_(self.skip_flag, non_blocking=True)
        event = torch.cuda.Event() if self._pinned else None
        if event is not None:
            event.record()
        self._unread = (step, flag, event)
        if self._scaler is None:  # what GradScaler does for fused optimizers
            self._optimizer.found_inf = self.skip_flag  # type: ignore[attr-defined] # they read it
        return True

    def after_step(self) -> None:
        """Tidy up after the optimizer was called, or not."""
        if self._scaler is not None:
            self._scaler.update()
        elif self.skip_flag is not None:
            del self._optimizer.found_inf  # type: ignore[attr-defined] # set in approves

    def take_skipped(self, *, settle: bool = False) -> list[int]:
        """Return the steps found skipped since the last call; `settle` reads the open flag too."""
        if settle:
            self._settle()
        skipped, self._skipped = self._skipped, []
        return skipped

    @property
    def exhausted(self) -> bool:
        """Whether too many steps in a row were skipped; equal on all ranks."""
        return self.consecutive > self._config.max_consecutive

    def restore_buffers(self, bad: Tensor | None = None) -> None:
        """Put the buffers of before_step back; with `bad` (0-d), only where it is above 0."""
        for buffer, before in zip(self._buffers, self._snapshot, strict=True):
            if bad is None:
                buffer.copy_(before)
            else:
                torch.where(bad > 0, before, buffer, out=buffer)

    def _settle(self) -> None:
        """Read the flag that lag=1 left open."""
        if self._unread is None:
            return
        step, flag, event = self._unread
        self._unread = None
        if event is not None:
            event.synchronize()  # recorded a whole step ago: passed unless the device is behind
        self._count(step, flag.item() == 0.0)

    def _count(self, step: int, finite: bool) -> None:
        self.consecutive = 0 if finite else self.consecutive + 1
        if not finite:
            self._skipped.append(step)


def diverged(
    ranks: Ranks,
    module: nn.Module,
    loss_of_batch: Callable[[], Tensor],
    step: int,
    consecutive: int,
) -> NonFiniteError:
    """Run the batch again with hooks on every rank and say where it stops being finite. Collective.

    Args:
        ranks: the ranks.
        module: the bare model.
        loss_of_batch: forwards this rank's batch through `module` and returns its loss, 0-d.
        step: the last step that was skipped.
        consecutive: how many were, in a row.
    """
    found = ranks.gather(first_non_finite(module, loss_of_batch))
    places = [f"rank {rank}: {place}" for rank, place in enumerate(found) if place is not None]
    where = places[0] if places else "no rank could repeat it on its own batch"
    return NonFiniteError(
        f"the gradient norm was not finite at step {step}, {consecutive} steps in a row; "
        f"{where}. Lower optim.lr, set optim.clip_norm, check the data of this step, or raise "
        "guards.max_consecutive"
    )


def first_non_finite(module: nn.Module, loss_of_batch: Callable[[], Tensor]) -> str | None:
    """Return the first place of a forward and backward that is not finite, or None."""
    places: list[str] = []

    def hook(name: str) -> Callable[[nn.Module, tuple[Any, ...], Any], None]:
        def look(_module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            if places:
                return
            for tensor in inputs:
                if isinstance(tensor, Tensor) and not torch.isfinite(tensor).all():
                    places.append(f"the input of layer {name!r}")
                    return
            if isinstance(output, Tensor) and not torch.isfinite(output).all():
                places.append(f"the output of layer {name!r}")

        return look

    for name, parameter in module.named_parameters():
        if not torch.isfinite(parameter).all():
            return f"the weights {name!r}"
    layers = [(n, m) for n, m in module.named_modules() if not list(m.children())]
    handles = [layer.register_forward_hook(hook(name or "model")) for name, layer in layers]
    try:
        loss = loss_of_batch()
        if places:
            return f"{places[0]} is not finite"
        if not torch.isfinite(loss):
            return "the loss is not finite although every layer's output is"
        named = [(n, p) for n, p in module.named_parameters() if p.requires_grad]
        grads = torch.autograd.grad(loss, [p for _, p in named], allow_unused=True)
        # Backward runs from the last layer to the first: the last bad one is where it began.
        for (name, _), grad in reversed(list(zip(named, grads, strict=True))):
            if grad is not None and not torch.isfinite(grad).all():
                return f"the gradient of {name!r} is not finite"
        return None
    finally:
        for handle in handles:
            handle.remove()
