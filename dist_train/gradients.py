"""The gradients of a step as one buffer: summed over the ranks at once, or in a fixed tree.

A rank that failed poisons the sum with NaN: its peers need nothing else to learn of it.
"""

import contextlib
import math
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Protocol

import torch
from torch import Tensor, nn

from dist_train.buffers import Buffers, form_of
from dist_train.config import ConfigError
from dist_train.distributed import Ranks


class Gradients(Protocol):
    """How the gradients of the ranks' pieces become those of the global batch."""

    loss_factor: float  # a loss is the sum over samples, times this / global batch
    all_sent: bool  # whether the peers have all they wait for: too late to poison the sum

    def begin(self) -> None:
        """Start an attempt at a step. Collective, but only for DDP's buckets."""

    def piece(self, *, last: bool) -> AbstractContextManager[None]:
        """Return the context of one micro-batch's forward and backward."""
        ...

    def reduce(self, *, poison: bool) -> None:
        """Finish the sum over the ranks; with `poison`, make it NaN for all. Collective."""

    def give_up(self) -> None:
        """Forget a failed attempt; all ranks call it, or none."""

    def close(self) -> None:
        """Let go of what was made for them."""

    def norm(self) -> Tensor:
        """Return the global norm of the sum, 0-d, on the device."""
        ...

    def scale(self, factor: Tensor) -> None:
        """Multiply the sum by `factor`, 0-d."""


class FlatGradients:
    """One contiguous buffer a dtype, one all-reduce each.

    The backward makes gradients of its own, which costs nothing; they are gathered in the buffer
    by one kernel a dtype, and after the sum every `param.grad` is a view of it.
    """

    loss_factor = 1.0
    all_sent = False

    def __init__(self, params: list[nn.Parameter], ranks: Ranks) -> None:
        self.params = params
        self.buffers, self.views = flat_views(params)
        self._ranks = ranks
        # Of one dtype each: torch would copy a list of several tensor by tensor.
        self._groups: dict[torch.dtype, list[tuple[nn.Parameter, Tensor]]] = {}
        for param, view in zip(params, self.views, strict=True):
            self._groups.setdefault(param.dtype, []).append((param, view))

    def begin(self) -> None:
        for param in self.params:
            param.grad = None

    def piece(self, *, last: bool) -> AbstractContextManager[None]:
        return contextlib.nullcontext()

    def reduce(self, *, poison: bool) -> None:
        if poison:
            self.poison()
        else:
            self.collect()
        for buffer in self.buffers:
            self._ranks.all_reduce(buffer)
        self.attach()

    def poison(self) -> None:
        """Make this rank's contribution one that no peer can take for a gradient."""
        for buffer in self.buffers:
            buffer.fill_(math.nan)

    def give_up(self) -> None:
        return

    def close(self) -> None:
        return

    def norm(self) -> Tensor:
        norms = [_norm(buffer) for buffer in self.buffers]
        return norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack(norms))

    def scale(self, factor: Tensor) -> None:
        for buffer in self.buffers:
            buffer.mul_(factor)

    @torch.no_grad()
    def collect(self) -> None:
        """Copy into the buffer what the backward left, zeros where it left nothing."""
        for group in self._groups.values():
            views, grads = [], []
            for param, view in group:
                if param.grad is None:
                    view.zero_()
                else:
                    views.append(view)
                    grads.append(param.grad)
            if grads:
                torch._foreach_copy_(views, grads)  # pyright: ignore[reportPrivateImportUsage] # torch's optimizers' own

    def attach(self) -> None:
        """Make the buffer's parts the parameters' gradients."""
        for param, view in zip(self.params, self.views, strict=True):
            param.grad = view


class TreeGradients:
    """Sums the gradients of `num_shards` shards in one binary tree, whatever the number of ranks.

    A rank adds up its own subtree; then pairs of ranks exchange and add (recursive doubling). The
    order of additions is that of the tree, so the sum's bits do not depend on the ranks. Running
    statistics belong to the shard: each starts from the step's own, and their mean over the
    shards, from the same tree, is what the step leaves behind.
    """

    loss_factor = 1.0
    all_sent = False

    def __init__(
        self, params: list[nn.Parameter], ranks: Ranks, buffers: Buffers, num_shards: int
    ) -> None:
        self._flat = FlatGradients(params, ranks)
        self._ranks = ranks
        self._state = buffers
        self._num_shards = num_shards
        self._spare: list[list[Tensor]] = []
        self._tree: list[tuple[int, list[Tensor]]] = []  # (level, subtree's sum), left to right
        self._prepare(buffers.floating())

    def begin(self) -> None:
        self._clear()
        self._flat.begin()

    @contextlib.contextmanager
    def piece(self, *, last: bool) -> Iterator[None]:
        self._state.restore()
        self._flat.begin()
        yield
        self._flat.collect()
        statistics = self._state.floating()
        if {place: form_of(tensor) for place, tensor in statistics.items()} != self._forms:
            self._prepare(statistics)
        for place, view in self._statistics.items():
            view.copy_(statistics[place])
        self._add_leaf()

    def reduce(self, *, poison: bool) -> None:
        if poison:
            self._clear()
            for buffer in self._sums:
                buffer.fill_(math.nan)
        else:
            [(_, total)] = self._tree  # a power of two of leaves makes one subtree
            for buffer, value in zip(self._sums, total, strict=True):
                buffer.copy_(value)
            self._clear()
        distance = 1
        while distance < self._ranks.world_size:
            self._exchange(self._ranks.rank ^ distance)
            distance *= 2
        self._state.put({at: view / self._num_shards for at, view in self._statistics.items()})
        self._flat.attach()

    def give_up(self) -> None:
        self._clear()

    def close(self) -> None:
        return

    def norm(self) -> Tensor:
        return self._flat.norm()

    def scale(self, factor: Tensor) -> None:
        self._flat.scale(factor)

    def _prepare(self, statistics: dict[tuple[int, str], Tensor]) -> None:
        """Make room for the sums of these statistics; a forward may have made some of them.

        Raises:
            ConfigError: they have another form than those of the shard before.
        """
        if self._tree:
            raise ConfigError(
                "the model's forward makes buffers of another form for one shard than for another: "
                "in train.order=fixed they are averaged over the shards; use train.order=fast, or "
                "buffers that do not depend on the number of images"
            )
        self._forms = {place: form_of(tensor) for place, tensor in statistics.items()}
        buffers, views = flat_views(list(statistics.values()))
        self._statistics = dict(zip(statistics, views, strict=True))
        self._sums = [*self._flat.buffers, *buffers]  # what goes through the tree
        self._spare.clear()

    def _add_leaf(self) -> None:
        """Add the shard at hand to the tree, joining subtrees of equal height."""
        level, right = 0, self._sums
        while self._tree and self._tree[-1][0] == level:
            _, left = self._tree.pop()
            torch._foreach_add_(left, right)  # pyright: ignore[reportPrivateImportUsage] # torch's optimizers' own
            if right is not self._sums:
                self._spare.append(right)
            level, right = level + 1, left
        if right is self._sums:
            right = self._spare.pop() if self._spare else [torch.empty_like(b) for b in right]
            for kept, value in zip(right, self._sums, strict=True):
                kept.copy_(value)
        self._tree.append((level, right))

    def _exchange(self, partner: int) -> None:
        """Add the partner's sums to ours: a + b has the bits of b + a."""
        for buffer in self._sums:
            buffer.add_(self._ranks.exchange(buffer, partner))

    def _clear(self) -> None:
        self._spare += [total for _, total in self._tree]
        self._tree.clear()


def backward(loss: Tensor, weight: Tensor) -> None:
    """Do what `loss.backward(weight)` does, both 0-d.

    That compares the two shapes by means that import sympy, a third of a second of every start.
    """
    torch.autograd.Variable._execution_engine.run_backward(
        (loss,), (weight,), False, False, (), allow_unreachable=True, accumulate_grad=True
    )


def _norm(buffer: Tensor) -> Tensor:
    """Return the norm, 0-d; of half precision in float32, where the squares find room."""
    half = buffer.dtype in (torch.float16, torch.bfloat16)
    return torch.linalg.vector_norm(buffer, dtype=torch.float32 if half else None)


def flat_views(tensors: list[Tensor] | list[nn.Parameter]) -> tuple[list[Tensor], list[Tensor]]:
    """Return (zeroed buffers, one a dtype; for each tensor its view of one).

    A view has its tensor's own strides, as far as those leave no gaps: fused optimizers take
    matching layouts only.
    """
    members: dict[torch.dtype, list[Tensor]] = {}
    for tensor in tensors:
        members.setdefault(tensor.dtype, []).append(tensor)
    buffers, views = [], {}
    for dtype, group in members.items():
        size = sum(t.numel() for t in group)
        buffer = torch.zeros(size, dtype=dtype, device=group[0].device)
        first = 0
        for tensor in group:
            strides = torch.empty_like(tensor, device="meta").stride()
            views[id(tensor)] = buffer.as_strided(tensor.size(), strides, first)
            first += tensor.numel()
        buffers.append(buffer)
    return buffers, [views[id(t)] for t in tensors]
