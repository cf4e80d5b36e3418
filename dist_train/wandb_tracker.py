"""Weights & Biases in a process of its own, so that it can neither stop, slow nor hang a run.

In the training process wandb would wait for its server at exit, replace sys.exit and start
threads. Here rank 0 only writes lines to a pipe that never blocks; the rest is the child's.
"""

import json
import os
import select
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from socket import create_connection
from threading import Thread
from typing import Any, NoReturn
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from dist_train.config import ConfigError, WandbConfig
from dist_train.preemption import SIGNALS, blocked

QUEUE_RECORDS = 1024  # waiting for the child; older ones are dropped
PROBE_SEC = 2.0
INIT_SEC = 15.0
FINISH_SEC = 3.5  # for the last upload; within CLOSE_SEC
CLOSE_SEC = 5.0
SETTINGS_VARIABLE = "DIST_TRAIN_WANDB"  # the child's settings as JSON; no secrets


def wandb_mode(settings: WandbConfig, env: Mapping[str, str]) -> str:
    """Return the mode in force: `auto` is off where W&B's own variables say so."""
    off = env.get("WANDB_MODE") == "disabled" or env.get("WANDB_DISABLED", "").lower() == "true"
    return "disabled" if settings.mode == "auto" and off else settings.mode


class WandbTracker:
    """Feeds the child with one JSON line a record.

    The child goes offline when there is no key or no network. Whatever goes wrong there is told
    once through `warn`, and metrics.jsonl has every record.
    """

    def __init__(
        self,
        settings: WandbConfig,
        folder: Path,
        *,
        run_id: str,
        run_config: Mapping[str, Any],
        say: Callable[[str], None],
        warn: Callable[[str], None],
    ) -> None:
        """Start the child; takes milliseconds, wandb is imported over there.

        Args:
            settings: mode, project, entity and name of the run.
            folder: the run's; W&B's files go to wandb/ in it.
            run_id: the same at every start of the run: W&B continues it.
            run_config: recorded by W&B as it is; must hold no secret.
            say: gets the run's address.
            warn: gets what does not work.

        Raises:
            ConfigError: wandb is not installed.
        """
        spec = find_spec("wandb")
        if spec is None or spec.origin is None:  # a folder named wandb has no origin
            raise ConfigError(
                f"tracking.wandb.mode={settings.mode} needs a package that is missing: "
                f"pip install wandb (or set tracking.wandb.mode=disabled)"
            )
        self._say, self._warn = say, warn
        self._waiting: deque[bytes] = deque(maxlen=QUEUE_RECORDS)
        self._unsent = b""  # the rest of a line that the pipe took in part
        self._unread = b""
        self._num_dropped = 0
        self._log_file = folder / "log" / "wandb.txt"
        self._log_file.parent.mkdir(parents=True, exist_ok=True)
        child = {
            "mode": settings.mode,
            "project": settings.project,
            "entity": settings.entity,
            "name": settings.name,
            "id": run_id,
            "dir": str(folder),
            "config": dict(run_config),
            "training_pid": os.getpid(),
            "init_sec": INIT_SEC,
        }
        root = str(Path(__file__).parents[1])
        search_path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
        environment = os.environ | {SETTINGS_VARIABLE: json.dumps(child), "PYTHONPATH": search_path}
        with self._log_file.open("ab") as log_file, blocked():  # the child inherits it
            self._process = subprocess.Popen(
                [sys.executable, "-m", "dist_train.wandb_tracker"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log_file,
                bufsize=0,
                env=environment,
                start_new_session=True,  # a Ctrl-C is for the ranks; they close the run
            )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._to_child, self._from_child = self._process.stdin, self._process.stdout
        os.set_blocking(self._to_child.fileno(), False)
        os.set_blocking(self._from_child.fileno(), False)

    def log(self, record: Mapping[str, float | int | str | bool | None]) -> None:
        if self._to_child.closed:
            return
        self._num_dropped += len(self._waiting) == QUEUE_RECORDS
        self._waiting.append(json.dumps(dict(record)).encode() + b"\n")
        self._exchange()

    def rewind(self, step: int, *, evaluated: bool) -> None:
        """Leave what is there: W&B keeps every record, and draws by `step`."""

    def close(self, *, exit_code: int) -> None:
        """End the W&B run; waits at most CLOSE_SEC, then ends the child."""
        deadline = time.monotonic() + CLOSE_SEC
        self._waiting.append(json.dumps({"exit_code": exit_code}).encode() + b"\n")
        while not self._to_child.closed and self._exchange() and time.monotonic() < deadline:
            select.select([], [self._to_child], [], 0.1)
        self._to_child.close()
        try:
            self._process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            self._warn(
                f"W&B did not finish within {CLOSE_SEC:g} s and was ended: see "
                f"{self._log_file}; metrics.jsonl has every record."
            )
            self._process.kill()
            self._process.wait()
        self._relay()
        self._from_child.close()
        if self._num_dropped:
            self._warn(f"W&B was too slow: {self._num_dropped} records are in metrics.jsonl only.")

    def _exchange(self) -> bool:
        """Hand over what the pipe takes and pass messages on; say whether lines are left."""
        self._relay()
        try:
            while self._unsent or self._waiting:
                self._unsent = self._unsent or self._waiting.popleft()
                self._unsent = self._unsent[os.write(self._to_child.fileno(), self._unsent) :]
        except BlockingIOError:
            return True
        except BrokenPipeError:
            self._to_child.close()
            self._warn(
                f"W&B has stopped: see {self._log_file}. Training goes on; metrics.jsonl has "
                f"every record."
            )
        return False

    def _relay(self) -> None:
        try:
            while chunk := os.read(self._from_child.fileno(), 65536):
                self._unread += chunk
        except BlockingIOError:
            pass  # nothing more for now
        *lines, self._unread = self._unread.split(b"\n")
        for kind, text in map(json.loads, lines):
            (self._warn if kind == "warn" else self._say)(text)


class _Child:
    """The process that holds the W&B run."""

    def __init__(self) -> None:
        self._settings: dict[str, Any] = json.loads(os.environ[SETTINGS_VARIABLE])
        self._messages = os.dup(1)
        os.dup2(2, 1)  # what wandb prints goes to the log file
        os.environ.pop("WANDB_SERVICE", None)  # of another process or of a failed start

    def run(self) -> NoReturn:
        """Log each line of standard input until it ends, then leave without wandb's exit hooks."""
        for number in SIGNALS:  # the end of input is the end
            signal.signal(number, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)  # blocked until here
        run = self._start()
        # Not wandb's own step: it refuses to go back, as a resumed or rolled back run does.
        run.define_metric("*", step_metric="step")
        exit_code = 1  # of a run that ended without a word
        for line in sys.stdin:
            if line.endswith("\n"):
                record = {k: v for k, v in json.loads(line).items() if v is not None}
                exit_code = record.get("exit_code", exit_code)
                if "exit_code" not in record:
                    run.log(record)
        try:
            run.finish(exit_code=exit_code)
        except TimeoutError:
            folder = Path(run.dir).parent
            self._tell("warn", f"W&B did not take everything in time: `wandb sync {folder}`")
        os._exit(0)

    def _start(self) -> Any:
        import wandb

        given = self._settings
        offline = given["mode"] == "offline" or os.environ.get("WANDB_MODE") == "offline"
        if not offline and (reason := _unreachable(wandb.setup().settings.base_url)):
            self._tell("warn", f"W&B goes offline: {reason}")
            offline = True
        wanted = {
            "console": "off",
            "silent": True,
            "disable_git": True,  # a remote's address can hold a token
            "disable_code": True,
            "init_timeout": given["init_sec"],
            "finish_timeout": FINISH_SEC,
            "finish_timeout_raises": True,
            "x_stats_pid": given["training_pid"],
        }
        known = {k: v for k, v in wanted.items() if k in wandb.Settings.model_fields}
        try:
            run = wandb.init(
                mode="offline" if offline else "online",
                resume=None if offline else "allow",
                settings=wandb.Settings(**known),
                **{k: given[k] for k in ("project", "entity", "name", "id", "dir", "config")},
            )
        except Exception as error:
            if offline:
                raise
            self._start_again_offline(f"{type(error).__name__}: {error}"[:300])
        if not offline:
            self._tell("say", f"W&B: {run.url}")
        else:
            self._tell("say", f"W&B offline: upload later with `wandb sync {Path(run.dir).parent}`")
        return run

    def _start_again_offline(self, reason: str) -> NoReturn:
        """Replace this process: wandb keeps the id of a run that failed to start as in use."""
        self._tell("warn", f"W&B goes offline: {reason}")
        os.environ[SETTINGS_VARIABLE] = json.dumps(self._settings | {"mode": "offline"})
        os.dup2(self._messages, 1)
        os.execv(sys.executable, [sys.executable, "-m", "dist_train.wandb_tracker"])

    def _tell(self, kind: str, text: str) -> None:
        os.write(self._messages, json.dumps([kind, " ".join(text.split())]).encode() + b"\n")


def _unreachable(base_url: str) -> str | None:
    """Say why the server (or the proxy to it) takes no connection; waits at most PROBE_SEC."""
    server = urlsplit(base_url)
    proxy = getproxies().get(server.scheme)
    target = server
    if proxy and not proxy_bypass(server.hostname or ""):
        target = urlsplit(proxy if "://" in proxy else f"http://{proxy}")
    port = target.port or (443 if target.scheme == "https" else 80)
    outcome = [f"no answer within {PROBE_SEC:g} s"]

    def connect() -> None:
        try:
            create_connection((target.hostname or "", port), timeout=PROBE_SEC).close()
            outcome[0] = ""
        except OSError as error:
            outcome[0] = str(error)

    # In a thread: looking a name up has no timeout of its own.
    probe = Thread(target=connect, daemon=True)
    probe.start()
    probe.join(PROBE_SEC)
    return outcome[0] and f"{target.hostname}:{port}: {outcome[0]}"


if __name__ == "__main__":
    _Child().run()
