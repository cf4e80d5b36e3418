"""How long a rank may be silent: learnt from its own heartbeats, and from what it is doing."""

from collections import deque
from statistics import median

from dist_train.heartbeat import IN_STEP, NUMBER_OF, PHASES, Beat

MEDIAN_STEPS = 10.0  # a step's phase may take ten median steps
MIN_STEPS = 5  # before there is a median
LONGER_THAN_EVER = 3.0  # than the longest silence that ended well, in the same phase
EVALUATION_BATCHES = 10.0  # a batch of an evaluation may take ten of the longest before it
SLOW_DISK = 12.0  # x hang_sec: saving and closing without a byte moving; an fsync moves none
WRITING = (NUMBER_OF["checkpoint"], NUMBER_OF["end"])
EVALUATION, START = NUMBER_OF["evaluation"], NUMBER_OF["start"]


class Limits:
    """One rank's history, and what follows from it."""

    def __init__(self, *, hang_sec: float, start_sec: float, step_sec: float) -> None:
        self._hang_sec = hang_sec
        self._start_sec = start_sec  # until the first step
        self._step_sec = step_sec  # what a collective may take: until anything is learnt
        self._beat: Beat | None = None
        self._longest = [0.0] * len(PHASES)  # silence that ended well, seconds
        self._step_at: tuple[int, int] | None = None  # the last step seen, and when it was new
        self._steps = 0  # seen in this attempt
        self._periods: deque[float] = deque(maxlen=101)  # seconds a step, one of each look
        self.silence = 0.0

    def look(self, beat: Beat, tick_sec: float, *, paused: bool) -> None:
        """Take in what is read now, `tick_sec` after the last look.

        Silence is counted in ticks of the monitor, not by a clock: when the whole machine stood
        still, so did the monitor. `paused`: this tick does not count.
        """
        before, self._beat = self._beat, beat
        if before is not None and before.beats == beat.beats:
            self.silence += 0.0 if paused else tick_sec
            return
        if before is not None and (before.phase not in IN_STEP or self._steps >= MIN_STEPS):
            # Not of the first steps: what they compile comes once.
            self._longest[before.phase] = max(self._longest[before.phase], self.silence)
        self.silence = 0.0
        self._count_steps(beat)

    def move(self) -> None:
        """Count as a sign of life that bytes moved."""
        self.silence = 0.0

    @property
    def median_step_sec(self) -> float | None:
        """How long a step takes; None while too few were seen."""
        return median(self._periods) if self._steps >= MIN_STEPS else None

    @property
    def limit(self) -> float:
        """How long this rank may be silent in its phase, in seconds."""
        assert self._beat is not None, "look first"
        phase = self._beat.phase
        if phase == START:
            return self._start_sec
        step = self.median_step_sec
        if step is None and phase not in WRITING:
            return max(self._hang_sec, self._step_sec)
        base = max(self._hang_sec, MEDIAN_STEPS * (step or 0.0))
        base = max(base, LONGER_THAN_EVER * self._longest[phase])
        if phase in WRITING:
            return max(base, SLOW_DISK * self._hang_sec)
        if phase == EVALUATION:
            if self._beat.batches < 2:  # none is over
                return max(base, self._step_sec)
            return max(base, EVALUATION_BATCHES * self._longest[phase])
        return base

    def _count_steps(self, beat: Beat) -> None:
        if beat.phase == START:
            return
        if self._step_at is None or beat.step < self._step_at[0]:
            # The first, or a rollback: loader workers and graphs begin anew.
            self._step_at, self._steps = (beat.step, beat.at_ns), 0
            self._periods.clear()
        elif beat.step > self._step_at[0]:
            steps = beat.step - self._step_at[0]
            self._periods.append((beat.at_ns - self._step_at[1]) / 1e9 / steps)
            self._steps += steps
            self._step_at = beat.step, beat.at_ns
