"""What a run can be continued from: its checkpoints, one asked for, or what it began with."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from dist_train.checkpoint import HostBuffers, load_state, serialised
from dist_train.checkpoint_folder import (
    list_checkpoints,
    name_of,
    newest_good,
    open_to_others,
    read_verified,
    step_of,
)
from dist_train.checkpoint_upkeep import Aside, set_aside_after, tidy
from dist_train.distributed import Ranks
from dist_train.run_folder import RunFolder
from dist_train.state_file import outline

SKIPPED_IN_A_ROW = "skipped_in_a_row"  # of a saved state: the steps up to it that were skipped


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
        # Named from where the command was given: the user's modules may go elsewhere.
        self._resume = resume if resume in ("auto", "never") else str(Path(resume).absolute())
        self._folder = folder
        self._ranks = ranks
        self._warn = warn
        self._found: tuple[str | None, dict[str, Any]] | None = None  # by `facts`, till it is read
        self._bytes = b""  # of what was found, on rank 0, until it is handed out
        self._start: bytes | None = None  # of this attempt, on rank 0, until one is saved
        # Waits for the save that is under way, once there is a writer.
        self.wait: Callable[[], object] = lambda: tidy(folder.checkpoints)

    def facts(self) -> dict[str, Any]:
        """Return the surroundings of the state that `newest` returns next. Collective.

        Empty if there is none.

        Raises:
            BadCheckpointError: there are checkpoints, and none is good.
        """

        def look() -> tuple[str | None, dict[str, Any]]:
            origin = self._find(going_back=False)
            found = None if origin is None else outline(self._bytes).get("facts")
            return origin, found if isinstance(found, dict) else {}

        self._found = self._ranks.from_first(look)
        return self._found[1]

    def newest(self, *, going_back: bool = False) -> tuple[str, dict[str, Any]] | None:
        """Return the newest good state's place and content on all ranks. Collective.

        The run's own checkpoints win over resume=PATH: a restart continues, it does not start
        over. Without any it is what this attempt began with; None if none began.

        Args:
            going_back: pass over a state that was saved after skipped steps, where there is another
                checkpoint: its weights may be what makes the gradients not finite.

        Raises:
            BadCheckpointError: there are checkpoints, and none is good.
        """
        if self._found is None or going_back:
            origin = self._ranks.from_first(lambda: self._find(going_back=going_back))
        else:
            origin = self._found[0]
        self._found = None
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
        """Remember on rank 0 what a run without checkpoints begins with: it may have to go back.

        Collective.

        Raises:
            NotPlainError: the state holds what could never be read again; on all ranks.
        """

        def copied() -> None:
            self._start = bytes(serialised(HostBuffers().copy(state)))

        self._ranks.from_first(copied)

    def drop_start(self) -> None:
        """Forget it: there is a checkpoint."""
        self._start = None

    def set_aside_after(self, step: int, *, why: Aside) -> None:
        """Take this run's checkpoints after `step` out of what a resume may find. Collective.

        Args:
            step: the newest that may be found.
            why: rejected by a rollback, or refused by a resume; see checkpoint_upkeep.

        Raises:
            OSError: one could not be renamed.
        """

        def rename() -> None:
            self.wait()
            folder = self._folder.checkpoints
            steps = [s for s in map(step_of, list_checkpoints(folder)) if s > step]
            if not steps:
                return
            kept = [path.name for path in set_aside_after(folder, step, why=why)]
            self._folder.event("checkpoints_set_aside", step=step, steps=steps, kept=kept)
            if why == "refused":
                self._warn(f"refused checkpoints stay in {folder} as {', '.join(kept)}")

        self._ranks.from_first(rename)

    def _find(self, *, going_back: bool) -> str | None:
        self.wait()

        def prefer(data: bytes) -> bool:
            return not (going_back and outline(data).get(SKIPPED_IN_A_ROW))

        best = newest_good(self._folder.checkpoints, self._warn, prefer=prefer)
        if best is None and self._start is not None:
            best = (Path("the start of the run"), self._start)
        if best is None and self._resume not in ("auto", "never"):
            path = Path(self._resume)
            best = (path, read_verified(path))
            for text in open_to_others(path):
                self._warn(text)
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
