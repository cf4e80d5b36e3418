"""Copies to a GPU on another stream than the one that goes on with them: it must wait for them."""

import ctypes

import torch
from torch import Tensor

from tests.emulated_gpu.build import RUNTIME, built

DEFAULT_STREAMS = (0, 1, 2)  # CUDA's names of the one that a device begins with


class Arrivals:
    """What was copied beside the default stream, and whether kernels come after it."""

    def __init__(self) -> None:
        self.early = 0  # kernels that did not
        self._copies: dict[int, tuple[int, int]] = {}  # by memory: the stream, and where in it

    def note(self, target: Tensor) -> None:
        """Remember a copy to `target` that was given to the current stream."""
        stream = torch.cuda.current_stream(target.device).cuda_stream
        place = target.untyped_storage().data_ptr()
        self._copies.pop(place, None)
        if stream not in DEFAULT_STREAMS:
            position = _runtime().emulated_position
            position.restype = ctypes.c_long
            self._copies[place] = stream, position(ctypes.c_void_p(stream))

    def check(self, tensors: list[Tensor]) -> None:
        """Look whether a kernel of the current stream that uses these comes after their copies."""
        for tensor in tensors if self._copies else ():
            sent = self._copies.get(tensor.untyped_storage().data_ptr()) if tensor.is_cuda else None
            if sent is not None:
                here, (stream, at) = torch.cuda.current_stream(tensor.device).cuda_stream, sent
                places = ctypes.c_void_p(here), ctypes.c_void_p(stream), ctypes.c_long(at)
                self.early += not _runtime().emulated_is_behind(*places)


def _runtime() -> ctypes.CDLL:
    return ctypes.CDLL(str(built() / RUNTIME))
