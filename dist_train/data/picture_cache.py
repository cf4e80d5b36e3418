"""Decode every picture of a folder once, in parallel, into one memory-mapped file.

Published by rename under a lock, and named after the paths, sizes and times of all files, so
that a cache is complete, current, or not there. Imports no torch.
"""

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import numpy as np

from dist_train.config.schema import ConfigError
from dist_train.data import decode
from dist_train.data.cache import SignOfLife, locked, unseen
from dist_train.data.folder_scan import PictureFile
from dist_train.data.slices import Partial, decode_rest, progress_in, sync

FORMAT = 2  # raise when decoding changes what the bytes are
UNUSED_SEC = 7 * 86400.0  # a cache that nobody has opened for so long is deleted


@dataclass(frozen=True, kw_only=True, slots=True)
class Verified:
    """Every file has been decoded once without fault."""

    height: int  # of the first picture
    width: int
    uneven: str | None  # "a.jpg is 40x30, b.jpg is 32x32"; None: one size
    pixels: np.ndarray | None = None  # (num, height, width, 3), uint8, a read-only memmap


def verified_pictures(
    root: Path,
    files: Sequence[PictureFile],
    *,
    cache_dir: Path,
    max_bytes: int,
    sign: SignOfLife = unseen,
) -> Verified:
    """Decode the files, or find that it has been done; waits for another process doing it.

    Args:
        root: what the files' paths are relative to, resolved; names the cache.
        files: in the order of the rows.
        cache_dir: where the cache is kept.
        max_bytes: larger decoded data, and data of uneven sizes, are verified but not kept.
        sign: called while this process decodes, and while the one that it waits for does.

    Raises:
        ConfigError: a file cannot be decoded (named), or the cache cannot be written.
    """
    folder = cache_dir / "pictures" / hashlib.sha256(os.fsencode(root)).hexdigest()[:16]
    stem = folder / _fingerprint(files)
    found = _find(stem, len(files), max_bytes=max_bytes)
    if found is not None:
        return found
    last = progress_in(folder)

    def waiting() -> None:
        nonlocal last
        now = progress_in(folder)
        if now is not None and now != last:  # else there is no sign of it
            sign(now)
        last = now

    with locked(folder, key="data.cache_dir", waiting=waiting):
        found = _find(stem, len(files), max_bytes=max_bytes)
        if found is None:
            _build(stem, root, files, max_bytes=max_bytes, sign=sign)
            found = _find(stem, len(files), max_bytes=max_bytes)
    assert found is not None, f"{stem} was just built"
    return found


def _fingerprint(files: Sequence[PictureFile]) -> str:
    digest = hashlib.sha256(f"{FORMAT}".encode())
    for file in files:
        digest.update(os.fsencode(f"\0{file.path}\0{file.num_bytes}\0{file.mtime_ns}"))
    return digest.hexdigest()[:32]


def _find(stem: Path, num: int, *, max_bytes: int) -> Verified | None:
    try:
        found = Verified(**json.loads(stem.with_suffix(".json").read_bytes()))
    except (OSError, ValueError, TypeError):  # absent or damaged: to be built
        return None
    shape = (num, found.height, found.width, 3)
    num_bytes = num * found.height * found.width * 3
    _note_use(stem.with_suffix(".json"))
    if found.uneven is not None or num_bytes > max_bytes:
        return found
    path = stem.with_suffix(".u8")
    try:
        if path.stat().st_size != num_bytes:
            return None
        _note_use(path)
        pixels = np.memmap(path, dtype=np.uint8, mode="r", shape=shape)
    except FileNotFoundError:
        return None
    return Verified(height=found.height, width=found.width, uneven=None, pixels=pixels)


def _note_use(path: Path) -> None:
    with contextlib.suppress(OSError):  # another user's, or read-only: then nobody deletes it
        os.utime(path)


def _build(
    stem: Path, root: Path, files: Sequence[PictureFile], *, max_bytes: int, sign: SignOfLife
) -> None:
    """Decode everything and publish the pixels, then the record that makes them count."""
    _delete_unused(stem.parent)
    paths = [str(root / file.path) for file in files]
    try:
        width, height = decode.read_rgb(paths[0]).size
    except Exception as error:  # as in decode.decode
        _refuse([f"{paths[0]} {decode.why_unreadable(error)}"])
    num_bytes = len(paths) * height * width * 3
    partial = Partial(
        stem.parent,
        {"files": stem.name, "height": height, "width": width},
        num=len(paths),
        num_bytes=num_bytes if num_bytes <= max_bytes else 0,
    )
    try:
        failed = decode_rest(partial, paths, height=height, width=width, sign=sign)
        if failed:
            _refuse(failed)
    except (ConfigError, OSError):  # the files must change, or the disk is full
        partial.remove()
        raise
    if partial.pixels_path is not None and partial.uneven is None:
        _publish(partial.pixels_path, stem.with_suffix(".u8"))
    note = f"{paths[0]} is {width}x{height}, {partial.uneven}" if partial.uneven else None
    temporary = stem.with_suffix(".tmp")
    temporary.write_text(json.dumps({"height": height, "width": width, "uneven": note}))
    _publish(temporary, stem.with_suffix(".json"))
    partial.remove()


def _delete_unused(folder: Path) -> None:
    """Delete caches of other files, if old: what is younger may be mapped, also on other nodes."""
    for path in folder.glob("[!.]*"):
        if time.time() - path.stat().st_mtime > UNUSED_SEC:
            path.unlink()


def _refuse(failed: list[str]) -> NoReturn:
    others = f" (the first of {len(failed)} such files)" if len(failed) > 1 else ""
    raise ConfigError(f"{failed[0]}{others}: copy it again or remove it")


def _publish(temporary: Path, path: Path) -> None:
    sync(temporary)
    os.replace(temporary, path)
