"""A request to stop, by signal or time limit: it sets a flag; the ranks agree on the step."""

import contextlib
import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopRequest:
    """Whether this rank was asked to stop, and why."""

    def __init__(self, max_minutes: float | None) -> None:
        self._signal: str | None = None
        self._deadline = None if max_minutes is None else time.monotonic() + 60 * max_minutes

    @property
    def reason(self) -> str | None:
        """Return why to stop, or None."""
        if self._signal is not None:
            return self._signal
        if self._deadline is not None and time.monotonic() >= self._deadline:
            return "train.max_minutes is over"
        return None

    def on_signal(self, number: int, frame: FrameType | None) -> None:
        """Remember the signal; do nothing else inside a handler."""
        self._signal = signal.Signals(number).name


@contextlib.contextmanager
def listen_for_stop(max_minutes: float | None) -> Iterator[StopRequest]:
    """Listen for SIGTERM, SIGINT and the time limit; the old handlers come back at the end.

    Outside the main thread (some notebooks) Python allows no handlers: only the time limit works.
    """
    stop = StopRequest(max_minutes)
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {number: signal.signal(number, stop.on_signal) for number in SIGNALS}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
