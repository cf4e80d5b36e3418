"""What a checkpoint is on disk: listed, read and verified. Imports no torch.

A checkpoint is a folder `step_00001000/` of `state.pt` and `manifest.json`. The manifest holds the
sha256 of the former and, as its last line, that of its own bytes: no byte of either can change
unnoticed. The order of checkpoints is that of their steps; clocks play no part.
"""

import dataclasses
import errno
import hashlib
import io
import json
import os
import re
import stat
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from dist_train.config import ConfigError

FORMAT_VERSION = 2
STATE_FILE = "state.pt"
MANIFEST_FILE = "manifest.json"
MAX_MANIFEST_BYTES = 1 << 16
_NAME = re.compile(r"step_([0-9]{1,18})")
_SEAL = b',\n "manifest_sha256": "%s"\n}\n'  # the end of a manifest
_SEAL_BYTES = len(_SEAL % bytes(64))


class BadCheckpointError(ConfigError):
    """A folder that is no whole, unchanged checkpoint; says what is wrong with it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """What a checkpoint says of itself."""

    step: int
    saved_at: str  # for people: nothing is decided by it
    state_bytes: int
    state_sha256: str


def name_of(step: int) -> str:
    """Return the name of the folder of a step's checkpoint."""
    return f"step_{step:08d}"


def step_of(path: Path) -> int:
    """Return the step that a checkpoint's name says."""
    found = _NAME.fullmatch(path.name)
    assert found is not None, f"{path} is no checkpoint's name"
    return int(found[1])


def manifest_bytes(step: int, num_bytes: int, sha256: str) -> bytes:
    """Return the manifest of a state: JSON whose last entry is the sha256 of all before it."""
    record = {
        "format_version": FORMAT_VERSION,
        "step": step,
        "saved_at": time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()),
        "files": {STATE_FILE: {"bytes": num_bytes, "sha256": sha256}},
    }
    return sealed(record)


def sealed(record: dict[str, object]) -> bytes:
    """Return `record` as a manifest's bytes, with the digest of its own."""
    body = json.dumps(record, indent=1).removesuffix("\n}").encode()
    return body + _SEAL % hashlib.sha256(body).hexdigest().encode()


def list_checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoint folders, newest step first, good or bad."""
    found = [path for path in folder.glob("step_*") if _NAME.fullmatch(path.name)]
    return sorted(found, key=step_of, reverse=True)


def read_manifest(path: Path) -> Manifest:
    """Return what the checkpoint `path` says of itself, after checking its form and digest.

    Raises:
        BadCheckpointError: it is missing, changed, of another version, or names other files.
    """
    with _Folder(path) as folder:
        return _manifest(path, folder)


def read_verified(path: Path) -> bytes:
    """Return the bytes of a checkpoint's state after checking them against the manifest.

    Raises:
        BadCheckpointError: something is missing, truncated, changed, a link or of another version.
    """
    with _Folder(path) as folder:
        manifest = _manifest(path, folder)
        data = folder.read(STATE_FILE, manifest.state_bytes)
    if hashlib.sha256(data).hexdigest() != manifest.state_sha256:
        raise BadCheckpointError(
            f"{path / STATE_FILE} was changed: its sha256 is not the manifest's"
        )
    return data


def newest_step(folder: Path) -> int:
    """Return the step of the newest checkpoint that seems whole; 0 if there is none.

    Reads manifests and sizes, not gigabytes: where only the bytes of a state have changed, its step
    is returned. A resume, which reads them all, sets such a one aside, so that happens once.
    """
    for path in list_checkpoints(folder):
        try:
            size = read_manifest(path).state_bytes
            if (path / STATE_FILE).lstat().st_size == size:
                return step_of(path)
        except (BadCheckpointError, OSError):
            continue
    return 0


def newest_good(
    folder: Path,
    report: Callable[[str], None],
    *,
    prefer: Callable[[bytes], bool] = lambda data: True,
) -> tuple[Path, bytes] | None:
    """Return the newest checkpoint that verifies, with its bytes; None if there is none at all.

    Args:
        folder: where the checkpoints are.
        report: told of every refused one, and of permissions that let others change it.
        prefer: of the bytes of a good one; if it is false of all that are good, the newest of them
            is returned.

    Raises:
        BadCheckpointError: there are checkpoints and not one is good, or `folder` is a link.
    """
    refuse_link(folder)
    refused: list[str] = []
    found: tuple[Path, bytes] | None = None
    for path in list_checkpoints(folder):
        try:
            data = read_verified(path)
            preferred = prefer(data)
        except BadCheckpointError as bad:
            refused.append(str(bad))
            report(f"checkpoint refused: {bad}; trying the one before it")
            continue
        if preferred or found is None:
            found = path, data
        if preferred:
            break
    if found is not None:
        for text in open_to_others(found[0]):
            report(text)
        return found
    if refused:
        raise BadCheckpointError(
            f"none of the {len(refused)} checkpoints in {folder} is good (newest: {refused[0]}): "
            "restore one from a backup, or delete them to start over"
        )
    return None


def refuse_link(folder: Path) -> None:
    """Raise BadCheckpointError if the folder of the checkpoints is a symbolic link."""
    if folder.is_symlink():
        raise BadCheckpointError(
            f"{folder} is a symbolic link to {os.readlink(folder)}: give the run_dir whose own "
            "folder it is, or put the checkpoints themselves there"
        )


def open_to_others(path: Path) -> list[str]:
    """Return a warning if others than this user may change the checkpoint `path` on disk."""
    for part in (path.parent, path, path / MANIFEST_FILE, path / STATE_FILE):
        try:
            found = part.lstat()
        except OSError:
            continue
        if found.st_uid not in (0, os.getuid()):
            return [
                f"{part} belongs to user {found.st_uid}, not to you ({os.getuid()}): what a "
                "checkpoint holds is that user's; copy it to a folder of your own to be sure"
            ]
        if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH) and not found.st_mode & stat.S_ISVTX:
            who = "everybody" if found.st_mode & stat.S_IWOTH else "its group"
            return [
                f"{part} can be changed by {who} (mode {stat.S_IMODE(found.st_mode):o}), and so "
                f"can what this run loads: chmod -R go-w {path.parent}"
            ]
    return []


class _Folder:
    """A checkpoint's folder, open: its files are read from it and from nowhere else."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> "_Folder":
        if self._path.parent.name == "checkpoints":
            refuse_link(self._path.parent)
        flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW
        try:
            self._descriptor = os.open(self._path, flags)
        except (OSError, ValueError) as error:
            raise _unreadable(self._path, error) from None
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._descriptor)

    def read(self, name: str, size: int | None = None) -> bytes:
        """Return a file's bytes; `size` is what they must be, None is up to a manifest's limit."""
        path = self._path / name
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK  # a pipe must not make it wait
        try:
            descriptor = os.open(name, flags, dir_fd=self._descriptor)
        except OSError as error:
            raise _unreadable(path, error) from None
        with io.FileIO(descriptor, "r") as file:
            found = os.fstat(descriptor)
            if not stat.S_ISREG(found.st_mode):
                raise BadCheckpointError(f"{path} is no regular file")
            if size is not None and found.st_size != size:
                raise BadCheckpointError(f"{path} has {found.st_size} bytes instead of {size}")
            if size is None and found.st_size > MAX_MANIFEST_BYTES:
                raise BadCheckpointError(f"{path} has {found.st_size} bytes: it is no manifest")
            room = free_memory_bytes()
            if found.st_size > room:
                raise BadCheckpointError(
                    f"{path} has {found.st_size / 2**30:.1f} GiB, this machine has "
                    f"{room / 2**30:.1f} GiB of memory free"
                )
            try:
                data = file.readall()
            except OSError as error:
                raise _unreadable(path, error) from None
        if len(data) != found.st_size:
            raise BadCheckpointError(f"{path} changed while it was read")
        return data


def free_memory_bytes() -> float:
    """Return how much memory could be taken without swapping; infinity if nobody says."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(line for line in lines if line.startswith("MemAvailable:"))
        return int(free.split()[1]) * 1024
    except (OSError, StopIteration, ValueError):
        return float("inf")


def _manifest(path: Path, folder: _Folder) -> Manifest:
    file = path / MANIFEST_FILE
    data = folder.read(MANIFEST_FILE)
    body = data[:-_SEAL_BYTES]
    whole = data == body + _SEAL % hashlib.sha256(body).hexdigest().encode()
    try:
        record = json.loads(data)
        version = record["format_version"]
        if type(version) is int and version != FORMAT_VERSION:
            raise BadCheckpointError(
                f"{path} has format version {version}, this program reads {FORMAT_VERSION}"
            )
        if not whole:
            raise BadCheckpointError(f"{file} was changed: its sha256 is not its own")
        others = [name for name in record["files"] if name != STATE_FILE]
        if others:
            raise BadCheckpointError(
                f"{file} names the file {others[0][:80]!r}: a checkpoint has {STATE_FILE} alone"
            )
        entry = record["files"][STATE_FILE]
        manifest = Manifest(
            step=record["step"],
            saved_at=record["saved_at"],
            state_bytes=entry["bytes"],
            state_sha256=entry["sha256"],
        )
        wanted = (int, int, str, int, str)
        values = (version, *dataclasses.astuple(manifest))
        if any(type(value) is not kind for value, kind in zip(values, wanted, strict=True)):
            raise TypeError("a value of another type")
    except BadCheckpointError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise BadCheckpointError(f"{file} is damaged ({type(error).__name__})") from None
    if name_of(manifest.step) != path.name:
        raise BadCheckpointError(
            f"{path} says it is of step {manifest.step}: it was moved or renamed"
        )
    return manifest


def _unreadable(path: Path, error: Exception) -> BadCheckpointError:
    code = getattr(error, "errno", None)
    if code == errno.ELOOP or (code == errno.ENOTDIR and path.is_symlink()):
        return BadCheckpointError(f"{path} is a symbolic link")
    return BadCheckpointError(f"{path}: {getattr(error, 'strerror', None) or error}")
