"""What a network returns: logits, or in training those of auxiliary heads beside the main ones."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

MAIN = "logits"
# How much the loss of an auxiliary head counts, by the name of its field in what torchvision's
# networks return. Two heads: GoogLeNet, Szegedy et al. 2014, arXiv:1409.4842, section 5. One:
# Inception v3, Szegedy et al. 2015, arXiv:1512.00567; 0.4 is what torchvision trains it with.
AUXILIARY = {"aux_logits1": 0.3, "aux_logits2": 0.3, "aux_logits": 0.4}
SUPPORTED = (
    "logits of shape (images, classes), or a named tuple or dictionary of `logits` and, in "
    "training, `aux_logits` (its loss counts 0.4) or `aux_logits1` and `aux_logits2` (0.3 each)"
)

Output = Tensor | Mapping[str, Any] | tuple[Any, ...]


class UnknownOutputError(ValueError):
    """A network returns something else than logits; says what."""


def main_logits(output: Output) -> Tensor:
    """Return the logits that count for predictions and metrics, (n, k)."""
    return output if isinstance(output, Tensor) else heads_of(output)[0][1]


def heads_of(output: Output) -> list[tuple[float, Tensor]]:
    """Return (weight of its loss, logits (n, k)) of each head, the main one first.

    Raises:
        UnknownOutputError: it is none of SUPPORTED.
    """
    if isinstance(output, Tensor):
        return [(1.0, output)]
    if isinstance(output, Mapping):
        fields = dict(output)
    elif isinstance(output, tuple) and hasattr(output, "_fields"):
        fields = dict(zip(output._fields, output, strict=True))  # type: ignore[attr-defined] # a named tuple
    else:
        raise UnknownOutputError(f"a {type(output).__name__}")
    found = {name: value for name, value in fields.items() if value is not None}
    odd = [name for name in found if name != MAIN and name not in AUXILIARY]
    if odd or MAIN not in found:
        raise UnknownOutputError(
            f"a {type(output).__name__} of {', '.join(map(str, fields))}, where "
            + (f"{odd[0]!r} is not known" if odd else f"{MAIN!r} is missing")
        )
    other = [name for name, value in found.items() if not isinstance(value, Tensor)]
    if other:
        raise UnknownOutputError(
            f"a {type(output).__name__} whose {other[0]!r} is a {type(found[other[0]]).__name__}"
        )
    main = found.pop(MAIN)
    return [(1.0, main), *((AUXILIARY[name], value) for name, value in found.items())]
