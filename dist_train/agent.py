"""torchrun as `dist-train run` starts it: it tells how each attempt ended, and knows when to stop.

It is torchrun's own main() with two additions. How a rank died (a signal, an exit code) is known to
its parent alone, and torchrun tells it by a line of its log: the line is taken up here, told
in one line, and recorded in the run's chain.json for the next attempt. And a second signal while
the ranks are saving does not end torchrun before them.
"""

import contextlib
import json
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from dist_train import chain
from dist_train.chain_status import status_of
from dist_train.config.arguments import (
    NODES_VARIABLE,
    RUN_DIR_VARIABLE,
    VERDICT_VARIABLE,
    print_error,
    stop_with_parent,
    tell_begun,
    what_met,
)
from dist_train.config.streams import open_standard_streams, put
from dist_train.config.whole_file import read_json, write_atomically
from dist_train.layout import ATTEMPT_VARIABLE, CHAIN_VARIABLE
from dist_train.preemption import not_ignored

LOGGER = "torch.distributed.elastic.multiprocessing.api"
FAILED = "failed (exitcode"  # the line that tells of an attempt's end: exit code, local rank
FINAL_CODES = (0, 2, chain.EXIT_CODE)  # of status.json: finished, stopped, or not to be repeated
STOPS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
STOPS += (signal.SIGUSR1, signal.SIGUSR2)


def main() -> int:
    """Start torchrun on the command line; returns 0, the run's final code, or 1."""
    open_standard_streams()
    stop_with_parent()
    stops = {signal.SIGTERM, *not_ignored(STOPS)}  # the first is what `dist-train run` passes on
    for number in stops:  # until there are ranks to tell
        signal.signal(number, _leave)
    verbose = "LOGLEVEL" in os.environ
    os.environ.setdefault("LOGLEVEL", "ERROR")  # of torchrun's loggers, read as they are made
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing import api
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    if not verbose:
        del os.environ["LOGLEVEL"]  # the ranks have their own
    handler = getattr(api, "_terminate_process_handler", None)
    if handler is not None:
        calm = _once(handler, stops)
        api._terminate_process_handler = calm  # installed for torchrun's signals, by this name
        for number in stops:  # and for those that an older torchrun does not know
            signal.signal(number, calm)
    os.environ.setdefault("PET_SIGNALS_TO_HANDLE", ",".join(number.name for number in stops))
    folder, verdict = (Path(os.environ[name]) for name in (RUN_DIR_VARIABLE, VERDICT_VARIABLE))
    report = _Report(folder, os.environ[CHAIN_VARIABLE], verdict)
    logger = logging.getLogger(LOGGER)
    logger.addHandler(report)
    logger.propagate = verbose  # else one line an attempt is enough
    try:
        run.main(sys.argv[1:])
    except ChildFailedError:  # told already
        report.close_status()
        return 1
    except api.SignalException as stopped:
        return 128 + stopped.sigval
    return 0


class _Report(logging.Handler):
    """Takes up the end of each attempt."""

    def __init__(self, folder: Path, name: str, verdict: Path) -> None:
        super().__init__(logging.ERROR)
        self._folder = folder
        self._own_chain = name
        self._verdict = verdict
        self._first_attempt = self._attempt = int(os.environ.get(ATTEMPT_VARIABLE, "0"))
        self._silent = 0  # attempts in a row that ended before they had begun
        self._single = os.environ.get(NODES_VARIABLE, "1") == "1"

    @property
    def _chain(self) -> str:
        """The chain, by the name that the ranks of all machines have agreed on."""
        return what_met(self._verdict, self._own_chain)[0]

    def emit(self, record: logging.LogRecord) -> None:
        """Tell how an attempt ended.

        Raises:
            SystemExit: there is nothing to restart; torchrun ends its ranks and itself.
        """
        if not str(record.msg).startswith(FAILED) or not isinstance(record.args, tuple):
            return
        tell_begun(over=True)
        code, local_rank = record.args[:2]
        assert isinstance(code, int)
        assert isinstance(local_rank, int)
        name, met = what_met(self._verdict, self._own_chain)
        mine = status_of(self._folder, name, self._first_attempt)
        over = mine.get("state") != "running" and mine.get("exit_code") in FINAL_CODES
        if over:  # a rank that dies in its tidying-up is no news
            raise SystemExit(mine["exit_code"])
        memory = chain.read(self._folder)
        seen = memory.attempt if memory.chain == name else -1
        # Another machine's rank may have ended the chain a moment ago, and be writing status.json.
        if seen >= self._first_attempt and memory.exit_code is not None:
            raise SystemExit(memory.exit_code)
        # Of several machines each counts only its own restarts, and not all see the run's folder.
        self._attempt = max(self._attempt, seen, met)
        why = self._why(code, local_rank)
        began = seen >= self._attempt and bool(mine)
        if not self._single and not mine:
            began = met >= self._attempt  # the others' launcher knows more
        self._silent = 0 if began else self._silent + 1
        if self._silent >= chain.ENDINGS_WITHOUT_PROGRESS:
            print_error(chain.endless(self._silent, mine.get("step", 0), why))
            raise SystemExit(chain.EXIT_CODE)
        with contextlib.suppress(OSError, ValueError):
            put(sys.stderr, f"dist-train: attempt {self._attempt} ended: {why}\n")
        self._attempt += 1
        time.sleep(0 if began else chain.back_off(self._silent))

    def close_status(self) -> None:
        """Let status.json name the first cause, also of a death that no rank could write down."""
        path = self._folder / "status.json"
        status = status_of(self._folder, self._chain, self._first_attempt)
        cause = chain.read(self._folder).cause
        if not status or status.get("exit_code") in FINAL_CODES:
            return
        status |= {"state": "failed", "exit_code": 1, "time": time.time()}
        if cause is not None:
            status |= {"reason": cause.sentence(), "rank": cause.rank, "step": cause.step}
        write_atomically(path, json.dumps(status, indent=1))

    def _why(self, code: int, local_rank: int) -> str:
        """Return the sentence on who ended first, and record it if no rank could."""
        if not self._folder.is_dir():
            return f"local rank {local_rank} {_ending(code)}"
        known = chain.cause_of(self._folder, self._chain, self._attempt)
        if known is not None:
            return known.sentence()
        memory = chain.read(self._folder)
        if (memory.chain, memory.attempt) != (self._chain, self._attempt):
            return f"local rank {local_rank} {_ending(code)} before it had joined the run"
        if not self._single:
            return f"local rank {local_rank} of {socket.gethostname()} {_ending(code)}"
        how = _ending(code)
        if code > 0 and local_rank in memory.witnesses:  # it only saw another one end
            others = sorted(set(range(_local_ranks())) - set(memory.witnesses))
            local_rank, how = (others or [local_rank])[0], "ended without a word"
        crash = chain.crash_file(self._folder, self._attempt, local_rank)
        if crash.is_file() and crash.stat().st_size:
            how += f"; its stack is in {crash}"
        cause = chain.Cause(
            attempt=self._attempt,
            rank=local_rank,
            step=memory.seen_at if memory.witnesses else _step(self._folder),
            kind="death",
            message=how,
        )
        chain.record(self._folder, self._chain, cause)
        return cause.sentence()


def _ending(code: int) -> str:
    if code == -signal.SIGKILL:
        return "was killed by SIGKILL (kill -9, or the kernel for want of memory)"
    if code < 0:
        return f"was killed by {signal.Signals(-code).name}"
    return f"ended with exit code {code} and no word"


def _once(
    handler: Callable[[int, FrameType | None], Any], stops: set[signal.Signals]
) -> Callable[..., None]:
    """Return a handler for the first signal only: the ranks are told once, then waited for.

    torchrun may install it for a signal that is to be ignored, not one of `stops`.
    """
    told = False

    def calm(number: int, frame: FrameType | None) -> None:
        nonlocal told
        if not told and number in stops:
            told = True
            handler(number, frame)

    return calm


def _leave(number: int, frame: FrameType | None) -> NoReturn:
    os._exit(128 + number)  # no rank has been started


def _local_ranks() -> int:
    given = [word for word in sys.argv if word.startswith("--nproc-per-node=")]
    return int(given[0].partition("=")[2]) if given else 1


def _step(folder: Path) -> int:
    return int(read_json(folder / "status.json").get("step", 0))


if __name__ == "__main__":
    sys.exit(main())
