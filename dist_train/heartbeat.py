"""Heartbeats: where a rank is and that it lives, in memory that the node's monitor reads.

Imports the standard library only: the monitor has no torch.
"""

import mmap
import struct
import time
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Literal, NamedTuple

Phase = Literal[
    "start",
    "logging",
    "evaluation",
    "checkpoint",
    "data",
    "forward",
    "backward",
    "all-reduce",
    "optimizer",
    "end",
]
# In the order in which a rank passes them at one value of `step`: at a boundary `step` batches are
# consumed, and the batch that follows has this number.
PHASES: tuple[Phase, ...] = Phase.__args__
NUMBER_OF = {phase: number for number, phase in enumerate(PHASES)}
ALL_REDUCE = NUMBER_OF["all-reduce"]
IN_STEP = range(NUMBER_OF["data"], NUMBER_OF["optimizer"] + 1)

Call = Literal["none", "all_reduce", "control_sum", "broadcast", "gather", "barrier", "exchange"]
CALLS: tuple[Call, ...] = Call.__args__
NUMBER_OF_CALL = {call: number for number, call in enumerate(CALLS)}

NOT_YET, HERE, LEFT = range(3)
IDENTITY = struct.Struct("=5q")
BEAT = struct.Struct("=10q")
BEAT_AT = 64  # its own cache line
SLOT_BYTES = 192


class Identity(NamedTuple):
    """Who writes a slot."""

    presence: int  # NOT_YET | HERE | LEFT
    rank: int
    pid: int
    started: int  # clock ticks since boot: a process number is used again, this pair is not
    stacks: int  # the descriptor, in that process, to which it writes its stacks on demand


class Beat(NamedTuple):
    """The last sign of life."""

    phase: int
    waits: int  # 1: inside a collective, for other ranks
    step: int
    beats: int  # how many so far
    at_ns: int  # CLOCK_MONOTONIC
    busy_ns: int  # spent so far in the phases of a step, collectives not counted
    batches: int  # of evaluations, begun so far
    calls: int  # of collectives, begun so far: the same on all ranks at the same place
    call: int  # the last one of them
    values: int  # how many values it was given; 0: not known


class Pulse:
    """Writes one rank's beats: 0.6 microseconds each, no lock, no system call.

    Until it is attached to the monitor's memory it writes into memory of its own.
    """

    def __init__(self) -> None:
        self._buffer: bytearray | mmap.mmap = bytearray(SLOT_BYTES)
        self._first = 0
        self._number, self._step, self._beats, self._busy = 0, 0, 0, 0
        self._batches, self._calls, self._call, self._values = 0, 0, 0, 0
        self._since = time.monotonic_ns()
        self._not_busy: int | None = None  # a phase of the step that is waiting and not work
        self._waiting = _Waiting(self)

    def attach(
        self, memory: mmap.mmap, slot: int, identity: Identity, *, on_gpu: bool = False
    ) -> None:
        """Beat into `slot` of the monitor's memory from now on.

        `on_gpu`: collectives return at once and the rank waits for the others where it reads the
        norm, so the time of "all-reduce" is no work of its own.
        """
        self._not_busy = ALL_REDUCE if on_gpu else None
        self._buffer, self._first = memory, slot * SLOT_BYTES
        self._write(0)
        IDENTITY.pack_into(memory, self._first, NOT_YET, *identity[1:])
        IDENTITY.pack_into(memory, self._first, *identity)  # presence last: the rest is there

    def leave(self) -> None:
        """Tell the monitor that this rank needs no watching any more."""
        identity = IDENTITY.unpack_from(self._buffer, self._first)
        IDENTITY.pack_into(self._buffer, self._first, LEFT, *identity[1:])
        self._buffer, self._first = bytearray(SLOT_BYTES), 0

    def at(self, phase: Phase, step: int) -> None:
        """Enter a phase: `step` batches are consumed, or the one with this number is at hand."""
        self._write(0, NUMBER_OF[phase], step)

    @property
    def phase(self) -> Phase:
        """The one that was entered last."""
        return PHASES[self._number]

    def enter(self, phase: Phase) -> None:
        """Enter a phase at the step at hand."""
        self.at(phase, self._step)

    def calling(self, call: Call, values: int = 0) -> AbstractContextManager[None]:
        """Return the context of a collective: in it this rank waits for the others.

        Args:
            call: which one.
            values: how many it is given, where that must be equal on all ranks.
        """
        self._call, self._values = NUMBER_OF_CALL[call], values
        self._calls += 1
        return self._waiting

    def begin_batch(self) -> None:
        """Show that an evaluation goes on to its next batch."""
        self._batches += 1
        self._write(0)

    def end(self) -> None:
        """Enter the last phase: files and trackers are closed."""
        self.enter("end")

    def _write(self, waits: int, number: int | None = None, step: int = 0) -> None:
        now = time.monotonic_ns()
        works = self._number in IN_STEP and self._number != self._not_busy
        if works and not self._waiting.inside:
            self._busy += now - self._since
        self._since = now
        if number is not None:
            self._number, self._step = number, step
        self._beats += 1
        BEAT.pack_into(
            self._buffer,
            self._first + BEAT_AT,
            self._number,
            waits,
            self._step,
            self._beats,
            now,
            self._busy,
            self._batches,
            self._calls,
            self._call,
            self._values,
        )


class _Waiting:
    """The inside of a collective; one object for all of them."""

    def __init__(self, pulse: Pulse) -> None:
        self._pulse = pulse
        self.inside = False

    def __enter__(self) -> None:
        self._pulse._write(1)
        self.inside = True

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._pulse._write(0)
        self.inside = False


def read_identity(memory: mmap.mmap, slot: int) -> Identity:
    """Return who writes a slot."""
    return Identity(*IDENTITY.unpack_from(memory, slot * SLOT_BYTES))


def read_beat(memory: mmap.mmap, slot: int) -> Beat:
    """Return the last beat of a slot; one that is being written may be half new, half old."""
    return Beat(*BEAT.unpack_from(memory, slot * SLOT_BYTES + BEAT_AT))
