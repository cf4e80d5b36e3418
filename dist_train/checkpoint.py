"""Checkpoints: written whole or not at all, read without running any code in them.

What a checkpoint is on disk, and how it is verified, is in checkpoint_folder.py; its folder gets
its name when all of it is on the disk. Only rank 0 reads and writes: nothing here is collective.
"""

import ctypes
import errno
import hashlib
import io
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dist_train.checkpoint_folder import (
    MANIFEST_FILE,
    STATE_FILE,
    BadCheckpointError,
    manifest_bytes,
    name_of,
)
from dist_train.checkpoint_upkeep import sync_folder
from dist_train.memory import is_out_of_memory
from dist_train.plain_state import Place, plain
from dist_train.state_file import outline

PIECE_BYTES = 1 << 20  # written and hashed in turns, while they are in the cache


class HostBuffers:
    """Copies states into host memory that is kept from one copy to the next.

    On CUDA the memory is pinned, as far as it can be. Fresh memory would cost a page fault for
    every 4 KiB, which is several times what copying costs.
    """

    def __init__(self) -> None:
        self.not_pinned = ""  # why some of it is not, or not any more
        self._kept: dict[Place, Tensor] = {}
        self._used: set[Place] = set()
        self._on_device = False

    def copy(self, state: dict[str, Any]) -> dict[str, Any]:
        """Return `state` with its tensors copied; the copy before this one is overwritten. Waits.

        Raises:
            NotPlainError: it holds what could be saved and never be read again; says where.
        """
        self._used, self._on_device = set(), False
        copied = plain(state, self._tensor)
        self._kept = {place: self._kept[place] for place in self._used}
        if self._on_device:  # the copies were only started
            torch.cuda.current_stream().synchronize()
        return copied

    def _tensor(self, tensor: Tensor, place: Place) -> Tensor:
        kept = self._kept.get(place)
        form = (tensor.shape, tensor.dtype, tensor.stride())
        if kept is None or (kept.shape, kept.dtype, kept.stride()) != form:
            kept = self._room(tensor)
            self._kept[place] = kept
        self._used.add(place)
        self._on_device |= tensor.is_cuda
        if tensor.device.type != "cpu" or not _is_one_block(tensor):
            return kept.copy_(tensor, non_blocking=tensor.is_cuda)
        # In one thread: copy_ takes all of them, and waits for each where cores are shared.
        ctypes.memmove(kept.data_ptr(), tensor.data_ptr(), tensor.nbytes)
        return kept

    def _room(self, tensor: Tensor) -> Tensor:
        if tensor.is_cuda and not self.not_pinned:
            try:
                return torch.empty_like(tensor, device="cpu", pin_memory=True)
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                self.not_pinned = str(error).splitlines()[0]
        return torch.empty_like(tensor, device="cpu")


def _is_one_block(tensor: Tensor) -> bool:
    """Return whether the tensor's bytes, one after the other, are its values."""
    if tensor.is_conj() or tensor.is_neg():
        return False
    wide = tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last)
    return wide or tensor.is_contiguous()


def write_checkpoint(folder: Path, state: dict[str, Any], *, step: int) -> Path:
    """Write `state` as the checkpoint of `step`; returns its folder once it is on the disk.

    Raises:
        OSError: it could not be written; nothing is left behind.
    """
    target = folder / name_of(step)
    writing = folder / f".writing-{target.name}-{os.getpid()}"
    check_free(folder, _tensor_bytes(state))
    try:
        writing.mkdir(mode=0o755)
        num_bytes, sha256 = _write_state(writing / STATE_FILE, state)
        _write_file(writing / MANIFEST_FILE, manifest_bytes(step, num_bytes, sha256))
        sync_folder(writing)
        if target.exists():  # a bad one, or the same step trained again
            replaced = folder / f".replaced-{target.name}-{os.getpid()}"
            target.rename(replaced)  # a kill from here on: checkpoint_folder.tidy mends it
            writing.rename(target)
            sync_folder(folder)
            shutil.rmtree(replaced, ignore_errors=True)
        else:
            writing.rename(target)
            sync_folder(folder)
    except BaseException:
        shutil.rmtree(writing, ignore_errors=True)
        raise
    return target


def check_free(folder: Path, num_bytes: int) -> None:
    """Raise OSError if the disk has no room for `num_bytes`, before any of them is written."""
    free = shutil.disk_usage(folder).free
    if free < num_bytes:
        text = f"{os.strerror(errno.ENOSPC)}: {free:,} of {num_bytes:,} bytes are free"
        raise OSError(errno.ENOSPC, text, str(folder))


def serialised(state: dict[str, Any]) -> memoryview:
    """Return `state` as the bytes of a state.pt."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getbuffer()


def load_state(data: bytes) -> dict[str, Any]:
    """Read a checkpoint's bytes into host tensors without running any code in them.

    Raises:
        BadCheckpointError: the bytes hold something else than tensors and plain values.
    """
    outline(data)  # sizes, names and instructions: refused before torch reads them
    try:
        return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # whatever the unpickler meets in bytes of unknown origin
        told = [
            line for line in str(error).splitlines() if "error" in line or "Unsupported" in line
        ]
        raise BadCheckpointError(
            f"the state holds more than tensors and plain values, or is damaged: "
            f"{(told or [repr(error)])[0].strip()[:200]}"
        ) from None


def weights_sha256(tensors: dict[str, Any]) -> str:
    """Return the sha256 over names and bytes of parameters and buffers, in order.

    What else a state dictionary holds, a module's extra state, does not count.
    """
    digest = hashlib.sha256()
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            continue
        digest.update(name.encode())
        data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        digest.update(data.numpy().tobytes())
    return digest.hexdigest()


def _tensor_bytes(value: Any) -> int:
    """Return how many bytes the tensors of a state take."""
    if isinstance(value, Tensor):
        return value.nbytes
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return sum(map(_tensor_bytes, parts))


def _write_state(path: Path, state: dict[str, Any]) -> tuple[int, str]:
    """Write `state` as a state.pt; returns how many bytes it has, and their sha256."""
    with _NewFile(path) as file:
        sink: Any = file  # torch declares a whole IO[bytes], and calls write and flush
        torch.save(state, sink)
        file.sync()
    return file.num_bytes, file.sha256


def _write_file(path: Path, data: bytes) -> None:
    with _NewFile(path) as file:
        file.write(memoryview(data))
        file.sync()


class _NewFile:
    """A file that torch.save can write to, which is hashed on its way and never whole in memory.

    What goes wrong is raised by `sync`: an error would cross torch's writer, which is in C++.
    """

    def __init__(self, path: Path) -> None:
        self.num_bytes = 0
        self._sha256 = hashlib.sha256()
        self._small = bytearray()  # not written yet: torch.save writes many a few bytes
        self._error: Exception | None = None
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)

    def __enter__(self) -> "_NewFile":
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._descriptor)

    @property
    def sha256(self) -> str:
        """The hash of all bytes, once `sync` has returned."""
        return self._sha256.hexdigest()

    def write(self, data: memoryview) -> int:
        """Append bytes."""
        size = len(data)
        self.num_bytes += size
        try:
            if size < PIECE_BYTES:
                self._small += data
            if max(size, len(self._small)) >= PIECE_BYTES:
                self._write_small()
            if size >= PIECE_BYTES:
                for start in range(0, size, PIECE_BYTES):
                    self._write(data[start : start + PIECE_BYTES])
        except Exception as error:  # a disk, a memory limit
            self._error = self._error or error
        return size

    def flush(self) -> None:
        """Do nothing: torch.save calls it, and `sync` follows."""

    def sync(self) -> None:
        """Return once all is on the disk.

        Raises:
            Exception: some of it could not be written: whatever went wrong first.
        """
        if self._error is not None:
            raise self._error
        self._write_small()
        os.fsync(self._descriptor)

    def _write_small(self) -> None:
        small, self._small = self._small, bytearray()
        self._write(memoryview(small))

    def _write(self, piece: memoryview) -> None:
        if self._error is not None:
            return
        self._sha256.update(piece)
        while piece:
            piece = piece[os.write(self._descriptor, piece) :]
