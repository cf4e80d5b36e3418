"""The model as a rank trains it: wrapped in DDP, its gradients summed over the ranks, clipped.

The one file that knows the wrappers and what differs between torch versions.
"""

import contextlib
import inspect
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from dist_train.config import ParallelConfig
from dist_train.distributed import Ranks


class Replica:
    """This rank's copy of the model, and how its gradients become those of the global batch.

    flat: every gradient is a view into one buffer, summed over the ranks in one all-reduce after
    the last micro-batch. overlap: DDP reduces its buckets during the last backward. A loss is the
    sum over samples times `loss_factor` / global batch: then both give the mean's exact gradient.
    """

    def __init__(self, module: nn.Module, ranks: Ranks, config: ParallelConfig) -> None:
        if config.sync_batchnorm and ranks.control is not None:
            module = nn.SyncBatchNorm.convert_sync_batchnorm(module)
        self.module = module
        self.ranks = ranks
        self.params = [p for p in module.parameters() if p.requires_grad]
        self.ddp = _wrap(module, config) if ranks.control is not None else None
        self.overlap = self.ddp is not None and config.sync == "overlap"
        self.loss_factor = float(ranks.world_size) if self.overlap else 1.0
        self.flat = None if self.overlap else _FlatGradients(self.params)

    def __call__(self, images: Tensor) -> Tensor:
        """Forward, through DDP where there is one."""
        return self.module(images) if self.ddp is None else self.ddp(images)

    def zero_grad(self) -> None:
        """Forget the gradients of the step before."""
        if self.flat is not None:
            self.flat.zero()
        else:
            for param in self.params:
                param.grad = None

    def synchronising(self, *, last: bool) -> AbstractContextManager[None]:
        """Return the context of a micro-batch: only an overlapped last backward reduces."""
        if self.ddp is None or (self.overlap and last):
            return contextlib.nullcontext()
        return self.ddp.no_sync()

    def reduce(self) -> None:
        """Sum the flat gradients over the ranks (overlap has done so in backward). Collective."""
        if self.flat is not None and self.ranks.control is not None:
            self.flat.attach()
            for buffer in self.flat.buffers:
                self.ranks.all_reduce(buffer)

    def clip(self, max_norm: float | None) -> Tensor:
        """Clip by global norm (Pascanu et al. 2013); returns the norm before, 0-d, on the device.

        The gradients are those of the global batch, so every rank finds the same norm.
        """
        norm = nn.utils.get_total_norm([p.grad for p in self.params if p.grad is not None])
        if max_norm is not None:
            nn.utils.clip_grads_with_norm_(self.params, max_norm, norm)
        return norm

    def close(self) -> None:
        """Let go of DDP while its process group lives.

        Otherwise DDP's C++ part may be the group's last owner and end it while holding Python's
        lock, for which gloo's threads wait to free their last tensors (a hang, on torch 2.11).
        """
        self.ddp = None

    def agree_on_buffers(self) -> None:
        """Give every rank rank 0's buffers: those are the run's. Collective."""
        if self.ranks.control is not None:
            for buffer in self.module.buffers():
                self.ranks.broadcast(buffer)


class _FlatGradients:
    """One contiguous gradient buffer a dtype, of which every `param.grad` is a view."""

    def __init__(self, params: list[nn.Parameter]) -> None:
        self.params = params
        self.buffers: list[Tensor] = []
        self.views: list[Tensor] = []
        by_kind: dict[torch.dtype, list[nn.Parameter]] = {}
        for param in params:
            by_kind.setdefault(param.dtype, []).append(param)
        made: dict[int, Tensor] = {}
        for dtype, members in by_kind.items():
            size = sum(p.numel() for p in members)
            buffer = torch.zeros(size, dtype=dtype, device=members[0].device)
            first = 0
            for param in members:
                # The parameter's own strides: fused optimizers take matching layouts only.
                made[id(param)] = buffer.as_strided(param.size(), param.stride(), first)
                first += param.numel()
            self.buffers.append(buffer)
        self.views = [made[id(p)] for p in params]
        self.zero()

    def zero(self) -> None:
        for buffer in self.buffers:
            buffer.zero_()
        for param, view in zip(self.params, self.views, strict=True):
            param.grad = view

    def attach(self) -> None:
        """Put back into the buffer what a model's own code may have replaced."""
        for param, view in zip(self.params, self.views, strict=True):
            if param.grad is not view:
                view.copy_(param.grad) if param.grad is not None else view.zero_()
                param.grad = view


def _wrap(module: nn.Module, config: ParallelConfig) -> DistributedDataParallel:
    # torch 2.15 renamed broadcast_buffers. Buffers are agreed on before an evaluation instead.
    names = inspect.signature(DistributedDataParallel.__init__).parameters
    buffers = "forward_sync_buffers" if "forward_sync_buffers" in names else "broadcast_buffers"
    options: dict[str, bool] = {buffers: False}
    return DistributedDataParallel(
        module,
        find_unused_parameters=config.find_unused_parameters,
        gradient_as_bucket_view=config.sync == "overlap",
        **options,  # type: ignore[arg-type] # one boolean, under either name
    )
