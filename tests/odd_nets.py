"""Small networks as users write them: odd state, odd parameters, several outputs."""

import itertools
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from tests.nets import noisy_net, plain_net

NAMES, CALLS = itertools.count(), itertools.count()


class Versioned(nn.Module):
    """plain_net that reads weights of its first version as others than they are: as MNASNet."""

    _version = 2

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.inner = plain_net(num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)

    def _load_from_state_dict(self, *args: Any) -> None:  # pyright: ignore[reportIncompatibleMethodOverride] # by position
        _, prefix, metadata, _, _, _, errors = args
        if metadata.get("version") != 2:
            errors.append(f"{prefix}inner was twice as wide before version 2")
        super()._load_from_state_dict(*args)


class Extra(nn.Module):
    """plain_net with state beside its tensors: how many training forwards there were."""

    def __init__(self, num_classes: int, *, kind: str = "plain") -> None:
        super().__init__()
        self.inner, self.kind, self.count = plain_net(num_classes), kind, 0

    def forward(self, x: Tensor) -> Tensor:
        self.count += self.training and torch.is_grad_enabled()
        return self.inner(x) * (1 + 0.01 * self.count)

    def get_extra_state(self) -> Any:
        kinds = {"plain": int, "numpy": np.int64, "bytes": bytes, "refused": str}
        return {"count": kinds[self.kind](self.count)}

    def set_extra_state(self, state: Any) -> None:
        if self.kind == "refused":
            raise ValueError("who needs extra state")
        count = state["count"]
        self.count = len(count) if isinstance(count, bytes) else count


class RunningMean(nn.Module):
    """plain_net behind a running mean of its inputs, kept by assignment or in place."""

    mean: Tensor

    def __init__(self, num_classes: int, *, in_place: bool = False) -> None:
        super().__init__()
        self.inner, self.in_place = plain_net(num_classes), in_place
        self.register_buffer("mean", torch.zeros(3, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            new = 0.9 * self.mean + 0.1 * (x.detach().mean((0, 2, 3)).view(3, 1, 1) + 1)
            if self.in_place:
                self.mean.copy_(new)
            else:
                self.mean = new
        return self.inner(x - self.mean)


class Grid(nn.Module):
    """plain_net that makes a buffer in its first forward, or another size of one.

    kind: "none" is registered as None and filled, "registered" is registered there, "resized" is
    given its size there, "cache" is no part of the state, "flag" is made once and not again.
    """

    def __init__(self, num_classes: int, *, kind: str = "none") -> None:
        super().__init__()
        self.inner, self.kind, self.ready = plain_net(num_classes), kind, False
        if kind == "none":
            self.register_buffer("grid", None)
        elif kind == "resized":
            self.register_buffer("grid", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        grid = getattr(self, "grid", None)
        missing = grid is None or grid.shape != x.shape[1:]
        if missing and not self.ready:
            # Of the images that it meets first: those of a trial step would be seen.
            self.register_buffer("grid", x[0] + 1, persistent=self.kind != "cache")
            self.ready = self.kind in ("flag", "cache")
        return self.inner(x * self.grid)  # pyright: ignore[reportOperatorIssue] # a tensor


class BrokenDevice(nn.Module):
    """Grid on a GPU that breaks at one of its forwards, and is broken from then on."""

    def __init__(self, num_classes: int, *, call: int) -> None:
        super().__init__()
        self.inner, self.call, self.calls = Grid(num_classes), call, 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        if self.calls >= self.call:
            raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")
        return self.inner(x)


class LateParameter(nn.Module):
    """plain_net that makes a parameter in its first forward."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.inner = plain_net(num_classes)

    def forward(self, x: Tensor) -> Tensor:
        if not hasattr(self, "scale"):
            self.scale = nn.Parameter(torch.ones(3, 1, 1))
        return self.inner(x * self.scale)


class NamedByCount(nn.Module):
    """plain_net under a name that no two calls of the factory share."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.add_module(f"net_{next(NAMES)}", plain_net(num_classes))

    def forward(self, x: Tensor) -> Tensor:
        return next(self.children())(x)


def Once(num_classes: int) -> nn.Module:  # noqa: N802 # as the networks here
    """plain_net of a factory that can be called once in a process."""
    if next(CALLS):
        raise RuntimeError("registered already")
    return plain_net(num_classes)


class NeedsNumbers(nn.Module):
    """plain_net whose making looks at numbers, and draws from every global generator."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        rates = [x.item() for x in torch.linspace(0, float(np.random.rand()), 3)]
        self.inner, self.rate = plain_net(num_classes), rates[0]

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) * (1 - self.rate)


class Cut(nn.Module):
    """A net whose first weights are a part of a wider tensor, as of a pretrained layer.

    kind: "slice" leaves gaps, "dense" is the same made dense, "expanded" repeats one row, "tied" is
    used twice, "shared" are two slices with a part in common, "apart" two without one, "same" are
    two parameters of the same memory.
    """

    def __init__(self, num_classes: int, *, kind: str = "slice") -> None:
        super().__init__()
        self.first, self.second = nn.Linear(432, 16), nn.Linear(432, 16)
        self.head = nn.Linear(16, num_classes)
        wide = nn.Linear(1000, 16).weight.detach()
        taken = wide[:1, :432].expand(16, 432) if kind == "expanded" else wide[:, :432]
        self.first.weight = nn.Parameter(taken.clone() if kind == "dense" else taken)
        other = {"shared": wide[:, 100:532], "apart": wide[:, 500:932]}
        if kind in other:
            self.second.weight = nn.Parameter(other[kind])
        if kind == "tied":
            self.second.weight = self.first.weight
        if kind == "same":
            self.first.weight = nn.Parameter(wide[:, :432].clone())
            self.second.weight = nn.Parameter(self.first.weight.detach())
        self.register_buffer("shift", torch.zeros(1).expand(16))

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1)
        x = torch.relu(self.first(x)) + torch.relu(self.second(x))
        return self.head(x + self.get_buffer("shift"))


class Odd(nn.Module):
    """plain_net with one tensor of an unusual type."""

    def __init__(self, num_classes: int, *, kind: str) -> None:
        super().__init__()
        self.inner = plain_net(num_classes)
        odd: dict[str, Any] = {
            "complex parameter": lambda: nn.Parameter(torch.ones(3, dtype=torch.complex64)),
            "whole parameter": lambda: nn.Parameter(torch.arange(3), requires_grad=False),
            "frozen complex": lambda: nn.Parameter(torch.ones(3) * 1j, requires_grad=False),
            "half parameter": lambda: nn.Parameter(torch.ones(3, dtype=torch.float16)),
            "double parameter": lambda: nn.Parameter(torch.ones(3, dtype=torch.float64)),
            "scalar parameter": lambda: nn.Parameter(torch.tensor(1.0)),
            "empty parameter": lambda: nn.Parameter(torch.ones(3, 0)),
            "float8 parameter": lambda: nn.Parameter(
                torch.ones(3).to(torch.float8_e4m3fn), requires_grad=False
            ),
            "sparse buffer": lambda: torch.eye(3).to_sparse(),
            "complex buffer": lambda: torch.ones(3) * 1j,
            "short buffer": lambda: torch.ones(3, dtype=torch.int16),
            "boolean buffer": lambda: torch.ones(3, dtype=torch.bool),
            "unsigned buffer": lambda: torch.ones(3, dtype=torch.uint16),
        }
        made = odd[kind]()
        if isinstance(made, nn.Parameter):
            self.odd = made
        else:
            self.register_buffer("odd", made)

    def forward(self, x: Tensor) -> Tensor:
        odd = self.odd
        if odd.is_complex() and not isinstance(odd, nn.Parameter) and self.training:
            self.odd = odd * 0.5 + x.detach().mean() * 1j
        value = odd.real if odd.is_complex() else odd
        return self.inner(x) * (1 + 0.01 * value.float().sum())


class OneAux(NamedTuple):
    """As Inception v3 of torchvision returns."""

    logits: Tensor
    aux_logits: Tensor | None


class TwoAux(NamedTuple):
    """As GoogLeNet of torchvision returns."""

    logits: Tensor
    aux_logits2: Tensor | None
    aux_logits1: Tensor | None


class Headed(nn.Module):
    """noisy_net with auxiliary heads on its input, in training; `kind` says how it returns them.

    With `bad` an auxiliary head is not finite for any batch but the zeros of a trial step.
    """

    def __init__(self, num_classes: int, *, kind: str, bad: bool = False) -> None:
        super().__init__()
        self.main, self.kind, self.bad = noisy_net(num_classes), kind, bad
        self.first, self.second = (nn.Linear(3, num_classes) for _ in range(2))

    def forward(self, x: Tensor) -> Any:
        main = self.main(x)
        if not self.training:
            return {"logits": main} if self.kind == "dictionary" else main
        first, second = self.first(x.mean((2, 3))), self.second(x.amax((2, 3)))
        if self.bad:
            first = first / (x.abs().amax() == 0)
        return {
            "one": lambda: OneAux(main, first),
            "two": lambda: TwoAux(main, second, first),
            "dictionary": lambda: {"logits": main, "aux_logits": first, "aux_logits2": None},
            "pair": lambda: (main, first),
            "features": lambda: {"logits": main, "features": first},
            "narrow": lambda: OneAux(main, first[:, 1:]),
        }[self.kind]()
