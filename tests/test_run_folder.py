"""One folder, one run: the lock, what a second run is told, and what the folder holds."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from dist_train.config import Config, ConfigError
from tests.faults import Fault, train_with
from tests.ranks import run_ranks, start_ranks_of
from tests.settings import SMALL, small


def trained(config: Config) -> dict[str, Any]:
    from dist_train.train import train

    return train(config)


HOLD = """
import sys, time
from pathlib import Path
from dist_train.distributed import start_ranks
from dist_train.run import open_run
from tests.settings import small
config = small(sys.argv[1])
with start_ranks(config) as ranks, open_run(config, ranks):
    sys.stdout.write("held\\n"); sys.stdout.flush()
    time.sleep(600)
"""


@pytest.fixture
def holder(tmp_path: Path) -> Any:
    """A process that holds the run folder."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert any(line == "held\n" for line in process.stdout)
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


@pytest.mark.slow
def test_a_second_run_is_told_who_holds_the_folder_and_exits_with_2(
    holder: Any, tmp_path: Path
) -> None:
    command = [sys.executable, "-m", "dist_train", *SMALL, f"run_dir={tmp_path}", "train.steps=3"]
    second = subprocess.run(command, capture_output=True, text=True, check=False)
    assert second.returncode == 2
    assert f"run_dir {tmp_path} is in use by process {holder.pid} on" in second.stderr
    assert len(second.stderr.splitlines()) == 1
    assert holder.poll() is None


@pytest.mark.slow
def test_the_lock_of_a_dead_process_is_taken_over(holder: Any, tmp_path: Path) -> None:
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait()
    assert run_ranks(trained, 0, small(tmp_path, "train.steps=3"))[0]["state"] == "finished"


@pytest.mark.slow
def test_of_two_runs_started_at_once_exactly_one_wins(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "dist_train",
        *SMALL,
        f"run_dir={tmp_path}",
        "train.steps=1000000",
    ]
    both = [
        subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    while all(p.poll() is None for p in both):
        time.sleep(0.05)
    [loser] = [p for p in both if p.poll() is not None]
    [winner] = [p for p in both if p.poll() is None]
    assert loser.returncode == 2
    assert f"is in use by process {winner.pid}" in loser.communicate()[1]
    while not (tmp_path / "metrics.jsonl").exists():  # it has its signal handlers by now
        time.sleep(0.05)
    winner.send_signal(signal.SIGTERM)
    assert (winner.communicate()[1], winner.returncode) == ("", 0)


def test_the_folder_of_a_finished_run_holds_what_is_promised(tmp_path: Path) -> None:
    summary = run_ranks(trained, 2, small(tmp_path, "train.epochs=2"))[0]
    names = {p.name for p in tmp_path.iterdir()}
    assert {"config.yaml", "environment.json", "status.json", "metrics.jsonl"} <= names
    assert {"events.jsonl", "summary.json", "checkpoints", "log"} <= names
    assert json.loads((tmp_path / "status.json").read_text())["state"] == "finished"
    assert json.loads((tmp_path / "summary.json").read_text()) == summary
    for key in ("dataset", "world_size", "steps", "samples_seen", "weights_sha256", "wall_sec"):
        assert key in summary
    assert summary["samples_seen"] == 2 * 9 * 24
    assert "SECRET" not in (tmp_path / "environment.json").read_text()


@pytest.mark.slow
def test_a_finished_run_is_shown_again_and_more_epochs_continue_it(
    tmp_path: Path,
) -> None:
    first = run_ranks(trained, 0, small(tmp_path, "train.epochs=1"))[0]
    again = run_ranks(trained, 0, small(tmp_path, "train.epochs=1"))[0]
    assert again == first
    assert "this run is finished" in (tmp_path / "log" / "rank0.txt").read_text()
    more = run_ranks(trained, 0, small(tmp_path, "train.epochs=2"))[0]
    assert more["steps"] == 18
    told = (tmp_path / "log" / "rank0.txt").read_text()
    assert "resumed from" in told
    assert "the length changes" in told


def test_resume_never_refuses_a_folder_with_checkpoints(tmp_path: Path) -> None:
    run_ranks(trained, 0, small(tmp_path, "train.epochs=1"))
    config = small(tmp_path, "train.epochs=2", "resume=never")
    outcome = start_ranks_of(train_with, 0, config, None)[0]
    assert isinstance(outcome.error, ConfigError)
    assert "resume=never" in str(outcome.error)


@pytest.mark.slow
def test_resume_from_a_path_starts_at_that_checkpoint_and_then_at_its_own(tmp_path: Path) -> None:
    source = small(tmp_path / "a", "train.epochs=2", "checkpoint.every_steps=9")
    clean = run_ranks(trained, 1, source)[0]
    start = tmp_path / "a" / "checkpoints" / "step_00000009"
    mark = tmp_path / "fired"
    config = small(tmp_path / "b", "train.epochs=2", f"resume={start}", "checkpoint.every_steps=2")
    fault = Fault(rank=0, step=14, place="before the step", mark=str(mark))
    start_ranks_of(train_with, 1, config, fault)
    assert mark.exists()
    resumed = run_ranks(trained, 1, config)[0]
    assert resumed["weights_sha256"] == clean["weights_sha256"]
    events = [json.loads(x) for x in (tmp_path / "b" / "events.jsonl").read_text().splitlines()]
    origins = [e["checkpoint"] for e in events if e["event"] == "resumed"]
    assert origins[0] == str(start)
    assert origins[1].startswith(str(tmp_path / "b"))


def test_profile_steps_writes_a_trace_of_the_chosen_ranks(tmp_path: Path) -> None:
    options = ("train.steps=8", "profile.steps=[2,4]", "profile.ranks=[1]")
    run_ranks(trained, 2, small(tmp_path, *options))
    [trace] = (tmp_path / "profile").iterdir()
    assert trace.name == "rank1_steps_2_4.json"
    names = {event.get("name", "") for event in json.loads(trace.read_text())["traceEvents"]}
    assert any("convolution_backward" in name for name in names)


def test_the_time_limit_stops_and_saves_like_a_signal(tmp_path: Path) -> None:
    options = ("train.steps=1000000", "train.max_minutes=0.01", "eval.every_epochs=null")
    ends = run_ranks(trained, 2, small(tmp_path, *options))
    assert {e["state"] for e in ends} == {"preempted"}
    status = json.loads((tmp_path / "status.json").read_text())
    assert status["reason"].startswith("train.max_minutes is over on rank")
