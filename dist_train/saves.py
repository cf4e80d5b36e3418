"""The saves of a run on rank 0: when, what is told of them, and how the last one ends."""

from collections.abc import Callable
from typing import Any

from dist_train.checkpoint_writer import CheckpointWriter, SaveCost
from dist_train.config import CheckpointConfig
from dist_train.run_folder import RunFolder
from dist_train.save_period import SavePeriod

# How long the last save of a run is tried again: a stop must be over before the grace period of
# whoever asked for it (torchrun: 30 s); at the end nobody waits.
STOP_RETRY_SEC, END_RETRY_SEC = 10.0, 60.0
# Before a save was measured: a slow shared file system, and finding the place on it.
ASSUMED_BYTES_PER_SEC, ASSUMED_LATENCY_SEC = 50e6, 2.0
# A save that takes longer than this, and three times as long as any before, is told of, then again
# each time that it has taken ten times as long: a disk that does not answer raises no error.
SLOW_SAVE_SEC, TIMES_SLOWEST = 60.0, 3.0


class SaveFailedError(OSError):
    """The run is over and its last checkpoint could not be written."""


class Saves:
    """Writes a run's checkpoints and speaks of what became of them. Not collective."""

    def __init__(
        self,
        config: CheckpointConfig,
        folder: RunFolder,
        *,
        num_ranks: int,
        earlier: tuple[int, float],
        say: Callable[[str], None],
        warn: Callable[[str], None],
    ) -> None:
        """Open the writer.

        Args:
            config: how often, how many.
            folder: where, and where events go.
            num_ranks: of the run.
            earlier: attempts of this run that died, and how long they lasted together.
            say: shows a line.
            warn: shows a line that nobody misses.
        """
        self._folder = folder
        self._say, self._warn = say, warn
        self._step = 0  # of the last boundary
        self._writer = CheckpointWriter(
            folder.checkpoints,
            keep_last=config.keep_last,
            on_saved=self._on_saved,
            on_error=lambda text: self._tell("save_failed", text),
            on_recovered=lambda text: self._tell("save_recovered", text),
        )
        self._period: SavePeriod | None = None
        if config.every_steps == "auto":
            failures, lasted_sec = earlier
            self._period = SavePeriod(
                num_ranks, config.mtbf_hours, failures=failures, failing_sec=lasted_sec
            )
        self._decided_on: SaveCost | None = None
        self._period_told = self._put_off_told = False
        self._slow_told_sec = 0.0  # of the save under way
        self.wait, self.close = self._writer.wait, self._writer.close

    @property
    def any_saved(self) -> bool:
        """Whether this attempt has saved anything."""
        return self._writer.last_saved is not None

    def expected_sec(self, num_bytes: int) -> float:
        """Return the seconds that the next save may take: twice the slowest of this attempt.

        Args:
            num_bytes: of a checkpoint, for as long as none was saved.
        """
        if self._writer.slowest_sec > 0:
            return 2 * self._writer.slowest_sec
        return ASSUMED_LATENCY_SEC + num_bytes / ASSUMED_BYTES_PER_SEC

    def wanted(self, step: int) -> bool:
        """Say whether a save is asked for at this boundary, and tell what became of the last."""
        self._step = step
        wanted = self._writer.wants_save
        self._tell_if_slow()
        if self._period is None:
            return wanted
        cost = self._writer.cost
        if cost is not None and cost is not self._decided_on:
            self._decided_on = cost
            reason = self._period.decide(cost.stall_sec, cost.thread_sec)
            if not self._period_told:
                self._period_told = True
                self._say(reason)
                period_sec = round(self._period.period_sec, 3)
                self._folder.event("save_period", step=step, period_sec=period_sec, reason=reason)
        return wanted or (self._period.is_due and not self._writer.is_busy)

    def save(
        self,
        state: dict[str, Any],
        *,
        step: int,
        best_step: int | None,
        must: bool,
        keep_older: bool = False,
    ) -> None:
        """Save `state`, or put it off while the save before it is being written, unless `must`.

        With `keep_older` no checkpoint is deleted for it.
        """
        self._step = step
        if self._writer.save(
            state, step=step, best_step=best_step, must=must, keep_older=keep_older
        ):
            if self._period is not None:
                self._period.begin()
        elif self._writer.is_writing:  # else a failed one is to be tried again, and was told
            self._folder.event("save_put_off", step=step)
            if not self._put_off_told:
                self._put_off_told = True
                self._warn(
                    f"the save of step {step} is put off: the one before it is still being "
                    "written; save less often (checkpoint.every_steps) or to a faster disk"
                )

    def finish(self, step: int, what: str, *, retry_sec: float) -> None:
        """Wait for the last save, trying it again for `retry_sec` if it fails.

        Raises:
            SaveFailedError: it failed all that time.
        """
        if self._writer.wait(retry_sec):
            return
        good = self._writer.last_saved
        behind = "this attempt saved none before"
        if good is not None:
            behind = f"the newest one is of step {good}, {step - good} steps earlier"
        raise SaveFailedError(
            f"{what} at step {step}, and its last checkpoint could not be saved "
            f"({self._writer.last_error}): {behind}. Mend the disk of {self._folder.checkpoints} "
            "and give the same command again"
        )

    def _on_saved(self, step: int) -> None:
        """Record it; in the writer's thread."""
        self._folder.event("saved", step=step, sec=round(self._writer.last_sec, 3))

    def _tell_if_slow(self) -> None:
        sec = self._writer.writing_sec
        if sec <= SLOW_SAVE_SEC:
            self._slow_told_sec = 0.0
        elif sec > max(TIMES_SLOWEST * self._writer.slowest_sec, 10 * self._slow_told_sec):
            self._slow_told_sec = sec
            good = self._writer.last_saved
            behind = "none was saved in this attempt"
            if good is not None:
                behind = f"the newest one is of step {good}, {self._step - good} steps ago"
            self._tell(
                "save_slow",
                f"a checkpoint has been on its way to {self._folder.checkpoints} for {sec:.0f} s: "
                f"{behind}; training goes on, see whether the disk still answers",
            )

    def _tell(self, kind: str, text: str) -> None:
        self._warn(text)
        self._folder.event(kind, step=self._step, reason=text)
