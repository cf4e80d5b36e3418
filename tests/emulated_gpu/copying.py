"""The memory of the emulated GPU as the CPU sees it, and the copies between them."""

import ctypes

import torch
from torch import Tensor


def on_host(tensor: Tensor) -> Tensor:
    """Return a CPU tensor that is the same memory as one of the device."""
    storage = tensor.untyped_storage()
    if storage.nbytes() == 0:
        return torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype)
    held = (ctypes.c_byte * storage.nbytes()).from_address(storage.data_ptr())
    base = torch.frombuffer(held, dtype=torch.uint8).untyped_storage()
    made = torch.empty(0, dtype=tensor.dtype)
    return made.set_(base, tensor.storage_offset(), tensor.size(), tensor.stride())


def on_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Return what a kernel leaves on the device: a new tensor like one of the CPU."""
    made = torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device=device)
    if tensor.numel():
        on_host(made).copy_(tensor)
    return made


def send(target: Tensor, source: Tensor, *, later: bool) -> None:
    """Copy between the host and the device, as aten/src/ATen/native/cuda/Copy.cu does.

    One copy of memory where types and strides agree; otherwise one through contiguous memory,
    whose other half is a kernel of the device (`later`) or of the CPU.
    """
    same = target.dtype == source.dtype
    if same and target.stride() == source.stride() and _is_one_block(target):
        torch.ops.aten.copy_(target, source, later)
        return
    if same and target.is_contiguous() and source.is_contiguous():
        torch.ops.aten.copy_(target, source, later)
        return
    # Types are changed where the copy begins if that is the device and nobody waits.
    first = source.is_cuda == later
    dtype = target.dtype if first else source.dtype
    sent = on_host(source) if source.is_cuda else source
    sent = sent.to(dtype).contiguous()
    if source.is_cuda:
        sent = on_device(sent, source.device)
    plain = target.is_contiguous() and target.dtype == dtype
    held = target if plain else torch.empty(target.size(), dtype=dtype, device=target.device)
    torch.ops.aten.copy_(held, sent, later)
    if held is not target:
        (on_host(target) if target.is_cuda else target).copy_(
            on_host(held) if held.is_cuda else held
        )


def _is_one_block(tensor: Tensor) -> bool:
    wide = tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last)
    return wide or tensor.is_contiguous()
