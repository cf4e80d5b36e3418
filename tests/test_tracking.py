"""metrics.jsonl, the console and TensorBoard, on real files, processes and terminals."""

import errno
import json
import math
import os
import pty
import subprocess
import sys
from io import StringIO
from pathlib import Path
from typing import Any

import pytest

from dist_train.config import Config, TrackingConfig
from dist_train.journal import LineFile
from dist_train.tracking import (
    ConsoleTracker,
    JsonlTracker,
    Record,
    TensorBoardTracker,
    Trackers,
    open_trackers,
)


def lines(path: Path) -> list[dict[str, float | str | None]]:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


def write_steps(path: Path, first: int, last: int, *, restored_step: int, attempt: int) -> None:
    tracker = JsonlTracker(path, restored_step=restored_step)
    for step in range(first, last + 1):
        tracker.log({"step": step, "attempt": attempt, "train/loss": 1 / step})
    tracker.close(exit_code=0)


def test_each_record_is_one_line_with_step_attempt_and_time(tmp_path: Path) -> None:
    write_steps(tmp_path / "metrics.jsonl", 1, 3, restored_step=0, attempt=2)
    records = lines(tmp_path / "metrics.jsonl")
    assert [(r["step"], r["attempt"], r["train/loss"]) for r in records] == [
        (1, 2, 1.0),
        (2, 2, 0.5),
        (3, 2, 1 / 3),
    ]
    assert all(isinstance(r["time"], float) for r in records)


def test_numbers_that_are_not_finite_stay_visible_in_strict_json(tmp_path: Path) -> None:
    tracker = JsonlTracker(tmp_path / "metrics.jsonl", restored_step=0)
    tracker.log({"step": 1, "a": math.nan, "b": math.inf, "c": -math.inf, "d": None, "e": True})
    tracker.close(exit_code=0)
    (record,) = lines(tmp_path / "metrics.jsonl")
    assert [record[name] for name in "abcde"] == ["NaN", "Infinity", "-Infinity", None, True]


def test_a_resume_leaves_no_step_missing_and_none_repeated(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write_steps(path, 1, 30, restored_step=0, attempt=1)
    write_steps(path, 21, 50, restored_step=20, attempt=2)
    records = lines(path)
    assert [r["step"] for r in records] == list(range(1, 51))
    assert [r["attempt"] for r in records] == [1] * 20 + [2] * 30
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    "torn", ['{"step": 3, "train/lo', '{"step": 3}', "{", "7\n", "{}\n", "\0\0\n"]
)
def test_a_line_cut_short_or_damaged_is_dropped(tmp_path: Path, torn: str) -> None:
    path = tmp_path / "metrics.jsonl"
    write_steps(path, 1, 2, restored_step=0, attempt=1)
    with path.open("a") as file:
        file.write(torn)
    write_steps(path, 3, 4, restored_step=5, attempt=2)
    assert [r["step"] for r in lines(path)] == [1, 2, 3, 4]


def test_a_run_that_never_saved_starts_the_file_again(tmp_path: Path) -> None:
    write_steps(tmp_path / "metrics.jsonl", 1, 9, restored_step=0, attempt=1)
    write_steps(tmp_path / "metrics.jsonl", 1, 2, restored_step=0, attempt=2)
    assert [r["attempt"] for r in lines(tmp_path / "metrics.jsonl")] == [2, 2]


def test_a_process_that_dies_at_once_loses_nothing_already_logged(tmp_path: Path) -> None:
    code = """if True:
        import os, pathlib, signal, sys
        from dist_train.tracking import JsonlTracker
        tracker = JsonlTracker(pathlib.Path(sys.argv[1]), restored_step=0)
        for step in range(1, 401):
            tracker.log({"step": step, "train/loss": 0.5})
        os.kill(os.getpid(), signal.SIGKILL)
    """
    path = tmp_path / "metrics.jsonl"
    dead = subprocess.run([sys.executable, "-c", code, str(path)], check=False)
    assert dead.returncode == -9
    assert [r["step"] for r in lines(path)] == list(range(1, 401))


PROGRESS: Record = {
    "step": 100,
    "epoch": 2,
    "train/loss": 1.25,
    "train/accuracy": 0.5,
    "perf/images_per_sec": 12345.6,
    "memory/peak_gib": 1.5,
}


def test_without_a_terminal_progress_is_plain_lines() -> None:
    stream = StringIO()
    console = ConsoleTracker(stream, total_steps=200)
    console.log({"step": 50, "train/loss": math.nan})
    console.log(PROGRESS)
    console.message("saved step 100")
    console.log({"step": 100, "eval/accuracy": 0.75, "eval/loss": 0.5, "eval/samples": 10000})
    console.close(exit_code=0)
    assert stream.getvalue().splitlines() == [
        "step 50/200  loss NaN",
        "step 100/200  epoch 2  loss 1.2500  accuracy 50.00%  12,346 images/s  ETA 0:00:00"
        "  1.50 GiB",
        "saved step 100",
        "evaluation at step 100: accuracy 75.00%, loss 0.5000, samples 10000",
    ]


@pytest.mark.parametrize(("wait", "told"), [(0.04, ""), (0.25, "25% waiting for data  ")])
def test_waiting_for_data_is_shown_where_it_matters(wait: float, told: str) -> None:
    stream = StringIO()
    ConsoleTracker(stream, total_steps=200).log({**PROGRESS, "perf/data_wait": wait})
    assert f"12,346 images/s  {told}1.50 GiB" in stream.getvalue()


def test_on_a_terminal_the_bar_is_rewritten_and_messages_stand_above_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    monkeypatch.setenv("LINES", "20")
    ours, theirs = pty.openpty()
    with os.fdopen(theirs, "w") as stream:
        console = ConsoleTracker(stream, total_steps=200)
        console.log({"step": 50, "train/loss": math.nan})
        console.log(PROGRESS)
        console.message("saved step 100")
        Trackers([console]).message("finished", last=True)
        console.close(exit_code=0)
        screen = ""
        while "finished\r\n" not in screen:  # a read returns what has passed so far
            screen += os.read(ours, 65536).decode()
        screen = screen.replace("\r\n", "\n")
    os.close(ours)
    final = [line.rpartition("\r")[2].rstrip() for line in screen.split("\n")]
    bar = "[==========          ]  100/200  epoch 2  loss 1.2500  accur"
    assert final == ["saved step 100", bar[:59], "finished", ""]
    assert "\r[=====               ]  50/200  loss NaN" in screen
    assert all(len(part) < 60 for line in screen.split("\n") for part in line.split("\r"))


def test_tensorboard_shows_each_step_once_after_a_resume(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for first, last, restored_step, loss in [(1, 9, 0, 1.0), (6, 12, 5, 2.0)]:
        tracker = TensorBoardTracker(tmp_path, restored_step=restored_step)
        for step in range(first, last + 1):
            tracker.log({"step": step, "attempt": 1, "train/loss": loss, "eval/note": "text"})
        tracker.close(exit_code=0)
    events = EventAccumulator(str(tmp_path)).Reload()
    assert events.Tags()["scalars"] == ["train/loss"]
    points = events.Scalars("train/loss")
    assert [(p.step, p.value) for p in points] == [
        *((step, 1.0) for step in range(1, 6)),
        *((step, 2.0) for step in range(6, 13)),
    ]


def test_open_trackers_feeds_what_is_configured(tmp_path: Path) -> None:
    stream, warnings = StringIO(), []
    trackers = open_trackers(
        Config(tracking=TrackingConfig(tensorboard=True)),
        tmp_path,
        restored_step=0,
        wandb_id="id",
        total_steps=10,
        stream=stream,
        warn=warnings.append,
    )
    trackers.log({"step": 1, "train/loss": 0.5})
    trackers.message("hello")
    trackers.close(exit_code=0)
    trackers.close(exit_code=0)
    assert stream.getvalue() == "step 1/10  loss 0.5000\nhello\n"
    assert len(lines(tmp_path / "metrics.jsonl")) == 1
    assert list((tmp_path / "tensorboard").iterdir())
    assert warnings == []


def test_a_console_that_is_gone_is_said_once_and_does_not_stop_the_run(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    warnings: list[str] = []
    stream = os.fdopen(writer, "w")
    journal = JsonlTracker(tmp_path / "metrics.jsonl", restored_step=0)
    trackers = Trackers([ConsoleTracker(stream, total_steps=10), journal], warn=warnings.append)
    for step in (1, 2, 3):
        trackers.log({"step": step, "train/loss": 0.5})
    trackers.close(exit_code=0)
    assert len(lines(tmp_path / "metrics.jsonl")) == 3
    assert len(warnings) == 1
    assert warnings[0].startswith("ConsoleTracker is off after BrokenPipeError")
    with pytest.raises(BrokenPipeError):
        stream.close()


def test_lines_that_the_disk_refused_come_when_it_takes_them_again(tmp_path: Path) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    trackers = Trackers([JsonlTracker(gone / "metrics.jsonl", restored_step=0)])
    trackers.log({"step": 1})
    gone.rename(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "metrics.jsonl").unlink()
    trackers.log({"step": 2})
    trackers.log({"step": 3})
    [told] = trackers.take_news()
    assert str(gone) in told
    assert "training goes on" in told
    assert trackers.take_news() == []
    (tmp_path / "elsewhere").rename(gone)
    [told] = trackers.take_news()
    assert "2 lines had waited" in told
    trackers.close(exit_code=0)
    assert [r["step"] for r in lines(gone / "metrics.jsonl")] == [2, 3]


def test_lines_that_are_lost_are_told_and_end_no_run(tmp_path: Path) -> None:
    warnings: list[str] = []
    journal = JsonlTracker(tmp_path / "metrics.jsonl", restored_step=0)
    trackers = Trackers([journal], warn=warnings.append)
    (tmp_path / "metrics.jsonl").mkdir()
    trackers.log({"step": 1})
    trackers.log({"step": 2})
    trackers.close(exit_code=0)
    [told] = warnings
    assert told.startswith("2 lines of")
    assert "Is a directory" in told


def test_a_file_that_cannot_even_be_closed_ends_no_run_and_its_number_is_not_used_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A network file system may report a full quota by close(), which has closed the file."""
    file = LineFile(tmp_path / "events.jsonl")
    file.append("one")
    number, real_close, real_write = file._file, os.close, os.write
    assert number is not None

    def close(fd: int) -> None:
        real_close(fd)
        if fd == number:
            raise OSError(errno.EDQUOT, "Disk quota exceeded")

    def write(fd: int, data: Any) -> int:
        if fd == number:
            raise OSError(errno.EDQUOT, "Disk quota exceeded")
        return real_write(fd, data)

    with monkeypatch.context() as patch:
        patch.setattr(os, "close", close)
        patch.setattr(os, "write", write)
        file.append("two")
        stranger = os.open(tmp_path / "checkpoint", os.O_RDWR | os.O_CREAT)
        assert stranger == number, "the kernel gives the number to the next file"
    [told] = file.take_news()[:1]
    assert "Disk quota exceeded; training goes on" in told
    assert file.close() is None
    assert (tmp_path / "events.jsonl").read_text() == "one\ntwo\n"
    assert os.fstat(stranger).st_size == 0
    os.close(stranger)


def test_other_ranks_have_trackers_that_do_nothing() -> None:
    trackers = Trackers()
    trackers.log({"step": 1})
    trackers.message("nobody hears this")
    trackers.close(exit_code=0)
