"""The console is a convenience: closed, without isatty or for ASCII only, a run goes on."""

import io
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from dist_train.config.streams import is_terminal, put
from dist_train.tracking import ConsoleTracker, Trackers
from tests.settings import SMALL, small

ROOT = Path(__file__).parents[1]
ODD = "\u00fc\u65e5"


class Tee:
    """As many scripts have it: neither isatty nor encoding."""

    def __init__(self) -> None:
        self.text = ""

    def write(self, text: str) -> None:
        self.text += text


def ascii_stream() -> io.TextIOWrapper:
    return io.TextIOWrapper(io.BytesIO(), encoding="ascii", newline="")


def test_every_stream_takes_what_it_can() -> None:
    tee, narrow = Tee(), ascii_stream()
    for stream in (None, tee, narrow):
        put(stream, f"a {ODD}\n")
        assert not is_terminal(stream)
    assert tee.text == f"a {ODD}\n"
    assert narrow.buffer.getvalue() == rb"a \xfc\u65e5" + b"\n"  # pyright: ignore[reportAttributeAccessIssue]  # BytesIO
    with open("/dev/full", "wb", buffering=0) as full, pytest.raises(OSError, match="space"):
        put(full, b"a")  # pyright: ignore[reportArgumentType]  # an unbuffered one takes bytes


@pytest.mark.parametrize("stream", [None, Tee(), ascii_stream()], ids=["none", "tee", "ascii"])
def test_progress_goes_on_without_a_console(stream: Any) -> None:
    warned: list[str] = []
    trackers = Trackers([ConsoleTracker(stream, total_steps=10)], warn=warned.append)
    trackers.log({"step": 5, "train/loss": 0.5, "eval/accuracy": 0.1})
    trackers.message(f"files {ODD}")
    trackers.close(exit_code=0)
    assert warned == []


@pytest.mark.parametrize("stream", [None, Tee(), ascii_stream()], ids=["none", "tee", "ascii"])
def test_a_program_without_a_console_trains(
    stream: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dist_train.train import train

    monkeypatch.setattr(sys, "stdout", stream)
    assert train(small(tmp_path / ODD, "train.steps=2"))["state"] == "finished"


CLOSED = """
import os, sys
from dist_train.config.streams import open_standard_streams
open_standard_streams()
files = [os.fstat(number) for number in (0, 1, 2)]
print("print"), sys.stderr.write("write")
file = os.open(sys.argv[1], os.O_CREAT | os.O_WRONLY)
assert file > 2, file
"""


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-", ">&- 2>&-"])
def test_a_closed_stream_is_no_file_of_ours(closed: str, tmp_path: Path) -> None:
    command = ["sh", "-c", f'exec "$@" {closed}', "sh", sys.executable, "-c", CLOSED]
    done = subprocess.run(
        [*command, str(tmp_path / "f")], cwd=ROOT, capture_output=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == (b"" if ">&- 2" in closed or closed == ">&-" else b"print\n")


@pytest.mark.slow
@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&- >&- 2>&-"])
def test_a_run_without_standard_streams(closed: str, tmp_path: Path) -> None:
    words = [*SMALL, "train.steps=2", f"run_dir={tmp_path / ODD}"]
    command = ["sh", "-c", f'exec "$@" {closed}', "sh", sys.executable, "-m"]
    done = subprocess.run(
        [*command, "launch.cli", "run", "--nproc=1", *words], cwd=ROOT, check=False, timeout=120
    )
    assert done.returncode == 0
    assert (tmp_path / ODD / "summary.json").is_file()


@pytest.mark.slow
def test_a_console_of_few_letters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    words = [*SMALL, "train.steps=2", f"run_dir={tmp_path / ODD}", f"tracking.wandb.name={ODD}"]
    for steps in (2, 3):
        command = [sys.executable, "-m", "dist_train", *words, f"train.steps={steps}"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, check=False, timeout=120)
        assert done.returncode == 0, done.stderr
    assert b"resumed from" in done.stdout
