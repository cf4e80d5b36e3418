"""How often to save when checkpoint.every_steps=auto: from a save's cost and failures to expect.

The period is the one that loses the least, to saves and to work done twice: J. W. Young, "A first
order approximation to the optimum checkpoint interval", CACM 17(9), 1974; J. T. Daly, "A higher
order estimate of the optimum checkpoint interval for restart dumps", FGCS 22(3), 2006,
doi:10.1016/j.future.2004.11.016, equation 37.
"""

import math
import time

# A failure in 7.9 h of 1,024 GPUs: Kokolis et al., "Revisiting Reliability in Large-Scale Machine
# Learning Research Clusters", HPCA 2025. Eight GPUs of that kind fail once in 42 days.
GPU_HOURS_A_FAILURE = 7.9 * 1024
MOST_MTBF_SEC = 24 * 3600.0  # people, queues and disks fail more often than one GPU does
LEAST_MTBF_SEC = 10.0
FIRST_SAVE_SEC = 10.0  # an attempt's first save, which measures the cost


def assumed_mtbf_sec(num_ranks: int, mtbf_hours: float | None) -> float:
    """Return the mean time between failures to plan for, in seconds."""
    if mtbf_hours is not None:
        return 3600 * mtbf_hours
    return min(MOST_MTBF_SEC, 3600 * GPU_HOURS_A_FAILURE / num_ranks)


def best_period_sec(cost_sec: float, mtbf_sec: float) -> float:
    """Return the seconds between saves that lose the least, by Daly's higher-order estimate."""
    half = cost_sec / (2 * mtbf_sec)
    if half >= 1:
        return mtbf_sec
    return math.sqrt(2 * cost_sec * mtbf_sec) * (1 + math.sqrt(half) / 3 + half / 9) - cost_sec


class SavePeriod:
    """Says on rank 0 when a save is due; the others are told in the packed reduction.

    It is a matter of time, not of steps: when a run saves changes nothing in its result.
    """

    def __init__(
        self, num_ranks: int, mtbf_hours: float | None, *, failures: int, failing_sec: float
    ) -> None:
        """Begin an attempt.

        Args:
            num_ranks: one GPU each.
            mtbf_hours: mean time between failures that the user expects; None: from num_ranks.
            failures: attempts of this run that died before this one.
            failing_sec: how long those attempts lasted, together.
        """
        self._num_ranks = num_ranks
        self._mtbf_hours = mtbf_hours
        self._failures = failures
        self._failing_sec = failing_sec
        self._start = self._last_save = time.monotonic()
        self.period_sec = FIRST_SAVE_SEC

    @property
    def is_due(self) -> bool:
        """Whether the next save is due."""
        return time.monotonic() - self._last_save >= self.period_sec

    def begin(self) -> None:
        """Note that a save begins now, whatever it was for."""
        self._last_save = time.monotonic()

    def decide(self, stall_sec: float, thread_sec: float) -> str:
        """Choose the period after a save of this cost; returns the reason as a sentence.

        Args:
            stall_sec: what the step lost.
            thread_sec: of one core in the background: it may have been taken from training.
        """
        assumed = assumed_mtbf_sec(self._num_ranks, self._mtbf_hours)
        source = "is what checkpoint.mtbf_hours says"
        if self._mtbf_hours is None:
            source = f"is assumed for {self._num_ranks} ranks (set checkpoint.mtbf_hours)"
        lived = self._failing_sec + time.monotonic() - self._start
        if self._failures and lived / self._failures < assumed:
            assumed = max(LEAST_MTBF_SEC, lived / self._failures)
            source = f"is what this run has seen ({self._failures} in {_duration(lived)})"
        cost = stall_sec + thread_sec
        self.period_sec = best_period_sec(max(cost, 1e-3), assumed)
        return (
            f"checkpoint.every_steps=auto: a save every {_duration(self.period_sec)}: it stops "
            f"training for {stall_sec:.3f} s and takes {thread_sec:.3f} s of a core beside it; a "
            f"failure every {_duration(assumed)} {source}; this loses the least (Young, Daly)"
        )


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.0f} h"
