"""Which checkpoints stay: old ones pruned, bad ones set aside, the litter of a kill cleared.

Whatever is being deleted loses its name first: a half-deleted one is never taken for a checkpoint.
"""

import contextlib
import os
import shutil
from pathlib import Path
from typing import Literal

from dist_train.checkpoint_folder import list_checkpoints, step_of

KEPT_REJECTED = 1

Aside = Literal["rejected", "refused"]


def prune(folder: Path, *, keep_last: int, newest: int, keep_step: int | None) -> None:
    """Delete all but `keep_last` checkpoints up to step `newest`, and the one of `keep_step`.

    Args:
        folder: where they are.
        keep_last: how many.
        newest: the step just saved. One of a later step is bad, or not of this run's way: it does
            not count, and stays.
        keep_step: the best.

    Raises:
        OSError: one could not be taken out of the list; the rest is as it was.
    """
    up_to_newest = [path for path in list_checkpoints(folder) if step_of(path) <= newest]
    for path in up_to_newest[keep_last:]:
        if step_of(path) != keep_step:
            _delete(path)


def set_aside_after(folder: Path, step: int, *, why: Aside = "rejected") -> list[Path]:
    """Rename the checkpoints after `step` so that none of them counts; returns their new paths.

    Args:
        folder: where they are.
        step: the newest that counts.
        why: "rejected" by a rollback: they came from a run gone wrong; the newest `KEPT_REJECTED`
            of all that ever were stay for a look, the rest is deleted. "refused" by a resume, which
            could not believe them: all stay, since another program or a mended disk may read them.

    Raises:
        OSError: one could not be renamed.
    """
    aside = []
    for path in list_checkpoints(folder):
        if step_of(path) > step:
            target = folder / f".{why}-{path.name}"
            _remove(target)
            aside.append(path.rename(target))
    for path in sorted(folder.glob(".rejected-step_*"), reverse=True)[KEPT_REJECTED:]:
        _remove(path)
    if aside:
        sync_folder(folder)
    return [path for path in aside if path.exists()]


def tidy(folder: Path) -> None:
    """Remove what a kill in the middle of a save left, and put back what it was replacing.

    Call it only while no writer works in `folder`.
    """
    if not folder.is_dir() or folder.is_symlink():
        return
    for replaced in folder.glob(".replaced-step_*"):
        target = folder / replaced.name.removeprefix(".replaced-").partition("-")[0]
        if not target.exists():  # killed between the two renames
            replaced.rename(target)
    for litter in (".writing-*", ".replaced-*", ".deleting-*"):
        for path in folder.glob(litter):
            shutil.rmtree(path, ignore_errors=True)


def sync_folder(folder: Path) -> None:
    """Wait until the names in `folder` are on the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _delete(path: Path) -> None:
    doomed = path.with_name(f".deleting-{path.name}")
    _remove(doomed)
    path.rename(doomed)
    _remove(doomed)


def _remove(path: Path) -> None:
    """Delete a folder, or the link or file in its place, as far as that can be done."""
    if path.is_symlink() or path.is_file():
        with contextlib.suppress(OSError):
            path.unlink()
    else:
        shutil.rmtree(path, ignore_errors=True)
