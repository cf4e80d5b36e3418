"""Decode every picture of a folder once, in parallel, into one memory-mapped file.

Published by rename under a lock, and named after the paths, sizes and times of all files, so
that a cache is complete, current, or not there. Imports no torch.
"""

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NoReturn

import numpy as np

from dist_train.config.schema import ConfigError
from dist_train.data import decode
from dist_train.data.cache import locked
from dist_train.data.folder_scan import PictureFile

FORMAT = 1  # raise when decoding changes what the bytes are
INLINE_PICTURES = 256  # fewer are decoded faster than processes start
JOB_PICTURES = 4000  # at most, so that the processes end together


@dataclass(frozen=True, kw_only=True, slots=True)
class Verified:
    """Every file has been decoded once without fault."""

    height: int  # of the first picture
    width: int
    uneven: str | None  # "a.jpg is 40x30, b.jpg is 32x32"; None: one size
    pixels: np.ndarray | None = None  # (num, height, width, 3), uint8, a read-only memmap


def verified_pictures(
    root: Path, files: Sequence[PictureFile], *, cache_dir: Path, max_bytes: int
) -> Verified:
    """Decode the files, or find that it has been done; waits for another process doing it.

    Args:
        root: what the files' paths are relative to, resolved; names the cache.
        files: in the order of the rows.
        cache_dir: where the cache is kept.
        max_bytes: larger decoded data, and data of uneven sizes, are verified but not kept.

    Raises:
        ConfigError: a file cannot be decoded (named), or the cache cannot be written.
    """
    folder = cache_dir / "pictures" / hashlib.sha256(os.fsencode(root)).hexdigest()[:16]
    stem = folder / _fingerprint(files)
    found = _find(stem, len(files), max_bytes=max_bytes)
    if found is not None:
        return found
    with locked(folder, key="data.cache_dir"):
        found = _find(stem, len(files), max_bytes=max_bytes)
        if found is None:
            _build(stem, [str(root / file.path) for file in files], max_bytes=max_bytes)
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
    if found.uneven is not None or num_bytes > max_bytes:
        return found
    path = stem.with_suffix(".u8")
    if not path.is_file() or path.stat().st_size != num_bytes:
        return None
    pixels = np.memmap(path, dtype=np.uint8, mode="r", shape=shape)
    return Verified(height=found.height, width=found.width, uneven=None, pixels=pixels)


def _build(stem: Path, paths: list[str], *, max_bytes: int) -> None:
    """Decode everything and publish the pixels, then the record that makes them count."""
    for old in stem.parent.glob("[!.]*"):  # made from other files, or left by a killed process
        old.unlink()
    try:
        width, height = decode.read_rgb(paths[0]).size
    except Exception as error:  # as in decode.decode
        _refuse([f"{paths[0]} {decode.why_unreadable(error)}"])
    temporary = stem.with_suffix(".tmp")
    num_bytes = len(paths) * height * width * 3
    pixels_path = temporary if num_bytes <= max_bytes else None
    if pixels_path is not None:
        with open(pixels_path, "wb") as file:
            os.posix_fallocate(file.fileno(), 0, num_bytes)  # a full disk is known now
    try:
        outcomes = _decode_all(paths, height=height, width=width, pixels_path=pixels_path)
        failed = [line for outcome in outcomes for line in outcome.failed]
        uneven = [line for outcome in outcomes for line in outcome.uneven]
        if failed:
            _refuse(failed)
        if pixels_path is not None and not uneven:
            _publish(pixels_path, stem.with_suffix(".u8"))
    finally:
        temporary.unlink(missing_ok=True)
    note = f"{paths[0]} is {width}x{height}, {uneven[0]}" if uneven else None
    temporary.write_text(json.dumps({"height": height, "width": width, "uneven": note}))
    _publish(temporary, stem.with_suffix(".json"))


def _decode_all(
    paths: list[str], *, height: int, width: int, pixels_path: Path | None
) -> list[decode.Outcome]:
    inline = len(paths) <= INLINE_PICTURES
    num_workers = 1 if inline else len(os.sched_getaffinity(0))
    size = min(JOB_PICTURES, -(-len(paths) // num_workers))
    jobs = [
        decode.Job(
            paths=paths[row : row + size],
            height=height,
            width=width,
            pixels_path=None if pixels_path is None else str(pixels_path),
            first_row=row,
            parent=None if inline else os.getpid(),
        )
        for row in range(0, len(paths), size)
    ]
    if inline:
        return [decode.decode(job) for job in jobs]
    with ThreadPoolExecutor(num_workers) as pool:  # each thread waits for one process
        return list(pool.map(_decode_in_process, jobs))


def _decode_in_process(job: decode.Job) -> decode.Outcome:
    done = subprocess.run(
        [sys.executable, "-P", decode.__file__],  # -P: this folder's names hide no library
        input=json.dumps(asdict(job)),
        capture_output=True,
        text=True,
    )
    if done.returncode != 0:
        raise RuntimeError(f"a decoding process ended with {done.returncode}: {done.stderr}")
    return decode.Outcome(**json.loads(done.stdout))


def _refuse(failed: list[str]) -> NoReturn:
    others = f" (the first of {len(failed)} such files)" if len(failed) > 1 else ""
    raise ConfigError(f"{failed[0]}{others}: copy it again or remove it")


def _publish(temporary: Path, path: Path) -> None:
    with open(temporary, "rb") as file:
        os.fsync(file.fileno())
    os.replace(temporary, path)
