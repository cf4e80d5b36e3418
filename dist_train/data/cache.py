"""Where downloaded and decoded pictures are kept, and the lock around making them."""

import fcntl
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from dist_train.config.schema import ConfigError, DataConfig

LOOK_SEC = 0.5  # between two tries for a lock that another process has

# Called while long work goes on: with a line for the user, or with None.
SignOfLife = Callable[[str | None], None]


def unseen(_line: str | None) -> None:
    """Show nobody that work goes on."""


def cache_root(config: DataConfig) -> Path:
    """`data.cache_dir`, else $XDG_CACHE_HOME/dist_train, else ~/.cache/dist_train."""
    if config.cache_dir is not None:
        return Path(config.cache_dir).expanduser().resolve()
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser().resolve() / "dist_train"


@contextmanager
def locked(folder: Path, *, key: str, waiting: Callable[[], None] | None = None) -> Iterator[None]:
    """Hold the folder's lock, making the folder; waits while another process or node has it.

    The kernel drops a lockf lock when its process dies, however it dies.

    Args:
        folder: what is locked.
        key: the setting to change if the folder cannot be written.
        waiting: called again and again while another has the lock.

    Raises:
        ConfigError: the folder, or a file in it, cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / ".lock", "a") as lock:
            _take(lock, waiting)
            yield
    except OSError as error:
        raise ConfigError(
            f"cannot write in {folder} ({error.strerror or error}): "
            f"set {key} to a folder that is writable and has space"
        ) from error


def _take(lock: TextIO, waiting: Callable[[], None] | None) -> None:
    if waiting is None:
        fcntl.lockf(lock, fcntl.LOCK_EX)
        return
    while True:
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except (BlockingIOError, PermissionError):  # man 3 lockf: either
            waiting()
            time.sleep(LOOK_SEC)
