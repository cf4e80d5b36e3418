"""The model as a rank trains it: the same on all ranks, its gradients summed over them, clipped.

With gradients.py and ddp.py the only files that know the wrappers and torch's versions.
"""

import contextlib
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from dist_train.buffers import Buffers, form_of
from dist_train.config import Config, ConfigError
from dist_train.ddp import BucketGradients, wrapped
from dist_train.distributed import Ranks
from dist_train.gradients import FlatGradients, Gradients, TreeGradients
from dist_train.own_memory import check_types, make_dense

NOT_SENT = (torch.int16, torch.complex64, torch.complex128)  # by gloo as such


@dataclass(frozen=True, kw_only=True, slots=True)
class Form:
    """How the gradients are summed over the ranks."""

    name: Literal["flat", "ddp", "fixed"]
    recoverable: bool = True  # whether one rank's failure in the middle can be taken back by all


class Replica:
    """This rank's copy of the model, and how its gradients become those of the global batch.

    flat: every gradient is a view into one buffer, summed over the ranks in one all-reduce after
    the last micro-batch. ddp: DDP reduces its buckets during the last backward. fixed: a sum whose
    bits do not depend on the ranks. `recoverable` says whether one rank's failure in the middle of
    a step can be taken back by all.
    """

    def __init__(self, module: nn.Module, ranks: Ranks, config: Config, form: Form) -> None:
        """Give every rank rank 0's weights and buffers. Collective.

        Raises:
            ConfigError: the ranks have built models whose tensors differ in name, shape or type,
                or that hold tensors that cannot be trained.
        """
        if config.parallel.sync_batchnorm and ranks.control is not None:
            module = nn.SyncBatchNorm.convert_sync_batchnorm(module)
        check_types(module)
        make_dense(module)
        self.module = module
        self.ranks = ranks
        self.params = [p for p in module.parameters() if p.requires_grad]
        self._built = _parts_of(module)
        self._followed: list[str] = []  # buffers that are rank 0's at the begin of each step
        self.buffers = Buffers(module)
        _check_alike(module, ranks)
        self._begin_alike()
        self.form: str = form.name
        # The forward of SyncBatchNorm is collective.
        self.recoverable = form.recoverable and not config.parallel.sync_batchnorm
        self._loss_weight: tuple[int, Tensor] | None = None
        self.ddp = None
        if form.name == "fixed":
            self.gradients: Gradients = TreeGradients(
                self.params, ranks, self.buffers, config.train.num_shards
            )
        elif form.name == "ddp":
            self.ddp = wrapped(module, find_unused=config.parallel.find_unused_parameters)
            self.gradients = BucketGradients(
                self.ddp, self.params, ranks, recoverable=self.recoverable
            )
        else:
            self.gradients = FlatGradients(self.params, ranks)

    def __call__(self, images: Tensor) -> Any:
        """Forward; through DDP where its hooks reduce the gradients."""
        if self.ddp is not None and self.form == "ddp":  # not while measured alone
            return self.ddp(images)
        return self.module(images)

    def loss_weight(self, global_size: int) -> Tensor:
        """Return what a summed loss counts for each of `global_size` samples: 0-d float32.

        The backward of the loss starts from it, which saves a multiplication forth and back.
        """
        if self._loss_weight is None or self._loss_weight[0] != global_size:
            weight = self.gradients.loss_factor / global_size
            self._loss_weight = (global_size, torch.full((), weight, device=self.ranks.device))
        return self._loss_weight[1]

    def reduce(self, *, poison: bool = False) -> None:
        """Finish the gradients' sum over the ranks; `poison` makes it NaN for all. Collective."""
        self.gradients.reduce(poison=poison)

    def clip(self, max_norm: float | None) -> Tensor:
        """Clip by global norm (Pascanu et al. 2013); returns the norm before, 0-d, on the device.

        The gradients are those of the global batch, so every rank finds the same norm.
        """
        norm = self.gradients.norm()
        if max_norm is not None:  # 1e-6, as in torch: a norm of zero divides nothing
            self.gradients.scale((max_norm / (norm + 1e-6)).clamp(max=1.0))
        return norm

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Take steps without the other ranks, on this one's gradients only: to be measured.

        A step that goes wrong is this rank's matter, too. It keeps its rank and its share of the
        batch.
        """
        ranks, gradients, form = self.ranks, self.gradients, self.form
        self.ranks = replace(ranks, control=None)
        self.gradients = FlatGradients(self.params, self.ranks)
        self.form, self._loss_weight = "flat", None
        try:
            yield
        finally:
            self.ranks, self.gradients, self.form = ranks, gradients, form
            self._loss_weight = None

    def use_flat(self) -> None:
        """Sum the gradients as one buffer from here on. All ranks call it, or none."""
        self.close()
        self.form, self._loss_weight = "flat", None
        self.gradients = FlatGradients(self.params, self.ranks)

    def close(self) -> None:
        """Let go of DDP while its process group lives.

        Otherwise DDP's C++ part may be the group's last owner and end it while holding Python's
        lock, for which gloo's threads wait to free their last tensors (a hang, on torch 2.11).
        """
        self.ddp = None
        self.gradients.close()
        del self.gradients

    def check_parts(self) -> None:
        """See that a forward has made no parameter or module: what trains is known by now.

        Raises:
            ConfigError: it has; names the first.
        """
        now = _parts_of(self.module)
        other = [name for name in now | self._built if now.get(name) is not self._built.get(name)]
        if other:
            raise ConfigError(
                f"the model's forward makes {other[0]!r}, or puts another in its place: no "
                "optimizer would train it, and no checkpoint be loaded. Make every parameter and "
                "module in __init__"
            )

    def follow(self, changed: list[str]) -> list[str]:
        """Let all ranks begin each step with rank 0's of buffers that a forward changes.

        A checkpoint holds rank 0's alone: where the forward makes use of them, a resumed run would
        otherwise differ from an unbroken one. In fixed order they are the mean over all shards, on
        all ranks. Collective.

        Args:
            changed: by a trial step, as Buffers.changed_since gives them.

        Returns:
            Those of them that each rank has made in a form of its own: they stay its own.
        """
        saved = self.buffers.saved()
        everyone = self.ranks.gather({name: form_of(saved[name]) for name in changed})
        names = dict.fromkeys(name for theirs in everyone for name in theirs)
        alike = [name for name in names if len({theirs.get(name) for theirs in everyone}) == 1]
        if self.ranks.control is not None and self.form != "fixed":
            self._followed = alike
        return [name for name in names if name not in alike]

    def agree_on_followed(self) -> None:
        """Give every rank rank 0's of the followed buffers. Collective if there are any."""
        if not self._followed or self.ranks.control is None:
            return
        saved = self.buffers.saved()
        for name in self._followed:
            tensor = saved.get(name)
            if tensor is not None:
                self._share(tensor.detach())

    def agree_on_buffers(self) -> None:
        """Give every rank rank 0's buffers: those are the run's. Collective.

        A cache that is no part of a state stays each rank's own where its form differs.
        """
        if self.ranks.control is None:
            return
        buffers = self.buffers
        caches = {name: form_of(tensor) for name, tensor in buffers.caches().items()}
        everyone = self.ranks.gather((buffers.saved_forms(), caches))
        if any(saved != everyone[0][0] for saved, _ in everyone):
            buffers.take_form(*self.ranks.from_first(lambda: (buffers.outline(), buffers.made())))
        alike = set.intersection(*(set(theirs.items()) for _, theirs in everyone))
        shared = [
            tensor for name, tensor in buffers.caches().items() if (name, caches[name]) in alike
        ]
        for tensor in (*buffers.saved().values(), *shared):
            if tensor is not None:
                self._share(tensor.detach())

    @torch.no_grad()
    def _begin_alike(self) -> None:
        """Give every rank rank 0's weights and buffers. Collective."""
        if self.ranks.control is None:
            return
        for param in self.module.parameters():
            self._share(param.detach())
        self.agree_on_buffers()

    def _share(self, tensor: Tensor) -> None:
        """Overwrite it with rank 0's, which has the same strides. Collective."""
        wide = tensor.ndim == 4 and tensor.is_contiguous(memory_format=torch.channels_last)
        if wide or tensor.is_contiguous():
            self.ranks.broadcast(_wire(tensor))
        else:
            whole = tensor.contiguous()
            self.ranks.broadcast(_wire(whole))
            tensor.copy_(whole)


def _wire(tensor: Tensor) -> Tensor:
    """Return the tensor as a type that gloo sends, over the same memory, which has no gaps."""
    if tensor.dtype not in NOT_SENT:
        return tensor
    return tensor.as_strided((tensor.numel(),), (1,)).view(torch.uint8)


def _parts_of(module: nn.Module) -> dict[str, nn.Module | nn.Parameter]:
    return {**dict(module.named_modules()), **dict(module.named_parameters())}


def _check_alike(module: nn.Module, ranks: Ranks) -> None:
    named = [*module.named_parameters(), *module.named_buffers()]
    mine = [
        f"{name} {tuple(t.shape)} {t.dtype}, strides {t.stride()}"
        + (", trained" if t.requires_grad else "")
        for name, t in named
    ]
    digests = ranks.gather(hashlib.sha256("\n".join(mine).encode()).digest())
    if len(set(digests)) == 1:
        return
    other = next(rank for rank, digest in enumerate(digests) if digest != digests[0])
    everyone = ranks.gather(mine)
    first, theirs = everyone[0], everyone[other]
    at = next((n for n, (a, b) in enumerate(zip(first, theirs, strict=False)) if a != b), None)
    at = min(len(first), len(theirs)) if at is None else at
    told = [(tensors[at] if at < len(tensors) else "nothing more") for tensors in (first, theirs)]
    raise ConfigError(
        f"the ranks have built different models: rank 0's tensor {at} is {told[0]}, rank "
        f"{other}'s is {told[1]}; model.factory must not depend on the rank"
    )
