"""Asked to stop, by any signal, at any moment: agreed, saved, nothing lost, the same bits."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from dist_train.chain import read
from dist_train.endings import LauncherDiedError
from dist_train.launch_store import stopped
from dist_train.preemption import (
    JOB_LIMIT,
    LAUNCHER_DIED,
    LAUNCHER_GONE,
    SIGNALS,
    StopRequest,
    heard,
    job_end,
    listen_for_stop,
)
from tests.faults import Fault, train_with
from tests.ranks import run_ranks, start_ranks_of
from tests.settings import SMALL, metrics, small
from tests.test_torchrun import REPOSITORY

OPTIONS = (
    "model.factory=tests.nets:noisy_net",
    "train.steps=24",
    "checkpoint.every_steps=5",
    "train.early_stop_patience=4",
    "data.mixup=0.4",
)
TIMES = ("time", "attempt", "wall_sec")


def logged(folder: Path) -> list[dict[str, Any]]:
    """Return the lines of metrics without what time and memory decide."""
    return [
        {k: v for k, v in line.items() if k not in TIMES and k.split("/")[0] in ("train", "eval")}
        | {"step": line["step"], "epoch": line["epoch"]}
        for line in metrics(folder)
    ]


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("clean") / "run"
    summary = run_ranks(train_with, 2, small(folder, *OPTIONS), None)[0]
    return summary | {"logged": logged(folder)}


PLACES = {  # where, and from which step on
    "step 0": ("before the step", 0),
    "between the steps": ("after the step", 11),
    "backward": ("after the backward", 12),
    "evaluation": ("in the evaluation", 8),
    "save": ("in the save", 5),
}


@pytest.mark.slow
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
def test_a_stop_loses_nothing_and_changes_no_bit(
    place: str, number: signal.Signals, clean: dict[str, Any], tmp_path: Path
) -> None:
    where, step = PLACES[place]
    rank = 0 if place == "save" else list(SIGNALS).index(number) % 2
    fault = Fault(rank=rank, step=step, place=where, number=number, mark=str(tmp_path / "fired"))
    stopped_then_finished(tmp_path, [fault], clean, reason=f"{number.name} on rank {rank}")


@pytest.mark.slow
@pytest.mark.parametrize("where", ["after the step", "in the save"])
def test_a_second_signal_while_stopping_changes_nothing(
    where: str, clean: dict[str, Any], tmp_path: Path
) -> None:
    first = Fault(
        rank=0, step=6, place="before the step", number=signal.SIGUSR1, mark=_mark(tmp_path)
    )
    second = Fault(rank=0, step=6, place=where, number=signal.SIGTERM, mark=_mark(tmp_path, 1))
    stopped_then_finished(tmp_path, [first, second], clean, reason="SIGUSR1 on rank 0")


@pytest.mark.slow
@pytest.mark.parametrize("lost", [(1,), (0, 1)], ids=["one of two", "the only one"])
def test_a_launcher_that_died_is_no_wish_to_stop(
    lost: tuple[int, ...], clean: dict[str, Any], tmp_path: Path
) -> None:
    assert LAUNCHER_GONE is not None
    faults = [
        Fault(
            rank=rank,
            step=6,
            place="before the step",
            number=LAUNCHER_GONE,
            mark=_mark(tmp_path, rank),
        )
        for rank in lost
    ]
    config, chain = small(tmp_path / "run", *OPTIONS), {"DIST_TRAIN_CHAIN": "c"}
    outcomes = start_ranks_of(trained_with_all, 2, config, faults, env=chain)
    assert all(Path(fault.mark).exists() for fault in faults), "a fault never fired"
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert (tmp_path / "run" / "checkpoints" / f"step_{status['step']:08d}").is_dir()
    if len(lost) == 2:  # nobody is left to start it again
        assert [o.value["state"] for o in outcomes if o.value] == ["preempted"] * 2
        assert status["reason"] == "torchrun died on rank 0"
    else:
        assert [getattr(o.error, "exit_code", None) for o in outcomes] == [1, 1], outcomes[0].trace
        assert {type(o.error) for o in outcomes} == {LauncherDiedError}
        told = f"rank 1 lost its launcher (torchrun died), after step {status['step']}"
        assert (status["state"], status["exit_code"], status["reason"]) == ("failed", 1, told)
    again = start_ranks_of(train_with, 2, config, None, env=chain | {"DIST_TRAIN_ATTEMPT": "1"})
    assert again[0].value["weights_sha256"] == clean["weights_sha256"], again[0].trace
    assert read(tmp_path / "run").endings == 1, "it counts as a failure"
    assert logged(tmp_path / "run") == clean["logged"]


def test_a_stop_before_the_start_by_a_dead_launcher_is_a_failure() -> None:
    assert (stopped(LAUNCHER_DIED).exit_code, stopped("SIGTERM").exit_code) == (1, 0)


def _mark(folder: Path, number: int = 0) -> str:
    return str(folder / f"fired_{number}")


def stopped_then_finished(
    folder: Path, faults: list[Fault], clean: dict[str, Any], *, reason: str
) -> None:
    config = small(folder / "run", *OPTIONS)
    outcomes = start_ranks_of(trained_with_all, 2, config, faults)
    assert all(Path(fault.mark).exists() for fault in faults), "a fault never fired"
    assert {o.value["state"] for o in outcomes if o.value} == {"preempted"}, outcomes[0].trace
    assert len([o for o in outcomes if o.value]) == 2, "a rank ended otherwise"
    steps = outcomes[0].value["steps"]
    assert reason in (folder / "run" / "status.json").read_text()
    assert (folder / "run" / "checkpoints" / f"step_{steps:08d}").is_dir(), "steps were lost"
    last = run_ranks(train_with, 2, config, None)[0]
    for key in ("weights_sha256", "eval_accuracy", "eval_loss", "best_step", "best_val_accuracy"):
        assert last[key] == clean[key], key
    assert logged(folder / "run") == clean["logged"]


def trained_with_all(config: Any, faults: list[Fault]) -> dict[str, Any]:
    """Arm several faults in one process."""
    from contextlib import ExitStack

    from dist_train import train as loop
    from tests.faults import arm

    with ExitStack() as stack:
        for fault in faults:
            if int(os.environ["RANK"]) == fault.rank:
                arm(fault, stack)
        return loop.train(config)


def test_a_stop_comes_before_the_jobs_time_is_over() -> None:
    stop, lead = StopRequest(), [50.0]
    stop.end_before(time.time() + 100, lambda: lead[0])
    assert stop.reason is None
    lead[0] = 101.0
    assert stop.reason == JOB_LIMIT
    lead[0] = 0.0
    assert stop.reason == JOB_LIMIT, "once asked, ranks may have begun to stop"
    stop = StopRequest()
    stop.end_before(None, lambda: 50.0)
    assert not stop.asked


def test_the_end_of_the_jobs_time_is_the_scripts_then_slurms() -> None:
    soon, later, past = (str(int(time.time()) + sec) for sec in (100, 200, -100))
    assert job_end({}) is None
    assert job_end({"SLURM_JOB_END_TIME": later}) == float(later)
    assert job_end({"SLURM_JOB_END_TIME": later, "DIST_TRAIN_END_TIME": soon}) == float(soon)
    assert job_end({"SLURM_JOB_END_TIME": past}) is None, "left over from a job that is over"
    assert job_end({"SLURM_JOB_END_TIME": "Unknown"}) is None


@pytest.mark.slow
def test_a_run_saves_before_its_job_ends(tmp_path: Path) -> None:
    words = ("model.factory=tests.nets:paced_net", "model.args.sec=0.05", "train.steps=4000")
    config = small(tmp_path / "run", *words)
    end = int(time.time()) + 35
    outcomes = start_ranks_of(train_with, 2, config, None, env={"DIST_TRAIN_END_TIME": str(end)})
    assert [o.value["state"] for o in outcomes] == ["preempted"] * 2, outcomes[0].trace
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert status["reason"] == f"{JOB_LIMIT} on rank 0"
    assert 0 < status["step"] < 4000
    assert (tmp_path / "run" / "checkpoints" / f"step_{status['step']:08d}").is_dir()
    assert status["time"] < end, "saved too late"


@pytest.mark.slow
@pytest.mark.parametrize("asked", [(0,), (1,), (0, 1)], ids=["rank 0", "rank 1", "both"])
def test_a_stop_before_the_start_loads_nothing_and_the_same_command_continues(
    asked: tuple[int, ...], clean: dict[str, Any], tmp_path: Path
) -> None:
    config = small(tmp_path / "run", *OPTIONS)
    outcomes = start_ranks_of(_signalled_first, 2, config, asked)
    assert [o.value["state"] for o in outcomes] == ["preempted"] * 2, outcomes[0].trace
    assert f"SIGTERM on rank {asked[0]}" in (tmp_path / "run" / "status.json").read_text()
    assert not (tmp_path / "run" / "config.yaml").exists(), "it went on to load"
    last = run_ranks(train_with, 2, config, None)[0]
    assert last["weights_sha256"] == clean["weights_sha256"]


def _signalled_first(config: Any, asked: tuple[int, ...]) -> dict[str, Any]:
    from dist_train.train import train

    with listen_for_stop():
        if int(os.environ["RANK"]) in asked:
            os.kill(os.getpid(), signal.SIGTERM)
        return train(config)


@pytest.mark.slow
def test_stopped_ranks_do_not_wait_for_one_that_never_comes(tmp_path: Path) -> None:
    config = small(tmp_path / "run")
    outcomes = start_ranks_of(_alone, 2, config, timeout_sec=50)
    ended = type(outcomes[0].error).__name__
    assert ended == "StoppedBeforeStartError", outcomes[0].trace
    assert outcomes[1].value == "never came"


def _alone(config: Any) -> Any:
    if os.environ["RANK"] == "1":
        return "never came"
    return _signalled_first(config, (0,))


def test_what_was_heard_before_counts_and_the_handlers_come_back() -> None:
    before = [signal.getsignal(number) for number in SIGNALS]
    with listen_for_stop() as early:
        os.kill(os.getpid(), signal.SIGUSR2)
        with listen_for_stop(1.0) as stop:
            assert stop is early
            assert stop.reason == "SIGUSR2"
        assert heard() is early, "the outer listening goes on"
    assert [signal.getsignal(number) for number in SIGNALS] == before
    assert heard() is None


def test_the_first_reason_stays_and_the_third_interrupt_quits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    left: list[int] = []
    monkeypatch.setattr(os, "_exit", left.append)
    stop = StopRequest()
    for number in (signal.SIGUSR1, signal.SIGINT, signal.SIGTERM, signal.SIGINT):
        stop.on_signal(number, None)
    assert (stop.reason, left) == ("SIGUSR1", [])
    stop.on_signal(signal.SIGINT, None)
    assert left == [130]


@pytest.mark.slow
@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
def test_a_signal_while_torch_is_imported_ends_cleanly(
    number: signal.Signals, tmp_path: Path
) -> None:
    words = [*SMALL, f"run_dir={tmp_path / 'run'}"]
    process = subprocess.Popen(
        [sys.executable, "-X", "importtime", "-m", "dist_train", *words],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    for line in process.stderr:  # the first of torch's own modules has just been imported
        if line.rstrip().endswith("torch._utils"):
            process.send_signal(number)
            break
    else:
        raise AssertionError("torch was never imported")
    out, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors[-2000:]
    assert "Traceback" not in errors
    assert f"stopped before the start ({number.name} on rank 0)" in out


@pytest.mark.slow
def test_a_group_wide_signal_leaves_loader_workers_alive_until_the_save(tmp_path: Path) -> None:
    words = [*SMALL, f"run_dir={tmp_path / 'run'}", "log_every=1", "train.steps=1000000"]
    words += ["data.loader=workers", "data.num_workers=1", "data.image_size=12"]
    process = subprocess.Popen(
        [sys.executable, "-m", "dist_train", *words, "eval.every_epochs=null"],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    while not (tmp_path / "run" / "metrics.jsonl").exists() or len(metrics(tmp_path / "run")) < 5:
        assert process.poll() is None, process.communicate()
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGUSR1)  # as SLURM does: every process of the job
    out, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert "and saved: the same command continues" in out
    assert "died unexpectedly" not in errors
