"""Start torchrun, pass signals on, leave no process behind, and answer with the run's own code."""

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from dist_train.chain_status import is_final, status_of
from dist_train.config.arguments import (
    NODES_VARIABLE,
    RUN_DIR_VARIABLE,
    VERDICT_VARIABLE,
    has_begun,
    print_error,
    stop_with_parent,
    what_met,
)
from dist_train.config.whole_file import read_json
from dist_train.layout import ATTEMPT_VARIABLE, CHAIN_VARIABLE
from dist_train.preemption import not_ignored

STOPS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)
INTERRUPTS_TO_QUIT = 3
SAVE_SEC = 120  # for a save after a signal; torchrun's own limit is 30 s
TIDY_SEC = 120.0  # from status.json's "finished" to the end of torchrun
UNSTARTED_SEC = 10.0  # from a signal to the end of ranks that have nothing to save
INTERRUPTED = 130


def supervise(
    command: list[str],
    environment: dict[str, str],
    run_dir: Path,
    *,
    chain: str | None = None,
    attempt: int = 0,
) -> int:
    """Run torchrun until it ends; returns the exit code of the run.

    Args:
        command: torchrun's, which starts the ranks.
        environment: theirs.
        run_dir: where the ranks of this machine write status.json, if they do.
        chain: that this start continues, the same on all machines; None: a new one.
        attempt: the next one of that chain.
    """
    chain = chain or uuid.uuid4().hex[:12]
    with tempfile.TemporaryDirectory(prefix="dist-train-") as folder:
        verdict = Path(folder) / "verdict.json"
        environment = {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(SAVE_SEC)} | environment
        environment |= {VERDICT_VARIABLE: str(verdict), CHAIN_VARIABLE: chain}
        environment[ATTEMPT_VARIABLE] = str(attempt)
        environment[RUN_DIR_VARIABLE] = str(run_dir.absolute())
        launch = _Launch(
            run_dir=run_dir,
            chain=chain,
            attempt=attempt,
            verdict=verdict,
            is_part=environment.get(NODES_VARIABLE, "1") != "1",
        )
        heard = _Signals()
        before = {number: signal.signal(number, heard.take) for number in not_ignored(STOPS)}
        try:
            # A session of its own: a terminal's Ctrl-C comes here alone, and is passed on once.
            torchrun = subprocess.Popen(
                command, env=environment, start_new_session=True, preexec_fn=stop_with_parent
            )
            heard.pass_on_to(torchrun)
            code = _wait(torchrun, launch, heard)
            _clear(chain, at_once=heard.impatient)
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
        told = read_json(verdict)
        if told:
            print_error(told["reason"])
            return told["exit_code"]
        return _answer(launch, code, heard)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Launch:
    """What these ranks are told apart by from those of other launches."""

    run_dir: Path
    chain: str  # this machine's name for it
    attempt: int  # the first one
    verdict: Path
    is_part: bool  # other machines take part

    def status(self) -> dict[str, Any]:
        """Return what status.json says of these ranks; empty: nothing, or it is not seen here."""
        name, _ = what_met(self.verdict, self.chain)
        return status_of(self.run_dir, name, self.attempt)

    def is_told_elsewhere(self) -> bool:
        """Whether the ranks of all machines have met, and another one sees what became of them."""
        return self.is_part and what_met(self.verdict, self.chain)[1] >= 0


class _Signals:
    """Passes the first stop signal on to torchrun; the third Ctrl-C quits without saving."""

    def __init__(self) -> None:
        self._torchrun: subprocess.Popen[bytes] | None = None
        self._first = 0  # of the signals
        self._interrupts = 0
        self._stopped_at: float | None = None
        self.gave_up = False  # on ranks that did not stop by themselves

    @property
    def stopped(self) -> bool:
        return self._stopped_at is not None

    @property
    def is_overdue(self) -> bool:
        """Whether ranks that have nothing to save had time enough to end."""
        return self._stopped_at is not None and time.monotonic() > self._stopped_at + UNSTARTED_SEC

    @property
    def impatient(self) -> bool:
        return self._interrupts >= INTERRUPTS_TO_QUIT

    def take(self, number: int, frame: FrameType | None) -> None:
        self._interrupts += number == signal.SIGINT
        is_first = not self.stopped
        if is_first:
            self._first = signal.SIGTERM if number == signal.SIGHUP else number
            self._stopped_at = time.monotonic()
        if self._torchrun is None:
            return
        if self.impatient:
            self._torchrun.kill()
        elif is_first:
            self._torchrun.send_signal(self._first)

    def pass_on_to(self, torchrun: "subprocess.Popen[bytes]") -> None:
        """Name the process; it is told what came while it was started."""
        self._torchrun = torchrun
        if self.stopped:
            torchrun.send_signal(self._first)


def _wait(torchrun: "subprocess.Popen[bytes]", launch: _Launch, heard: _Signals) -> int:
    """Wait for torchrun; end it if it stays when the run is over, or is stopped before it began.

    Ranks that wait for each other in a library hear no signal, and one that arrives while torchrun
    logs an error is lost: its handler raises, and logging takes that for its own.
    """
    over_since: float | None = None
    while True:
        with contextlib.suppress(subprocess.TimeoutExpired):
            return torchrun.wait(timeout=1.0)
        status = launch.status()
        # Failed, too: this machine's torchrun may wait for one that knew it sooner and has ended.
        over = status.get("state") in ("finished", "preempted") or is_final(status)
        if heard.is_overdue and not over and not has_begun(launch.verdict):
            heard.gave_up = True
            torchrun.kill()
            _kill(launch.chain)
        if not over:
            over_since = None
        elif over_since is None:
            over_since = time.monotonic()
        elif time.monotonic() - over_since > TIDY_SEC:
            print_error(f"the run is {status['state']}, but its ranks do not end: they are killed")
            torchrun.kill()
            _kill(launch.chain)


def _clear(chain: str, *, at_once: bool) -> None:
    """Wait for ranks that torchrun left behind: they save and end; kill those that do not."""
    end = time.monotonic() + (0 if at_once else SAVE_SEC)
    while _ranks_of(chain) and time.monotonic() < end:
        time.sleep(0.1)
    _kill(chain)


def _kill(chain: str) -> None:
    for rank in _ranks_of(chain):
        with contextlib.suppress(ProcessLookupError):
            os.kill(rank, signal.SIGKILL)


def _ranks_of(chain: str) -> list[int]:
    """Return the live processes of this machine that are ranks of `chain`."""
    found = []
    mark = f"{CHAIN_VARIABLE}={chain}".encode()
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            variables = (entry / "environ").read_bytes().split(b"\0")
            words = (entry / "cmdline").read_bytes().split(b"\0")
        except OSError:  # another user's, or gone
            continue
        # What ranks start themselves (loader workers, W&B's process) ends with them or after them.
        if mark in variables and {b"dist_train", b"dist_train.rehearsal"} & set(words):
            found.append(int(entry.name))
    return found


def _answer(launch: _Launch, code: int, heard: _Signals) -> int:
    """Return the exit code: what status.json says of this start, else torchrun's."""
    status = launch.status()
    final = status.get("exit_code")
    saved = status.get("state") in ("finished", "preempted")
    if heard.impatient and not saved:
        print_error(f"quit at once: {_continues(launch.run_dir)}")
        return INTERRUPTED
    killed = code < 0
    code = 128 - code if killed else code
    over = status.get("state") == "finished" or is_final(status)
    if not status or (heard.gave_up and not saved and not over):
        if launch.is_told_elsewhere() and not heard.gave_up:
            sys.stdout.write("the ranks have ended: rank 0's machine tells how\n")
            return code
        if heard.stopped or code - 128 in STOPS:
            sys.stdout.write("stopped before the start: the same command continues\n")
            return 0
        return code
    if killed and not heard.stopped and not over:
        print_error(
            f"torchrun was killed by {signal.Signals(code - 128).name}; the run is "
            f"{status['state']} at step {status['step']}: the same command continues"
        )
        return code
    if status["state"] == "failed":
        print_error(str(status.get("reason")))
    return code if final is None else int(final)


def _continues(run_dir: Path) -> str:
    """Say from where the same command goes on."""
    steps = [path.parent.name for path in run_dir.glob("checkpoints/step_*/manifest.json")]
    if not steps:
        return "there is no checkpoint yet, the same command starts anew"
    step = int(max(steps).removeprefix("step_"))
    return f"the same command continues from the newest checkpoint, that of step {step}"
