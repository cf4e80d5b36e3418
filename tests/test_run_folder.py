"""One folder, one run: the lock, what a second run is told, and what the folder holds."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from dist_train import chain
from dist_train.config import Config, ConfigError
from dist_train.distributed import single_process
from dist_train.run_folder import RunFolder
from tests.faults import Fault, train_with
from tests.ranks import run_ranks, start_ranks_of
from tests.settings import SMALL, metrics, small


def trained(config: Config) -> dict[str, Any]:
    from dist_train.train import train

    return train(config)


HOLD = """
import sys, time
from pathlib import Path
from dist_train.distributed import start_ranks
from dist_train.claim import open_run
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
@pytest.mark.parametrize("attempt", [0, 1])
def test_a_restart_waits_for_a_lock_that_a_file_server_still_keeps(
    attempt: int, holder: Any, tmp_path: Path
) -> None:
    """A server gives a machine that died some time to come back before it drops its locks."""
    threading.Timer(2.0, holder.kill).start()
    ranks = single_process()
    folder = RunFolder(tmp_path, dataclasses.replace(ranks, attempt=attempt))
    if attempt == 0:
        with pytest.raises(ConfigError, match="in use by process"):
            folder.claim()
    else:
        folder.claim()
        assert holder.poll() is not None
    folder.release()


LOCK = """
import fcntl, sys, time
with open(sys.argv[1], "ab+", buffering=0) as lock:
    fcntl.lockf(lock, fcntl.LOCK_EX)
    sys.stdout.write("locked\\n"); sys.stdout.flush()
    sys.stdin.readline()
    lock.truncate(0)
    lock.write(b"process 12345 on here")
    time.sleep(600)
"""


def test_who_has_just_taken_the_lock_is_told_once_its_name_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pauses = 0
    with subprocess.Popen(
        [sys.executable, "-c", LOCK, str(tmp_path / "lock")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stdout.readline() == "locked\n"

        def paused(sec: float) -> None:
            nonlocal pauses
            pauses += 1
            if pauses == 3:  # asked twice, in vain
                assert process.stdin is not None
                process.stdin.write("\n")
                process.stdin.flush()
                while not (tmp_path / "lock").read_bytes():
                    pass

        monkeypatch.setattr("dist_train.run_folder.time.sleep", paused)
        folder = RunFolder(tmp_path, single_process())
        with pytest.raises(ConfigError, match="in use by process 12345 on here: wait"):
            folder.claim()
        folder.release()
        process.kill()
    assert pauses == 3


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


def test_an_evaluation_that_comes_again_is_logged_once(tmp_path: Path) -> None:
    # SIGTERM in the evaluation of the last step: it comes again at every start until a save
    mark = tmp_path / "fired"
    config = small(tmp_path / "run", "train.steps=6")
    fault = Fault(rank=0, step=5, place="in the evaluation", number=signal.SIGTERM, mark=str(mark))
    start_ranks_of(train_with, 0, config, fault)
    assert mark.exists()
    run_ranks(trained, 0, config)
    run_ranks(trained, 0, small(tmp_path / "run", "train.steps=8"))
    lines = [(m["step"], "eval/accuracy" in m) for m in metrics(tmp_path / "run")]
    assert lines == [(5, False), (6, False), (6, True), (8, False), (8, True)]


def test_a_run_from_another_ones_checkpoint_has_a_best_of_its_own(tmp_path: Path) -> None:
    run_ranks(trained, 0, small(tmp_path / "a", "train.steps=9", "optim.lr=0.3"))
    start = tmp_path / "a" / "checkpoints" / "step_00000009"
    options = ("train.steps=36", "train.early_stop_patience=1", "optim.lr=1e-6", f"resume={start}")
    summary = run_ranks(trained, 0, small(tmp_path / "b", *options))[0]
    assert summary["early_stopped"]
    assert summary["best_step"] > 9


def test_a_best_that_a_run_has_from_another_ones_checkpoint_is_saved_as_its_own(
    tmp_path: Path,
) -> None:
    mark = tmp_path / "fired"
    options = ("train.steps=12", "eval.every_steps=6", "log_every=1")
    fault = Fault(rank=0, step=5, place="in the evaluation", number=signal.SIGTERM, mark=str(mark))
    start_ranks_of(train_with, 0, small(tmp_path / "a", *options), fault)
    assert mark.exists()
    start = tmp_path / "a" / "checkpoints" / "step_00000006"
    options = (*options, "train.early_stop_patience=1", "optim.lr=1e-9", f"resume={start}")
    summary = run_ranks(trained, 0, small(tmp_path / "b", *options))[0]
    assert (summary["early_stopped"], summary["best_step"]) == (True, 6)
    assert (tmp_path / "b" / "checkpoints" / start.name).is_dir()


def test_a_run_that_passes_over_bad_checkpoints_sets_them_aside_and_saves_its_own(
    tmp_path: Path,
) -> None:
    options = ("checkpoint.every_steps=2", "checkpoint.keep_last=2", "eval.every_epochs=null")
    run_ranks(trained, 0, small(tmp_path, *options, "train.steps=6"))
    folder = tmp_path / "checkpoints"
    for step in (8, 10):  # of a later attempt
        shutil.copytree(folder / "step_00000004", folder / f"step_{step:08d}")
    fault = Fault(rank=0, step=6, place="after the step", number=signal.SIGTERM, mark="/dev/null")
    stopped = start_ranks_of(train_with, 2, small(tmp_path, *options, "train.steps=12"), fault)
    assert stopped[0].value["steps"] == 7, stopped[0].trace
    names = sorted(path.name for path in folder.iterdir())
    aside = [".refused-step_00000008", ".refused-step_00000010"]
    assert names == [*aside, "step_00000006", "step_00000007"]
    events = [json.loads(x) for x in (tmp_path / "events.jsonl").read_text().splitlines()]
    [event] = [e for e in events if e["event"] == "checkpoints_set_aside"]
    assert (event["step"], event["steps"], sorted(event["kept"])) == (6, [10, 8], aside)
    assert "refused checkpoints stay in" in (tmp_path / "log" / "rank0.txt").read_text()
    resumed = run_ranks(trained, 0, small(tmp_path, *options, "train.steps=12"))[0]
    assert resumed["steps"] == 12


def test_a_restart_does_not_count_a_bad_checkpoint_as_progress(tmp_path: Path) -> None:
    options = ("checkpoint.every_steps=2", "eval.every_epochs=null", "train.steps=6")
    run_ranks(trained, 0, small(tmp_path, *options))
    os.truncate(tmp_path / "checkpoints" / "step_00000006" / "state.pt", 100)
    (tmp_path / "status.json").unlink()
    env = {"TORCHELASTIC_RESTART_COUNT": "1", "TORCHELASTIC_RUN_ID": "again"}
    outcome = start_ranks_of(trained, 1, small(tmp_path, *options), env=env)[0]
    assert outcome.error is None, outcome.trace
    events = [json.loads(x) for x in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert [e["step"] for e in events if e["event"] == "restarted"] == [4]
    assert chain.read(tmp_path).progress == 4


def test_fewer_steps_than_are_done_are_refused_and_the_result_stays(tmp_path: Path) -> None:
    first = run_ranks(trained, 0, small(tmp_path, "train.steps=9"))[0]
    outcome = start_ranks_of(train_with, 0, small(tmp_path, "train.steps=4"), None)[0]
    assert isinstance(outcome.error, ConfigError)
    assert "is at step 9 already, beyond the 4 steps of train.steps=4" in str(outcome.error)
    assert json.loads((tmp_path / "summary.json").read_text()) == first
    assert json.loads((tmp_path / "status.json").read_text())["state"] == "finished"


def test_an_early_stopped_run_asked_for_more_says_why_it_does_not_go_on(tmp_path: Path) -> None:
    options = ("train.early_stop_patience=1", "optim.lr=1e-9")
    first = run_ranks(trained, 0, small(tmp_path, *options, "train.epochs=5"))[0]
    assert first["early_stopped"]
    more = run_ranks(trained, 0, small(tmp_path, *options, "train.epochs=9"))[0]
    assert more["steps"] == first["steps"]
    assert "stopped early at step" in (tmp_path / "log" / "rank0.txt").read_text()


@pytest.mark.slow
def test_an_early_stopped_run_goes_on_with_more_patience(tmp_path: Path) -> None:
    options = ("train.epochs=5", "optim.lr=1e-9", "resume_allow=[train.early_stop_patience]")

    def steps(patience: str) -> int:
        config = small(tmp_path, *options, f"train.early_stop_patience={patience}")
        return run_ranks(trained, 0, config)[0]["steps"]

    assert steps("2") == 27
    assert steps("2") == 27
    assert steps("1") == 27, "less patience does not go on"
    told = (tmp_path / "log" / "rank0.txt").read_text()
    assert "raise train.early_stop_patience, with resume_allow=[train.early_stop" in told
    assert f"and run_dir={tmp_path}" in told
    assert steps("3") == 36
    assert steps("null") == 45
