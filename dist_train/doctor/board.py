"""Notes that the ranks leave for each other before there is any process group.

Through a folder that all should see, and through rank 0's store. Either may not work, which is
what the doctor is to find out: a note counts as soon as it came on one of the two ways.
"""

import contextlib
import json
import time
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dist_train.config.whole_file import read_json, write_atomically
from dist_train.doctor.deadline import DeadlineError, within

if TYPE_CHECKING:  # torch may be what is broken
    from torch._C._distributed_c10d import Store

POLL_SEC, POLL_EACH_SEC = 0.05, 0.001
CHANNEL_SEC = 10.0  # a note that takes longer: that way is given up


class Board:
    """This rank's notes and those of the others; `store` is set once rank 0's can be reached."""

    def __init__(self, folder: Path, rank: int) -> None:
        self.store: Store | None = None
        self.folder_error: str | None = None  # why the folder is not used any more
        self._folder: Path | None = folder
        self._rank = rank
        try:
            within(CHANNEL_SEC, lambda: self._sweep(folder))
        except (OSError, DeadlineError) as error:
            self._give_up_folder(error)

    def post(self, name: str, value: Any) -> None:
        """Leave a note, on each way that works."""
        text = json.dumps({"value": value})
        if self._folder is not None:
            path = self._folder / f"{name}.{self._rank}.json"
            try:
                within(CHANNEL_SEC, lambda: write_atomically(path, text))
            except (OSError, DeadlineError) as error:
                self._give_up_folder(error)
        store = self.store
        if store is not None:
            try:
                within(CHANNEL_SEC, lambda: store.set(f"{name}/{self._rank}", text))
            except RuntimeError:  # DeadlineError, and torch's DistNetworkError
                self.store = None

    def collect(self, name: str, ranks: Iterable[int], seconds: float) -> dict[int, Any]:
        """Return the notes of this name by rank; those that come in time, while a way works."""
        missing, found = set(ranks), {}
        end = time.monotonic() + seconds
        while True:
            for rank in sorted(missing):
                note = self._read(name, rank)
                if note is not None:
                    found[rank] = note["value"]
            missing -= found.keys()
            if not missing or time.monotonic() >= end or self.is_alone():
                return found
            time.sleep(POLL_SEC + len(missing) * POLL_EACH_SEC)

    def wait(self, name: str, rank: int, seconds: float) -> Any | None:
        """Return one rank's note; None if it does not come in time."""
        return self.collect(name, [rank], seconds).get(rank)

    def is_alone(self) -> bool:
        """Say whether neither way works."""
        return self._folder is None and self.store is None

    def _read(self, name: str, rank: int) -> dict[str, Any] | None:
        store = self.store
        if store is not None:
            key = f"{name}/{rank}"
            try:
                if within(CHANNEL_SEC, lambda: store.check([key])):
                    return json.loads(within(CHANNEL_SEC, lambda: store.get(key)))
            except RuntimeError:
                self.store = None
        if self._folder is not None:
            path = self._folder / f"{name}.{rank}.json"
            try:
                return within(CHANNEL_SEC, lambda: read_json(path)) or None
            except DeadlineError as error:
                self._give_up_folder(error)
        return None

    def _sweep(self, folder: Path) -> None:
        """Make the folder, and remove what a killed doctor of the same place has left."""
        folder.mkdir(parents=True, exist_ok=True)
        for path in folder.glob(f"*.{self._rank}.json"):
            with contextlib.suppress(FileNotFoundError):
                path.unlink()

    def _give_up_folder(self, error: Exception) -> None:
        self._folder, self.folder_error = None, f"{type(error).__name__}: {error}"
