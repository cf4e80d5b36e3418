"""A request to stop, by signal or time limit: it sets a flag; the ranks agree on the step.

SIGTERM, SIGINT, SIGUSR1 and SIGUSR2 all mean: save and end. So does the end of the job's time,
early enough for the save. Imports no torch, so that `python -m dist_train` listens before that
import, and train() takes up what was heard.
"""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import FrameType

SIGNALS: tuple[signal.Signals, ...] = (
    signal.SIGTERM,
    signal.SIGINT,
    signal.SIGUSR1,
    signal.SIGUSR2,
)
# Linux sends it to a rank whose torchrun has died: nobody else does, and it is no wish to stop.
LAUNCHER_GONE: signal.Signals | None = getattr(signal, "SIGRTMIN", None)
INTERRUPTS_TO_QUIT = 3  # a person at a keyboard who does not want to wait for the save
INTERRUPTED = 130  # exit code, as of a shell
OWN_LIMIT, JOB_LIMIT = "train.max_minutes is over", "the job's time is nearly over"
LAUNCHER_DIED = "torchrun died"
# torchrun takes another one for alive until 15 s after its last sign (keep_alive_interval, three
# times). One that starts its ranks again before would wait for the dead one, and end.
TORCHRUN_NOTICES_SEC = 20.0
# When the job's time is over, in seconds since 1970: as asked by the job's script, or as SLURM
# says at the start (from 22.05 on).
END_TIME_VARIABLE = "DIST_TRAIN_END_TIME"
END_TIME_VARIABLES = (END_TIME_VARIABLE, "SLURM_JOB_END_TIME")


class StopRequest:
    """Whether this rank was asked to stop, and why."""

    def __init__(self, max_minutes: float | None = None) -> None:
        self._signal: str | None = None
        self._interrupts = 0
        self._deadline: float | None = None
        self._end_time: float | None = None
        self._lead_sec: Callable[[], float] = float
        self.limit(max_minutes)

    def limit(self, max_minutes: float | None) -> None:
        """Ask for a stop in `max_minutes` from now; None: no limit."""
        self._deadline = None if max_minutes is None else time.monotonic() + 60 * max_minutes

    def end_before(self, end_time: float | None, lead_sec: Callable[[], float]) -> None:
        """Ask for a stop in time to save before the job's end.

        Args:
            end_time: seconds since 1970; None: there is no limit.
            lead_sec: how long before that, asked anew each time: what a save takes is learnt.
        """
        self._end_time, self._lead_sec = end_time, lead_sec

    @property
    def reason(self) -> str | None:
        """Return why to stop, or None."""
        if self._signal is not None:
            return self._signal
        if self._deadline is not None and time.monotonic() >= self._deadline:
            return OWN_LIMIT
        if self._end_time is not None and time.time() >= self._end_time - self._lead_sec():
            self._end_time = 0.0  # what a save takes may be corrected: the wish stays
            return JOB_LIMIT
        return None

    @property
    def asked(self) -> bool:
        """Whether there is a reason to stop."""
        return self.reason is not None

    def on_signal(self, number: int, frame: FrameType | None) -> None:
        """Remember the first signal; a repeated one changes nothing, but the third Ctrl-C quits."""
        told = LAUNCHER_DIED if number == LAUNCHER_GONE else signal.Signals(number).name
        self._signal = self._signal or told
        self._interrupts += number == signal.SIGINT
        if self._interrupts >= INTERRUPTS_TO_QUIT:
            os._exit(INTERRUPTED)  # a checkpoint is whole or not there at any moment

    def wait_for_torchrun(self) -> None:
        """Wait until a torchrun that lives knows of the one that died, but not after a Ctrl-C.

        A SIGTERM is no reason to end: a torchrun that has come back makes this one send it.
        """
        end = time.monotonic() + TORCHRUN_NOTICES_SEC
        while self._interrupts == 0 and time.monotonic() < end:
            time.sleep(0.1)

    def sleep(self, seconds: float) -> bool:
        """Sleep so long, or until asked to stop; returns whether it was."""
        end = time.monotonic() + seconds
        while not self.asked and (left := end - time.monotonic()) > 0:
            time.sleep(min(0.1, left))  # a handler that returns does not end a sleep
        return self.asked


@contextlib.contextmanager
def listen_for_stop(max_minutes: float | None = None) -> Iterator[StopRequest]:
    """Listen for the signals and the time limit; the old handlers come back at the end.

    Inside another listening it is that one's request that is returned: what was heard before
    counts. Outside the main thread (some notebooks) Python allows no handlers: only the time
    limit works.
    """
    earlier = heard()
    if earlier is not None:
        earlier.limit(max_minutes)
        yield earlier
        return
    stop = StopRequest(max_minutes)
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    numbers = not_ignored(SIGNALS if LAUNCHER_GONE is None else (*SIGNALS, LAUNCHER_GONE))
    before = {number: signal.signal(number, stop.on_signal) for number in numbers}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def not_ignored(numbers: Iterable[signal.Signals]) -> list[signal.Signals]:
    """Return the signals that this process does not ignore.

    What it ignores it was started so: SIGHUP under nohup, SIGINT in a script's background.
    """
    return [number for number in numbers if signal.getsignal(number) is not signal.SIG_IGN]


def job_end(env: Mapping[str, str]) -> float | None:
    """Return when the job's time is over, in seconds since 1970; None: no limit is known.

    A time that has passed is one of variables that a shell inherited from a job that is over.
    """
    for name in END_TIME_VARIABLES:
        text = env.get(name, "")
        if text.isdigit() and int(text) > time.time():
            return float(text)
    return None


@contextlib.contextmanager
def blocked(numbers: Iterable[signal.Signals] = SIGNALS) -> Iterator[None]:
    """Block signals in this thread: a process that is started meanwhile inherits that."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def heard() -> StopRequest | None:
    """Return the request that this process's handlers belong to, if they are ours."""
    owners = [getattr(signal.getsignal(number), "__self__", None) for number in SIGNALS]
    return next((owner for owner in owners if isinstance(owner, StopRequest)), None)


def stop_reason() -> str | None:
    """Return why this process was asked to stop, or None."""
    stop = heard()
    return None if stop is None else stop.reason
