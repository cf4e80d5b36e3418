"""Faults of disks and files: each function injects N of one kind and says how many were survived.

Tests call them with a small N, a campaign with a large one; `seed` makes a campaign repeatable.
"""

import contextlib
import errno
import os
import random
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from dist_train.checkpoint import write_checkpoint
from dist_train.checkpoint_folder import newest_good, read_verified

STATE: dict[str, Any] = {
    "w": torch.arange(3000.0),
    "n": 3,
    "nested": {"l": [1, "a", None], "m": torch.ones(7, dtype=torch.bool)},
}


@dataclass(kw_only=True, slots=True)
class Count:
    """How many faults were injected, and which of them were not survived."""

    injected: int = 0
    missed: list[str] = field(default_factory=list)


def flip_bits(
    folder: Path, trials: int, *, seed: int, state: dict[str, Any] | None = None
) -> Count:
    """Flip one random bit of the newest of two checkpoints, again and again; every byte counts.

    Half of the flips are in the manifest: by bytes alone it would be hit once in a hundred.
    """
    older = write_checkpoint(folder, state or STATE, step=9)
    newer = write_checkpoint(folder, {**(state or STATE), "n": 4}, step=10)
    wanted = read_verified(older)
    dice, count = random.Random(seed), Count()
    for trial in range(trials):
        file = newer / ("manifest.json" if trial % 2 else "state.pt")
        place, bit = dice.randrange(file.stat().st_size), dice.randrange(8)
        with _flipped(file, place, bit):
            count.injected += 1
            told: list[str] = []
            found = newest_good(folder, told.append)
            if found is None or found != (older, wanted) or len(told) != 1:
                count.missed.append(f"bit {bit} of byte {place} of {file.name}")
    assert newest_good(folder, print) == (newer, read_verified(newer)), "the flips are undone"
    return count


def cut_files(folder: Path, trials: int, *, seed: int) -> Count:
    """Cut a random file of the newest of two checkpoints at a random place, 0 bytes included."""
    older = write_checkpoint(folder, STATE, step=9)
    newer = write_checkpoint(folder, STATE, step=10)
    dice, count = random.Random(seed), Count()
    for trial in range(trials):
        file = newer / ("manifest.json" if trial % 2 else "state.pt")
        whole = file.read_bytes()
        size = dice.randrange(len(whole)) if trial > 1 else 0
        os.truncate(file, size)
        count.injected += 1
        told: list[str] = []
        found = newest_good(folder, told.append)
        if found is None or found[0] != older or str(newer) not in told[0]:
            count.missed.append(f"{file.name} cut to {size}")
        file.write_bytes(whole)
    return count


@contextlib.contextmanager
def _flipped(file: Path, place: int, bit: int) -> Iterator[None]:
    with file.open("r+b", buffering=0) as raw:
        raw.seek(place)
        [before] = raw.read(1)
        raw.seek(place)
        raw.write(bytes([before ^ (1 << bit)]))
        yield
        raw.seek(place)
        raw.write(bytes([before]))


class SmallDisk:
    """A disk of a few MiB that can be filled: a tmpfs; `is_real` says whether one was mounted.

    Where that takes rights that a test has not, `train_on_disk` refuses its writes instead.
    """

    def __init__(self, path: Path, mib: int) -> None:
        self.path, self._bytes = path, mib << 20
        self.is_real = False

    def __enter__(self) -> "SmallDisk":
        self.path.mkdir(parents=True, exist_ok=True)
        command = ["mount", "-t", "tmpfs", "-o", f"size={self._bytes}", "none", str(self.path)]
        self.is_real = subprocess.run(command, capture_output=True, check=False).returncode == 0
        return self

    def __exit__(self, *_: object) -> None:
        if self.is_real:
            subprocess.run(["umount", "--lazy", str(self.path)], check=True)

    def fill(self) -> None:
        """Take all the room there is."""
        filler = (self.path / ".filler").open("wb", buffering=0)  # nothing is left to flush
        with filler, contextlib.suppress(OSError):
            while True:  # the rank may take or give back some of it meanwhile
                filler.write(b"\0" * max(1, shutil.disk_usage(self.path).free))

    def empty(self) -> None:
        """Give it back."""
        (self.path / ".filler").unlink(missing_ok=True)


@contextlib.contextmanager
def refusing_writes(
    folder: Path, code: int, *, when: Callable[[int], bool] = lambda size: True
) -> Iterator[Count]:
    """Let os.write below `folder` fail with `code` (EIO, EDQUOT, ENOSPC), in the middle of it."""
    real, count = os.write, Count()

    def write(descriptor: int, data: Any) -> int:
        name = os.readlink(f"/proc/self/fd/{descriptor}")
        if not name.startswith(f"{folder.resolve()}/") or not when(len(data)):
            return real(descriptor, data)
        if len(data) > 1 and not count.injected % 2:  # first a short write, as disks do
            count.injected += 1
            return real(descriptor, memoryview(data)[: len(data) // 2])
        count.injected += 1
        raise OSError(code, os.strerror(code), name)

    with mock.patch.object(os, "write", write):
        yield count


def train_on_disk(
    config: Any, disk: Path, fill_at: int, empty_at: int | None, stop_at: int | None = None
) -> dict[str, Any]:
    """Call train(config); rank 0 fills its disk before one step and empties it before another.

    Before the step `stop_at` every rank gets a SIGTERM.
    """
    from dist_train import checkpoint_writer
    from dist_train import train as loop

    small = SmallDisk(disk, 0)
    small.is_real = os.path.ismount(disk)  # whoever started this rank has tried
    full = False
    real = loop.train_step

    def step(*args: Any, **kwargs: Any) -> Any:
        nonlocal full
        if os.environ.get("RANK", "0") == "0" and kwargs["step"] in (fill_at, empty_at):
            full = kwargs["step"] == fill_at
            if small.is_real:
                small.fill() if full else small.empty()
        if kwargs["step"] == stop_at:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*args, **kwargs)

    refusal = refusing_writes(disk, errno.ENOSPC, when=lambda size: full and not small.is_real)
    with (
        refusal,
        mock.patch.object(loop, "train_step", step),
        mock.patch.object(checkpoint_writer, "FIRST_RETRY_SEC", 0.01),
        mock.patch("dist_train.saves.END_RETRY_SEC", 0.1),
        mock.patch("dist_train.saves.STOP_RETRY_SEC", 0.1),
    ):
        return loop.train(config)


def train_with_a_wild_clock(config: Any, seed: int) -> dict[str, Any]:
    """Call train(config) while every look at the wall clock is off by up to a day, either way."""
    import time

    from dist_train import train as loop

    dice = random.Random(f"{seed} {os.environ.get('RANK')}")
    real = time.time

    def wild() -> float:
        return real() + dice.uniform(-86400, 86400)

    with mock.patch.object(time, "time", wild):
        return loop.train(config)


def train_killed_in_save(config: Any, save: int, offset: float, mark: str) -> dict[str, Any]:
    """Call train(config); rank 0 is killed in its `save`-th save, `offset` (0..1) of the way.

    A save is cut into many small writes, syncs and renames; the offset chooses one of them.
    """
    from dist_train import checkpoint_writer
    from dist_train import train as loop

    if os.environ.get("RANK", "0") != "0":
        return loop.train(config)
    saves, real_write, calls = 0, checkpoint_writer.write_checkpoint, 0
    names = ("write", "fsync", "rename", "mkdir")
    real = {name: getattr(os, name) for name in names}

    def fire() -> None:
        Path(mark).touch()
        os.kill(os.getpid(), signal.SIGKILL)

    def counted(name: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            if saves == save and calls >= offset * total:
                fire()
            if name == "write":
                return real["write"](args[0], memoryview(args[1])[:2048])
            return real[name](*args, **kwargs)

        return call

    total = 0

    def write_checkpoint_slowly(*args: Any, **kwargs: Any) -> Path:
        nonlocal saves, calls, total
        saves += 1
        total, calls = max(total, calls), 0  # a save has as many calls as the one before
        with contextlib.ExitStack() as stack:
            for name in names:
                stack.enter_context(mock.patch.object(os, name, counted(name)))
            path = real_write(*args, **kwargs)
        if saves == save:  # the very end: written, and not yet announced
            fire()
        return path

    with mock.patch.object(checkpoint_writer, "write_checkpoint", write_checkpoint_slowly):
        return loop.train(config)
