"""Checkpoints: written whole or not at all, verified before believed; the newest good one wins.

A checkpoint is a folder `step_00001000/` of `state.pt` and `manifest.json`, which holds the sha256
of the former and is written last. The folder gets its name when all of it is on the disk.
"""

import hashlib
import io
import json
import os
import shutil
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dist_train.config import ConfigError

FORMAT_VERSION = 1
STATE_FILE = "state.pt"
MANIFEST_FILE = "manifest.json"


class BadCheckpointError(ConfigError):
    """A folder that is no whole, unchanged checkpoint; says what is wrong with it."""


class CheckpointWriter:
    """Writes the states of one run in a thread, one at a time, and prunes old ones.

    Only rank 0 has one: nothing here is collective.
    """

    def __init__(
        self,
        folder: Path,
        *,
        keep_last: int,
        on_saved: Callable[[int], None],
        on_error: Callable[[str], None],
    ) -> None:
        self.folder = folder
        self._keep_last = keep_last
        self._on_saved = on_saved  # called in the thread, with the step
        self._on_error = on_error
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None
        folder.mkdir(parents=True, exist_ok=True)
        for litter in [*folder.glob(".writing-*"), *folder.glob(".replaced-*")]:
            shutil.rmtree(litter, ignore_errors=True)

    def save(self, state: dict[str, Any], *, step: int, best_step: int | None) -> None:
        """Copy `state` to host memory now and write it in the background.

        Waits for the save before this one; tensors may change as soon as this returns.
        """
        self.wait()
        snapshot = _to_host(state)
        self._pending = self._thread.submit(self._write, snapshot, step, best_step)

    def wait(self) -> bool:
        """Wait until the last save is on the disk; False, after telling, if it failed."""
        if self._pending is None:
            return True
        pending, self._pending = self._pending, None
        try:
            pending.result()
        except OSError as error:
            self._on_error(f"checkpoint not saved: {error}; the one before it is kept")
            return False
        return True

    def close(self) -> None:
        """Wait for the last save and end the thread."""
        self.wait()
        self._thread.shutdown()

    def _write(self, state: dict[str, Any], step: int, best_step: int | None) -> None:
        write_checkpoint(self.folder, state, step=step)
        self._on_saved(step)
        prune(self.folder, keep_last=self._keep_last, keep_step=best_step)


def write_checkpoint(folder: Path, state: dict[str, Any], *, step: int) -> Path:
    """Write `state` as the checkpoint of `step`; returns its folder once it is on the disk.

    Raises:
        OSError: it could not be written; nothing is left behind.
    """
    target = folder / f"step_{step:08d}"
    writing = folder / f".writing-{target.name}-{os.getpid()}"
    try:
        writing.mkdir()
        buffer = io.BytesIO()
        torch.save(state, buffer)
        data = buffer.getbuffer()
        _write_file(writing / STATE_FILE, data)
        manifest = {
            "format_version": FORMAT_VERSION,
            "step": step,
            "files": {STATE_FILE: {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}},
        }
        _write_file(writing / MANIFEST_FILE, json.dumps(manifest, indent=1).encode())
        _sync_folder(writing)
        if target.exists():  # a bad one, or the same step trained again
            replaced = folder / f".replaced-{target.name}-{os.getpid()}"
            target.rename(replaced)
            writing.rename(target)
            shutil.rmtree(replaced, ignore_errors=True)
        else:
            writing.rename(target)
        _sync_folder(folder)
    except BaseException:
        shutil.rmtree(writing, ignore_errors=True)
        raise
    return target


def list_checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoint folders, newest step first, good or bad."""
    found = [path for path in folder.glob("step_*") if path.name[5:].isdigit()]
    return sorted(found, key=lambda path: int(path.name[5:]), reverse=True)


def read_verified(path: Path) -> bytes:
    """Return the bytes of a checkpoint's state after checking them against the manifest.

    Raises:
        BadCheckpointError: something is missing, truncated, changed or of another version.
    """
    manifest_path, state_path = path / MANIFEST_FILE, path / STATE_FILE
    try:
        for file in (path, manifest_path, state_path):
            if file.is_symlink():
                raise BadCheckpointError(f"{file} is a symbolic link")
        manifest = json.loads(manifest_path.read_bytes())
        data = state_path.read_bytes()
        version, step = manifest["format_version"], manifest["step"]
        entry = manifest["files"][STATE_FILE]
        size, digest = entry["bytes"], entry["sha256"]
    except OSError as error:
        raise BadCheckpointError(f"{path}: {error.strerror or error}") from None
    except (ValueError, KeyError, TypeError) as error:
        if isinstance(error, BadCheckpointError):
            raise
        raise BadCheckpointError(f"{manifest_path} is damaged ({error!r})") from None
    if version != FORMAT_VERSION:
        raise BadCheckpointError(
            f"{path} has format version {version}, this program reads {FORMAT_VERSION}"
        )
    if f"step_{step:08d}" != path.name:
        raise BadCheckpointError(f"{path} says it is of step {step}: it was moved or renamed")
    if len(data) != size:
        raise BadCheckpointError(f"{state_path} has {len(data)} bytes instead of {size}")
    if hashlib.sha256(data).hexdigest() != digest:
        raise BadCheckpointError(f"{state_path} was changed: its sha256 is not the manifest's")
    return data


def newest_good(folder: Path, report: Callable[[str], None]) -> tuple[Path, bytes] | None:
    """Return the newest checkpoint that verifies, with its bytes; None if there is none at all.

    Args:
        folder: where the checkpoints are.
        report: told of every refused one.

    Raises:
        BadCheckpointError: there are checkpoints and not one is good.
    """
    refused: list[str] = []
    for path in list_checkpoints(folder):
        try:
            return path, read_verified(path)
        except BadCheckpointError as bad:
            refused.append(str(bad))
            report(f"checkpoint refused: {bad}; trying the one before it")
    if refused:
        raise BadCheckpointError(
            f"none of the {len(refused)} checkpoints in {folder} is good (newest: {refused[0]}): "
            "restore one from a backup, or delete them to start over"
        )
    return None


def load_state(data: bytes) -> dict[str, Any]:
    """Read a checkpoint's bytes into host tensors without running any code in them.

    Raises:
        BadCheckpointError: the bytes hold something else than tensors and plain values.
    """
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


def prune(folder: Path, *, keep_last: int, keep_step: int | None) -> None:
    """Delete all but the newest `keep_last` checkpoints and the one of `keep_step`."""
    for path in list_checkpoints(folder)[keep_last:]:
        if int(path.name[5:]) != keep_step:
            shutil.rmtree(path, ignore_errors=True)


def weights_sha256(tensors: dict[str, Tensor]) -> str:
    """Return the sha256 over names and bytes of parameters and buffers, in order."""
    digest = hashlib.sha256()
    for name, tensor in tensors.items():
        digest.update(name.encode())
        data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        digest.update(data.numpy().tobytes())
    return digest.hexdigest()


def _to_host(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: _to_host(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_to_host(item) for item in value]
    return value


def _write_file(path: Path, data: bytes | memoryview) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
