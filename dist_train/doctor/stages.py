"""Stages that all ranks go through together, without a process group.

A stage begins when rank 0 says so and has a deadline; a rank that fails in it or does not come
back is a finding, and the others go on.
"""

from collections.abc import Callable
from typing import Any

from dist_train.doctor.board import Board
from dist_train.doctor.deadline import DeadlineError, within

MARGIN_SEC = 15.0  # for notes to come through a slow folder
PATIENCE_SEC = 400.0  # of a rank for rank 0's next word: longer than any stage takes


class LeftAloneError(RuntimeError):
    """Rank 0 cannot be heard: there is nobody to report to."""


class Stages:
    """This rank's way through the stages; on rank 0 also who takes part and who was lost."""

    def __init__(self, board: Board, rank: int) -> None:
        self.crew: list[int] = []
        self.lost: dict[str, dict[int, str]] = {}
        self._board = board
        self._rank = rank

    def run(
        self, name: str, work: Callable[[Any], Any], *, seconds: float, note: Any = None
    ) -> dict[int, Any]:
        """Do `work` on all ranks at once; returns their results by rank, on rank 0 alone.

        Args:
            name: of the stage.
            work: takes rank 0's note, returns what JSON can hold.
            seconds: its deadline.
            note: what rank 0 tells the others.

        Raises:
            LeftAloneError: rank 0's word does not come.
        """
        if self._rank == 0:
            self._board.post(f"begin {name}", note)
        else:
            begin = self._board.collect(f"begin {name}", [0], PATIENCE_SEC)
            if 0 not in begin:
                raise LeftAloneError(f"rank {self._rank} hears nothing of rank 0 before {name}")
            note = begin[0]
        result: dict[str, Any] = {"value": None, "failed": ""}
        try:
            result["value"] = within(seconds, lambda: work(note))
        except DeadlineError as late:
            result["failed"] = str(late)
        except Exception as error:  # a finding, whatever it is: the other stages go on
            result["failed"] = f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]
        self._board.post(name, result)
        if self._rank != 0:
            return {}
        came = self._board.collect(name, self.crew, seconds + MARGIN_SEC)
        lost = {rank: "no word came" for rank in self.crew if rank not in came}
        lost |= {rank: note["failed"] for rank, note in came.items() if note["failed"]}
        if lost:
            self.lost[name] = lost
        self.crew = [rank for rank in self.crew if rank in came]  # nobody waits for it again
        return {rank: note["value"] for rank, note in came.items() if not note["failed"]}
