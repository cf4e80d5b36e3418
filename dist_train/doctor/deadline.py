"""Work that may never return: done in a thread that is left behind at its deadline."""

import threading
from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")
NAME = "doctor: with a deadline"


class DeadlineError(RuntimeError):
    """The work is still not done."""


def within(seconds: float, work: Callable[[], T]) -> T:
    """Return `work()`, or raise what it raises.

    Raises:
        DeadlineError: it takes longer; its thread stays behind.
    """
    done: list[Any] = []
    failed: list[BaseException] = []

    def run() -> None:
        try:
            done.append(work())
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=run, name=NAME, daemon=True)
    thread.start()
    thread.join(seconds)
    if failed:
        raise failed[0]
    if not done:
        raise DeadlineError(f"no answer within {seconds:.0f} s")
    return done[0]


def any_left() -> bool:
    """Say whether work was left behind: the process must then end without waiting for it."""
    return any(thread.name == NAME for thread in threading.enumerate())
