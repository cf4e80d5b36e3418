"""A wrong clock for every Python process that has this folder on PYTHONPATH.

Python imports a module of this name when it starts. Only the time of day is wrong, as on a real
machine: clocks that measure durations, and the file system's, go on as they are.

WRONG_CLOCK_SEC: by how much. WRONG_CLOCK_FILE: the same number in a file, read at every call.
"""

import functools
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

REAL = time.time
FILE = os.environ.get("WRONG_CLOCK_FILE")
SHIFT_SEC = float(os.environ.get("WRONG_CLOCK_SEC", "0"))


def wrong_time() -> float:
    """Return the time of day as this machine believes it."""
    return REAL() + (float(Path(FILE).read_text()) if FILE else SHIFT_SEC)


def of_now(real: Callable[..., Any], position: int) -> Callable[..., Any]:
    """Let a function of `time` take the wrong time where it is given none."""

    @functools.wraps(real)
    def wrapped(*args: Any) -> Any:
        if len(args) > position:
            return real(*args)
        now = wrong_time()
        return real(*args, time.localtime(now) if position else now)

    return wrapped


time.time = wrong_time
time.time_ns = lambda: int(wrong_time() * 1e9)
time.localtime = of_now(time.localtime, 0)
time.gmtime = of_now(time.gmtime, 0)
time.strftime = of_now(time.strftime, 1)
