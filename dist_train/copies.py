"""Copies of many tensors, taken and put back by one kernel."""

# pyright: reportPrivateImportUsage=false
# (torch._foreach_*: many tensors by one kernel, as torch's own optimizers do)

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


class Copies:
    """Copies of tensors of one dtype: torch would copy a list of several tensor by tensor."""

    def __init__(self, live: list[Tensor], before: "Mapping[Any, Copies]") -> None:
        """Make room for copies of `live`; that of an earlier one of the same form is used again."""
        self.form = tuple(_layout(tensor) for tensor in live)
        self._live = live
        known = before.get(self.form)
        if known is None:
            self._flat, self.kept = _in_one_piece(live)
            self.take()
        else:
            self._flat, self.kept = known._flat, known.kept
        self._spare: tuple[Tensor, list[Tensor]] | None = None

    def take(self) -> None:
        torch._foreach_copy_(self.kept, self._live)

    def put_back(self) -> None:
        torch._foreach_copy_(self._live, self.kept)

    def put_back_if(self, bad: Tensor) -> None:
        """Put back where `bad`, 0-d, is true; the host does not learn it."""
        if self._spare is None:
            self._spare = _in_one_piece(self._live)
        now, views = self._spare
        torch._foreach_copy_(views, self._live)
        torch.where(bad, self._flat, now, out=now)
        torch._foreach_copy_(self._live, views)


def _in_one_piece(tensors: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """Return memory without numbers for copies of tensors of one dtype, and its view for each."""
    flat = tensors[0].new_empty(sum(tensor.numel() for tensor in tensors))
    views, first = [], 0
    for tensor in tensors:
        strides = torch.empty_like(tensor, device="meta").stride()
        views.append(flat.as_strided(tensor.size(), strides, first))
        first += tensor.numel()
    return flat, views


def _layout(tensor: Tensor) -> tuple[object, ...]:
    return tensor.shape, tensor.dtype, tensor.device, tensor.stride()
