"""Errors after which a process can do nothing more with its GPU: only a new one can."""

import torch

from dist_train.memory import is_out_of_memory

# In errors that come as another type: of Triton, of NCCL, of cuBLAS.
LASTING = (  # cudaGetErrorString of those that stay until the process ends
    "device-side assert",
    "hardware stack error",
    "illegal instruction",
    "illegal memory access",
    "invalid program counter",
    "launch failure",
    "launch timed out",
    "misaligned address",
    "operation not supported on global/shared address space",
    "uncorrectable",  # ECC, NVLink
)


def is_broken_device(error: Exception) -> bool:
    """Say whether an error may be one that every further call of the device returns, too."""
    if is_out_of_memory(error):
        return False
    if isinstance(error, torch.AcceleratorError):  # what CUDA itself returned
        return True
    return any(word in str(error) for word in LASTING)
