"""Who is slow? Compares the time that ranks spend working, waiting in collectives not counted.

Rather silent than wrong: a rank is named when it took much longer than the others in most of the
last windows, and when that costs the step something. Time for which it had no core is not held
against it: on a machine with more work than cores any rank looks slow now and then.
"""

from collections import deque
from collections.abc import Sequence
from statistics import median
from typing import NamedTuple

from dist_train.monitor.verdict import View

WINDOW_STEPS = 10
WINDOW_SEC = 1.0  # at least: shorter ones show what else the machine does
WINDOWS = 5  # 50 steps, or 5 s if those take longer
AGREE = 4  # of them must say so
FACTOR = 1.35  # in each of those
FACTOR_OVERALL = 1.4
COST = 0.1  # the excess, as a share of the step
RECOVERED = 1.2


class Slow(NamedTuple):
    """One rank that is slower than the others."""

    rank: int
    host: str
    step: int
    factor: float
    busy_sec: float  # a step
    others_sec: float
    step_sec: float


class Stragglers:
    """Remembers windows of steps, and whom it has named."""

    def __init__(self) -> None:
        self._last: dict[int, View] = {}
        self._last_at = 0.0
        self._windows: deque[_Window] = deque(maxlen=WINDOWS)
        self._named: set[int] = set()

    def look(self, views: Sequence[View], now_sec: float) -> list[Slow]:
        """Take in the ranks' counters; returns those that are newly found to be slow."""
        here = {view.rank: view for view in views}
        if len(here) < 2 or here.keys() != self._last.keys():
            self._start(here, now_sec)
            return []
        passed = {rank: view.step - self._last[rank].step for rank, view in here.items()}
        if min(passed.values()) < 0:  # a rollback
            self._start(here, now_sec)
            return []
        if min(passed.values()) < WINDOW_STEPS or now_sec - self._last_at < WINDOW_SEC:
            return []
        busy, net = {}, {}
        for rank, view in here.items():
            last, steps = self._last[rank], passed[rank]
            busy[rank] = (view.busy_ns - last.busy_ns) / 1e9 / steps
            net[rank] = busy[rank] - (view.delay_ns - last.delay_ns) / 1e9 / steps
        step_sec = (now_sec - self._last_at) / median(passed.values())
        self._windows.append(_Window(busy, net, step_sec))
        self._last, self._last_at = here, now_sec
        return self._judge(views) if len(self._windows) == WINDOWS else []

    def _start(self, here: dict[int, View], now_sec: float) -> None:
        self._last, self._last_at = here, now_sec
        self._windows.clear()

    def _judge(self, views: Sequence[View]) -> list[Slow]:
        found = []
        for view in views:
            rank = view.rank
            ratios = [_ratio(window, rank) for window in self._windows]
            mine = median(window.busy[rank] for window in self._windows)
            others = median(_others(window.busy, rank) for window in self._windows)
            step_sec = median(window.step_sec for window in self._windows)
            if max(ratios) < RECOVERED:
                self._named.discard(rank)
            slow = sum(ratio >= FACTOR for ratio in ratios) >= AGREE
            factor = median(ratios)
            slow = slow and factor >= FACTOR_OVERALL and mine - others >= COST * step_sec
            if slow and rank not in self._named:
                self._named.add(rank)
                found.append(Slow(rank, view.host, view.step, factor, mine, others, step_sec))
        return found


class _Window(NamedTuple):
    """Seconds a step, by rank."""

    busy: dict[int, float]  # outside of collectives
    net: dict[int, float]  # without the time for which it had no core
    step_sec: float


def _ratio(window: _Window, rank: int) -> float:
    """Return how many times as long as the others it works, with and without delays: the lesser.

    Delays before and after collectives are taken off, too, so that neither alone is to be trusted.
    """
    with_delays = window.busy[rank] / _others(window.busy, rank)
    return min(with_delays, window.net[rank] / _others(window.net, rank))


def _others(busy: dict[int, float], rank: int) -> float:
    return max(1e-9, median(sec for other, sec in busy.items() if other != rank))
