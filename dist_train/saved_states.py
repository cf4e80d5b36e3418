"""What a run can be continued from: its checkpoints, one asked for, or what it began with."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from dist_train.checkpoint import HostBuffers, load_state, serialised
from dist_train.checkpoint_folder import name_of, newest_good, open_to_others, read_verified
from dist_train.checkpoint_upkeep import tidy
from dist_train.distributed import Ranks
from dist_train.run_folder import RunFolder


class SavedStates:
    """Reads and verifies on rank 0 and sends the others the bytes: no shared disk is needed."""

    def __init__(
        self, resume: str, folder: RunFolder, ranks: Ranks, warn: Callable[[str], None]
    ) -> None:
        """Look nowhere yet.

        Args:
            resume: of the configuration: auto, never, or the path of a checkpoint.
            folder: the run's.
            ranks: the ranks.
            warn: told of every refused checkpoint, on rank 0.
        """
        self._resume = resume
        self._folder = folder
        self._ranks = ranks
        self._warn = warn
        self._bytes = b""  # of what was found, on rank 0, until it is handed out
        self._start: bytes | None = None  # a new run's state, on rank 0, until one is saved
        # Waits for the save that is under way, once there is a writer.
        self.wait: Callable[[], object] = lambda: tidy(folder.checkpoints)

    def newest(self) -> tuple[str, dict[str, Any]] | None:
        """Return the newest good state's place and content on all ranks. Collective.

        The run's own checkpoints win over resume=PATH: a restart continues, it does not start
        over. Before a new run's first save it is what the run began with; None if none began.

        Raises:
            BadCheckpointError: there are checkpoints, and none is good.
        """
        origin = self._ranks.from_first(self._find)
        if origin is None:
            return None
        state = load_state(self._ranks.broadcast_bytes(self._bytes or None))
        self._bytes = b""
        return origin, state

    def of_step(self, step: int) -> dict[str, Any]:
        """Return the content of this run's checkpoint of `step`. Collective."""

        def read() -> bytes:
            self.wait()  # it may be the one being written
            return read_verified(self._folder.checkpoints / name_of(step))

        return load_state(self._ranks.from_first(read))

    def keep_start(self, state: dict[str, Any]) -> None:
        """Remember on rank 0 what a new run begins with: it may have to go back to it."""
        if self._ranks.rank == 0:
            self._start = bytes(serialised(HostBuffers().copy(state)))

    def drop_start(self) -> None:
        """Forget it: there is a checkpoint."""
        self._start = None

    def _find(self) -> str | None:
        self.wait()
        best = newest_good(self._folder.checkpoints, self._warn)
        if best is None and self._resume not in ("auto", "never"):
            path = Path(self._resume)
            best = (path, read_verified(path))
            for text in open_to_others(path):
                self._warn(text)
        if best is None and self._start is not None:
            best = (Path("the start of the run"), self._start)
        if best is None:
            return None
        self._bytes = best[1]
        return str(best[0])


def bytes_of(state: dict[str, Any]) -> int:
    """Return the bytes of a state's tensors."""
    return sum(t.numel() * t.element_size() for t in _tensors(state))


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)
