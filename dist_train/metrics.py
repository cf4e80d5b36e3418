"""A run's numbers: kept on the device as they come, added up over the ranks once an interval.

The stop flags of all ranks, rank 0's next interval and its wish to save ride in the same packed
reduction.
"""

import math
import statistics
import time
from collections import deque
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from dist_train.distributed import Ranks
from dist_train.pinned import pinned
from dist_train.plan import Plan
from dist_train.progress import Progress

WATCHED_LINES = 20  # of which the median is what is usual
WATCHED_FROM = 5
AGREE_EVERY_SEC = 0.5  # how long a stop request may wait for the next reduction


Outcome = tuple[Tensor, Tensor]  # of a piece: summed loss, 0-d; right or not, (n,) bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Totals:
    """Sums over all ranks since the last line of metrics."""

    loss: float = 0.0
    correct: float = 0.0
    samples: float = 0.0


class Meter:
    """Collects the sums of the steps and says when the ranks meet to add them up."""

    def __init__(self, ranks: Ranks, plan: Plan) -> None:
        self._ranks = ranks
        self._plan = plan
        self._losses: list[Tensor] = []  # of every piece since the last meeting
        self._hits: list[Tensor] = []
        self.totals = Totals()
        self._interval = 1
        self.save_agreed = False  # at the last meeting
        self.slowest_sec = 0.0  # from one meeting to the next, of training
        self.start(0)

    def start(self, step: int) -> None:
        """Set the clocks going at `step`."""
        self._line_start = step
        self._clock, self._line_clock = _Clock(), _Clock()
        self._met_at(step)

    def add(self, outcomes: list[Outcome]) -> None:
        """Take what the pieces of one step came to; nothing is computed before the meeting."""
        for loss, hits in outcomes:
            self._losses.append(loss)
            self._hits.append(hits)

    def meeting_due(self, step: int) -> bool:
        """Say whether the ranks meet after `step` steps: the same answer on all of them."""
        return step >= self._next_meeting

    def _met_at(self, step: int) -> None:
        self._last_meeting = step
        self._next_meeting = min(step + self._interval, self._plan.next_event(step))

    def meet(self, progress: Progress, *, stopping: bool, save_wanted: bool = False) -> bool:
        """Add up the sums of all ranks; returns whether any wants to stop. Collective, waits.

        Args:
            progress: counters; its training time is brought up to date.
            stopping: whether this rank was asked to stop.
            save_wanted: whether rank 0 asks for a save here; all find it in `save_agreed`.
        """
        step, sec = progress.step, self._clock.elapsed()
        progress.train_sec += sec
        self.slowest_sec = max(self.slowest_sec, sec)
        per_step = max(1e-9, sec / max(1, step - self._last_meeting))
        wish = max(1, min(self._plan.log_every, int(AGREE_EVERY_SEC / per_step)))
        first = self._ranks.rank == 0
        known = torch.tensor(
            [
                float(sum(len(hits) for hits in self._hits)),
                float(stopping),
                float(wish if first else 0),
                float(save_wanted and first),
            ],
            dtype=torch.float64,
        )
        if self._ranks.device.type == "cuda":
            known = pinned(known)
        packed = torch.cat([self._sums(), known.to(self._ranks.device, non_blocking=True)])
        loss, correct, samples, stops, interval, saves = self._ranks.read_sum(packed)
        self._forget()
        self.totals = Totals(
            loss=self.totals.loss + loss,
            correct=self.totals.correct + correct,
            samples=self.totals.samples + samples,
        )
        self._interval = int(interval)
        self.save_agreed = saves > 0
        self._met_at(step)
        self._clock = _Clock()
        return stops > 0

    def _sums(self) -> Tensor:
        """Return (2,) float64 on the device: this rank's summed loss and hits.

        Of float32 values a float64 sum has the same bits however they are grouped.
        """
        if not self._losses:
            return torch.zeros(2, dtype=torch.float64, device=self._ranks.device)
        sums = [torch.stack(self._losses).double().sum(), torch.cat(self._hits).sum().double()]
        return torch.stack(sums)

    def _forget(self) -> None:
        self._losses.clear()
        self._hits.clear()

    def line(self, progress: Progress, *, waited_sec: float = 0.0) -> dict[str, float]:
        """Return the metrics since the last line and begin anew; call it after `meet`.

        Args:
            progress: counters.
            waited_sec: in which this rank's host waited for batches, since the last line.
        """
        totals, sec = self.totals, self._line_clock.elapsed()
        steps = max(1, progress.step - self._line_start)
        count = totals.samples or math.nan
        record = {
            "train/loss": totals.loss / count,
            "train/accuracy": totals.correct / count,
            "train/skipped_steps": progress.skipped_steps,
            "perf/images_per_sec": steps * self._plan.global_batch_size / max(sec, 1e-9),
            "perf/step_sec": sec / steps,
            "perf/data_wait": waited_sec / max(sec, 1e-9),
        }
        self.totals = Totals()
        self._line_clock = _Clock()
        self._line_start = progress.step
        return record

    def pause(self) -> None:
        """Stop the clocks: what follows (evaluation, saving) is no training."""
        self._clock.pause()
        self._line_clock.pause()

    def resume(self) -> None:
        """Let the clocks run on."""
        self._clock.resume()
        self._line_clock.resume()

    def state_dict(self) -> dict[str, float]:
        """Return the sums that the next line needs; call it right after `meet`."""
        return asdict(self.totals)

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Take up the sums of the steps before a resume; forget those of steps taken back."""
        self.totals = Totals(**state)
        self._forget()


class LossWatch:
    """Notices a mean loss that jumps far above those before it. Works on rank 0's lines."""

    def __init__(self, factor: float) -> None:
        self._factor = factor
        self._recent: deque[float] = deque(maxlen=WATCHED_LINES)

    def add(self, loss: float) -> str | None:
        """Take the next line's loss; returns what to report, or None."""
        usual = statistics.median(self._recent) if len(self._recent) >= WATCHED_FROM else None
        if math.isfinite(loss):
            self._recent.append(loss)
        if usual is None or loss <= self._factor * usual:
            return None
        return f"the loss jumped to {loss:.4g}, from about {usual:.4g} before"

    def clear(self) -> None:
        """Forget the losses: the run went back."""
        self._recent.clear()


class _Clock:
    """Seconds since it was made, without its pauses."""

    def __init__(self) -> None:
        self._start = time.monotonic()
        self._paused_at: float | None = None

    def pause(self) -> None:
        self._paused_at = time.monotonic()

    def resume(self) -> None:
        if self._paused_at is not None:
            self._start += time.monotonic() - self._paused_at
            self._paused_at = None

    def elapsed(self) -> float:
        return (self._paused_at or time.monotonic()) - self._start
