"""Muon: momentum whose updates are made orthogonal; for filters and matrices.

Jordan et al. 2024, https://kellerjordan.github.io/posts/muon; the iteration is Newton and Schulz's,
of fifth order, its coefficients theirs: after five steps singular values are between 0.7 and 1.2,
which is enough. Fewer leave the smallest ones smaller.
"""

# pyright: reportPrivateImportUsage=false
# (torch._foreach_*: many tensors by one kernel, as torch's own optimizers do)

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

COEFFICIENTS = (3.4445, -4.7750, 2.0315)


class Muon(torch.optim.Optimizer):
    """Groups with orthogonal=True get Muon's updates, the others those of SGD with momentum.

    Tensors of one shape are iterated together, in bfloat16. A filter (out, in, height, width)
    counts as the matrix (out, in * height * width).
    """

    def __init__(self, groups: Iterable[dict[str, Any]], *, lr: float) -> None:
        """Take groups of parameters, each with its settings; what is not given is a default.

        Args:
            groups: `params`, `orthogonal`, `steps` (of the iteration), `momentum`, `nesterov`,
                `weight_decay`, `unit`: a filter is brought to the norm sqrt(out) before every
                update, for filters that a normalisation follows.
            lr: of groups that name none.
        """
        defaults = {
            "lr": lr,
            "momentum": 0.95,
            "nesterov": True,
            "weight_decay": 0.0,
            "orthogonal": True,
            "steps": 5,
            "unit": False,
        }
        super().__init__(groups, defaults)
        for group in self.param_groups:
            for param in group["params"]:
                self.state[param]["momentum_buffer"] = torch.zeros_like(param)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override] # no closure is taken
        """Take one step."""
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if params:
                self._step(group, params)

    def _step(self, group: dict[str, Any], params: list[Tensor]) -> None:
        lr, momentum, decay = group["lr"], group["momentum"], group["weight_decay"]
        grads: list[Tensor] = [p.grad for p in params if p.grad is not None]
        if decay and not group["orthogonal"]:
            grads = list(torch._foreach_add(grads, params, alpha=decay))
        held = [self.state[p]["momentum_buffer"] for p in params]
        torch._foreach_mul_(held, momentum)
        torch._foreach_add_(held, grads)
        updates = held
        if group["nesterov"]:
            updates = list(torch._foreach_add(grads, held, alpha=momentum))
        if not group["orthogonal"]:
            torch._foreach_add_(params, updates, alpha=-lr)
            return
        if group["unit"]:
            norms = torch._foreach_norm(params)
            scales = [len(p) ** 0.5 / norm for p, norm in zip(params, norms, strict=True)]
            torch._foreach_mul_(params, scales)
        elif decay:
            torch._foreach_mul_(params, 1 - lr * decay)
        for shape in {update.shape for update in updates}:
            at = [n for n, update in enumerate(updates) if update.shape == shape]
            stack = torch.stack([updates[n].flatten(1) for n in at])
            made = orthogonal(stack, group["steps"]).to(params[at[0]].dtype)
            for n, update in zip(at, made, strict=True):
                params[n].add_(update.view(shape), alpha=-lr)


def orthogonal(matrices: Tensor, steps: int) -> Tensor:
    """Return (k, rows, columns) bfloat16, close to U V^T of each matrix's U S V^T."""
    a, b, c = COEFFICIENTS
    x = matrices.bfloat16()
    tall = x.shape[1] > x.shape[2]
    if tall:
        x = x.mT
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(steps):
        square = x @ x.mT
        x = a * x + (b * square + c * square @ square) @ x
    return x.mT if tall else x
