"""Which checkpoints stay: old ones pruned, bad ones set aside, the litter of a kill cleared.

Whatever is being deleted loses its name first: a half-deleted one is never taken for a checkpoint.
"""

import os
import shutil
from pathlib import Path

from dist_train.checkpoint_folder import list_checkpoints, step_of

KEPT_REJECTED = 1


def prune(folder: Path, *, keep_last: int, keep_step: int | None) -> None:
    """Delete all but the newest `keep_last` checkpoints and the one of `keep_step`.

    Raises:
        OSError: one could not be taken out of the list; the rest is as it was.
    """
    for path in list_checkpoints(folder)[keep_last:]:
        if step_of(path) != keep_step:
            _delete(path)


def set_aside_after(folder: Path, step: int) -> list[Path]:
    """Rename the checkpoints after `step` so that none of them counts; returns their new paths.

    For a rollback: what was saved after the step that it goes back to came from a run gone wrong.
    The newest `KEPT_REJECTED` of all that were ever set aside stay for a look, the rest is deleted.
    """
    aside = []
    for path in list_checkpoints(folder):
        if step_of(path) > step:
            target = folder / f".rejected-{path.name}"
            if target.exists():
                shutil.rmtree(target)
            aside.append(path.rename(target))
    for path in sorted(folder.glob(".rejected-step_*"), reverse=True)[KEPT_REJECTED:]:
        shutil.rmtree(path, ignore_errors=True)
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
    if doomed.exists():
        shutil.rmtree(doomed, ignore_errors=True)
    path.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)
