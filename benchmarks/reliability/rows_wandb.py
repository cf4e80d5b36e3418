"""Row W1: Weights & Biases behind bad servers."""

import contextlib
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from benchmarks.reliability.in_ranks import wait_until
from benchmarks.reliability.row import Row, Trial, check
from dist_train.config import WandbConfig
from dist_train.wandb_tracker import WandbTracker

SERVERS = ("no such port", "no such name", "never answers", "error 500", "slow", "child killed")
START_SEC, CLOSE_SEC, STEP_SEC = 5.0, 20.0, 0.001
LINES, PATIENCE_SEC = 300, 45.0


def w1(trial: Trial) -> float | None:
    """Log to one of the bad servers as rank 0 does; time the start, the steps and the end."""
    kind = trial.one_of(SERVERS)
    said: list[str] = []
    with _server(kind) as url, pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("WANDB_")]:
            patch.delenv(name)
        for name, value in (("HOME", trial.folder), ("NETRC", trial.folder / "netrc")):
            patch.setenv(name, str(value))
        patch.setenv("WANDB_API_KEY", "a" * 40)
        patch.setenv("WANDB_BASE_URL", url)
        patch.setattr("dist_train.wandb_tracker.INIT_SEC", 2.0)
        patch.setattr("dist_train.wandb_tracker.CLOSE_SEC", 5.0)
        begin = time.monotonic()
        tracker = WandbTracker(
            WandbConfig(mode="auto", project="test"),
            trial.folder,
            run_id="id0",
            run_config={"optim": {"lr": 0.1}},
            say=said.append,
            warn=said.append,
        )
        start_sec = time.monotonic() - begin
        trial.fired = True
        if kind == "child killed":
            assert tracker._process.pid is not None
            os.kill(tracker._process.pid, signal.SIGKILL)
        slowest, step, end = 0.0, 0, time.monotonic() + PATIENCE_SEC
        while step < LINES or (not said and time.monotonic() < end):
            step += 1
            begin = time.thread_time()
            tracker.log({"step": step, "train/loss": 0.5})
            slowest = max(slowest, time.thread_time() - begin)
            time.sleep(0.001)
        begin = time.monotonic()
        tracker.close(exit_code=0)
        close_sec = time.monotonic() - begin
    trial.notes |= {"start_sec": round(start_sec, 2), "close_sec": round(close_sec, 2)}
    check(start_sec <= START_SEC, f"the start took {start_sec:.1f} s")
    check(slowest <= STEP_SEC * 20, f"a line cost {1e3 * slowest:.1f} ms of this thread")
    check(close_sec <= CLOSE_SEC, f"the end took {close_sec:.1f} s")
    check(said, "nothing was said")
    wait_until(lambda: tracker._process.poll() is not None, "the child lives on", 10.0)
    return close_sec


@contextmanager
def _server(kind: str) -> Iterator[str]:
    if kind in ("no such port", "child killed"):
        yield "http://127.0.0.1:1"
    elif kind == "no such name":
        yield "http://wandb.invalid"
    elif kind == "never answers":
        with socket.create_server(("127.0.0.1", 0), backlog=64) as server:
            yield f"http://127.0.0.1:{server.getsockname()[1]}"
    else:
        slow = threading.Event()

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                if kind == "slow":
                    slow.wait(10.0)
                with contextlib.suppress(OSError):  # a client that did not wait
                    self.send_error(500)

            do_GET = do_POST  # noqa: N815 # the name is the library's

            def log_message(self, format: str, *args: object) -> None:
                pass

        with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
            thread = threading.Thread(target=server.serve_forever, args=(0.01,))
            thread.start()
            try:
                yield f"http://127.0.0.1:{server.server_port}"
            finally:
                slow.set()
                server.shutdown()
                thread.join()


ROWS = (
    Row(
        id="W1",
        promise="W&B unreachable, silent, failing, slow or dead delays the start by 5 s at most, "
        "the steps not at all, and the end by seconds, with a word to the user",
        injection=", ".join(SERVERS),
        num_trials=30,
        measures="of closing",
        work=w1,
    ),
)
