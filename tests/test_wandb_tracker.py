"""Weights & Biases with no key, no network and servers that never answer."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

import pytest

from dist_train.config import ConfigError, WandbConfig
from dist_train.wandb_tracker import QUEUE_RECORDS, WandbTracker, wandb_mode

pytestmark = pytest.mark.slow


PATIENCE_SEC = 30.0  # generous: the child imports wandb on a busy machine


class Run:
    """A tracker with what it said."""

    def __init__(self, folder: Path, mode: Literal["auto", "online", "offline"]) -> None:
        self.folder = folder
        self.said: list[str] = []
        self.warned: list[str] = []
        self.tracker = WandbTracker(
            WandbConfig(mode=mode, project="test"),
            folder,
            run_id="id0",
            run_config={"optim": {"lr": 0.1}},
            say=self.said.append,
            warn=self.warned.append,
        )

    def log_until(self, arrived: Callable[[], object]) -> None:
        deadline = time.monotonic() + PATIENCE_SEC
        step = 0
        while not arrived():
            assert time.monotonic() < deadline, (self.folder / "log" / "wandb.txt").read_text()
            step += 1
            self.tracker.log({"step": step, "train/loss": float("nan"), "none": None})
            time.sleep(0.02)

    def files(self) -> list[Path]:
        return list((self.folder / "wandb").glob("offline-run-*-id0/run-id0.wandb"))


@pytest.fixture(autouse=True)
def _no_account(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))


@pytest.fixture
def with_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "a" * 40)


@pytest.fixture
def black_hole(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Point wandb at a server that takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0), backlog=64) as server:
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{server.getsockname()[1]}")
        yield


def test_offline_mode_writes_a_run_folder(tmp_path: Path) -> None:
    run = Run(tmp_path, "offline")
    run.log_until(lambda: run.said)
    run.tracker.close(exit_code=0)
    assert run.files()
    assert run.files()[0].stat().st_size > 0
    assert run.said[0].startswith("W&B offline: upload later with `wandb sync ")
    assert run.warned == []


@pytest.mark.usefixtures("with_key")
def test_an_unreachable_server_means_offline_with_one_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:1")
    run = Run(tmp_path, "auto")
    run.log_until(lambda: run.said)
    run.tracker.close(exit_code=0)
    assert run.files()
    assert len(run.warned) == 1
    assert run.warned[0].startswith("W&B goes offline: 127.0.0.1:1: ")


@pytest.mark.usefixtures("black_hole")
def test_without_a_key_the_run_is_offline(tmp_path: Path) -> None:
    run = Run(tmp_path, "online")
    run.log_until(lambda: run.said)
    run.tracker.close(exit_code=0)
    assert run.files()
    assert len(run.warned) == 1
    assert "API key" in run.warned[0]


@pytest.mark.usefixtures("with_key", "black_hole")
def test_a_server_that_never_answers_holds_up_neither_log_nor_close(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dist_train.wandb_tracker.CLOSE_SEC", 2.0)
    run = Run(tmp_path, "auto")
    start = time.monotonic()
    for step in range(3 * QUEUE_RECORDS):
        run.tracker.log({"step": step, "train/loss": 0.5})
    run.tracker.close(exit_code=0)
    assert time.monotonic() - start < PATIENCE_SEC
    assert run.warned[0].startswith("W&B did not finish within 2 s and was ended")
    assert run.warned[1].startswith("W&B was too slow: ")


@pytest.mark.usefixtures("with_key", "black_hole")
def test_a_server_that_never_answers_means_offline_in_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dist_train.wandb_tracker.INIT_SEC", 2.0)
    run = Run(tmp_path, "auto")
    run.log_until(lambda: run.said)
    run.tracker.close(exit_code=0)
    assert run.files()
    assert len(run.warned) == 1
    assert run.warned[0].startswith("W&B goes offline: CommError")


def test_a_child_that_dies_is_said_once(tmp_path: Path) -> None:
    run = Run(tmp_path, "offline")
    os.kill(run.tracker._process.pid, signal.SIGKILL)
    run.log_until(lambda: run.warned)
    for step in range(10):
        run.tracker.log({"step": step})
    run.tracker.close(exit_code=0)
    assert len(run.warned) == 1
    assert run.warned[0].startswith("W&B has stopped")


def test_a_killed_training_process_leaves_no_child(tmp_path: Path) -> None:
    code = """if True:
        import os, pathlib, signal, sys
        from dist_train.config import WandbConfig
        from dist_train.wandb_tracker import WandbTracker
        tracker = WandbTracker(WandbConfig(mode="offline"), pathlib.Path(sys.argv[1]), run_id="id0",
                               run_config={}, say=print, warn=print)
        tracker.log({"step": 1, "train/loss": 0.5})
        print(tracker._process.pid, flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    """
    dead = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert dead.returncode == -9, dead.stderr
    deadline = time.monotonic() + PATIENCE_SEC
    while _is_alive(int(dead.stdout)):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert list((tmp_path / "wandb").glob("offline-run-*-id0/run-id0.wandb"))


@pytest.mark.parametrize(
    ("mode", "env", "in_force"),
    [
        ("auto", {}, "auto"),
        ("auto", {"WANDB_MODE": "disabled"}, "disabled"),
        ("auto", {"WANDB_DISABLED": "true"}, "disabled"),
        ("auto", {"WANDB_MODE": "offline", "WANDB_DISABLED": "false"}, "auto"),
        ("online", {"WANDB_MODE": "disabled"}, "online"),
        ("disabled", {"WANDB_MODE": "online"}, "disabled"),
    ],
)
def test_auto_is_off_where_wandbs_own_variables_say_so(
    mode: Literal["auto", "online", "disabled"], env: dict[str, str], in_force: str
) -> None:
    assert wandb_mode(WandbConfig(mode=mode), env) == in_force


def test_a_missing_package_names_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dist_train.wandb_tracker.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="pip install wandb"):
        Run(tmp_path, "offline")


def _is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
