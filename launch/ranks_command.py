"""The command that starts a job's ranks: run it, and pass on to it what asks to stop."""

import contextlib
import itertools
import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from types import FrameType

from dist_train.config import ConfigError
from dist_train.config.arguments import print_error

STOPS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)


def check_exports(words: Sequence[str]) -> None:
    """Raise ConfigError if srun's own words keep the job's variables from the ranks."""
    for word, following in itertools.pairwise([*words, ""]):
        name, equals, value = word.partition("=")
        names = value if equals else following
        if name == "--export" and "ALL" not in names.split(","):
            raise ConfigError(
                f"srun's --export={names} keeps from the ranks what the job's script has set, and "
                "when its time is over: leave it out, or write --export=ALL,NAME=VALUE"
            )


class RanksCommand:
    """Listens for stop signals from when it is made; they reach whatever it runs or will run."""

    def __init__(self) -> None:
        self.stopped_by: str | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._is_srun = False
        signal.signal(signal.SIGCONT, signal.SIG_DFL)
        for number in STOPS:
            signal.signal(number, self._take)

    def run(self, command: list[str], environment: Mapping[str, str]) -> int:
        """Run the command to its end; returns its exit code, as of a shell."""
        if self.stopped_by is not None:
            return 0
        try:
            self._is_srun = os.path.basename(command[0]) == "srun"
            self._process = subprocess.Popen(command, env=environment)
        except OSError as error:
            print_error(f"cannot start the ranks with {command[0]!r}: {error.strerror}")
            return 2
        if self.stopped_by is not None:  # while the command started; a second signal does no harm
            self._pass_on()
        while True:
            # A signal that comes just before the process sleeps is heard when it wakes.
            with contextlib.suppress(subprocess.TimeoutExpired):
                code = self._process.wait(timeout=1.0)
                break
        self._process = None
        return 128 - code if code < 0 else code

    def wait(self, seconds: float) -> None:
        """Wait, unless asked to stop."""
        end = time.monotonic() + seconds
        while self.stopped_by is None and time.monotonic() < end:
            time.sleep(0.1)

    def _take(self, number: int, frame: FrameType | None) -> None:
        self.stopped_by = self.stopped_by or signal.Signals(number).name
        self._pass_on()

    def _pass_on(self) -> None:
        if self._process is None:
            return
        # srun passes on SIGUSR2. At a SIGTERM it kills its tasks at once, SIGINT it takes for
        # itself; a torchrun without this toolkit's agent knows SIGTERM only.
        with contextlib.suppress(ProcessLookupError):
            self._process.send_signal(signal.SIGUSR2 if self._is_srun else signal.SIGTERM)
