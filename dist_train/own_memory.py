"""Every parameter and buffer of a model in dense memory of its own, of a type that can be trained.

The buffers that sum gradients, and the fused optimizers, take a tensor's numbers one after the
other; a view with gaps, or one that repeats its numbers, has them elsewhere.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from dist_train.config import ConfigError
from dist_train.state_file import DTYPES


def check_types(module: nn.Module) -> None:
    """See that every parameter and buffer is of a type that can be trained, sent and saved.

    Raises:
        ConfigError: one is not; names it.
    """
    for name, tensor in _named(module):
        kind = "parameter" if isinstance(tensor, nn.Parameter) else "buffer"
        if tensor.layout is not torch.strided or tensor.is_nested or tensor.is_quantized:
            what = "quantized" if tensor.is_quantized else f"of layout {tensor.layout}"
            raise ConfigError(
                f"the model's {kind} {name!r} is {what}: keep its numbers and indices in ordinary "
                "tensors, and put it together in the forward"
            )
        if str(tensor.dtype).removeprefix("torch.") not in DTYPES:
            raise ConfigError(
                f"the model's {kind} {name!r} is {tensor.dtype}, which no checkpoint can hold: use "
                f"one of {', '.join(sorted(DTYPES))}"
            )
        if tensor.requires_grad and not tensor.is_floating_point():
            raise ConfigError(
                f"the model's {kind} {name!r} is {tensor.dtype}, which the fused optimizers do not "
                "train: make it a real parameter with a last dimension of 2, and take "
                "torch.view_as_complex of it in the forward"
            )


@torch.no_grad()
def make_dense(module: nn.Module) -> None:
    """Give parameters and buffers that are not dense memory of their own; they stay tied.

    A parameter under several names is one parameter. What shares numbers with another tensor of
    the module by memory alone cannot be moved.

    Raises:
        ConfigError: one that is not dense shares some of its numbers with another one.
    """
    named = list(_named(module))
    for name, tensor in named:
        if is_dense(tensor):
            continue
        for other, theirs in (*named, *_attributes(module)):
            if theirs is not tensor and _overlap(tensor, theirs):
                raise ConfigError(
                    f"the model's {name!r} is a part of a wider tensor, and shares numbers with "
                    f"{other!r}: a tensor with gaps cannot be trained in place. Give it memory of "
                    "its own (.clone()), or compute it from the other in the forward"
                )
    for _, tensor in named:
        if not is_dense(tensor):
            tensor.data = tensor.detach().clone()


def check_apart(module: nn.Module) -> None:
    """See that nothing is tied by memory alone: on its way to a GPU it would come apart unnoticed.

    A parameter or buffer under several names is one, and stays one.

    Raises:
        ConfigError: two of them share numbers; names both.
    """
    holders: dict[int, list[tuple[str, Tensor]]] = {}
    for name, tensor in _named(module):
        if tensor.layout is not torch.strided:
            continue
        others = holders.setdefault(tensor.untyped_storage().data_ptr(), [])
        for other, theirs in others:
            if _overlap(tensor, theirs):
                raise ConfigError(
                    f"the model's {other!r} and {name!r} share numbers by memory alone, and would "
                    "be two tensors on a GPU: make them one under two names (b.weight = a.weight), "
                    "or give each its own (.clone())"
                )
        others.append((name, tensor))


def is_dense(tensor: Tensor) -> bool:
    """Say whether the tensor's numbers fill a piece of memory, each of them once."""
    if tensor.is_contiguous():
        return True
    expected = 1
    for size, stride in sorted(zip(tensor.shape, tensor.stride(), strict=True), key=lambda d: d[1]):
        if size == 1:
            continue
        if stride != expected:
            return False
        expected *= size
    return True


def _named(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters()
    yield from module.named_buffers()


def _attributes(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors that the module keeps as plain attributes."""
    for prefix, part in module.named_modules():
        for name, value in vars(part).items():
            if isinstance(value, Tensor):
                yield f"{prefix}.{name}" if prefix else name, value


def _overlap(a: Tensor, b: Tensor) -> bool:
    """Say whether two tensors have a number in common."""
    if b.layout is not torch.strided or a.device != b.device:
        return False
    if a.untyped_storage().data_ptr() != b.untyped_storage().data_ptr():
        return False
    return bool(torch.isin(_places(a), _places(b)).any())


def _places(tensor: Tensor) -> Tensor:
    """Return where in its storage each number begins, in bytes."""
    place = torch.tensor(tensor.storage_offset())
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        place = place[..., None] + torch.arange(size) * stride
    return place.flatten() * tensor.element_size()
