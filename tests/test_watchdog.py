"""A rank that hangs is named, wherever and however, and the run goes on; nobody else is."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from dist_train import rollback, train
from dist_train.distributed import Ranks
from dist_train.monitor.processes import descendants
from dist_train.parallel import Replica
from dist_train.recovery import RollBack
from dist_train.run import Run
from dist_train.tasks import classification
from tests.faults import Fault, train_with
from tests.ranks import run_ranks, start_ranks_of
from tests.settings import small
from tests.test_resume import HARD
from tests.test_torchrun import ranks_of, torchrun_with

# Limits of a second: what counts is who is named, and that it takes no collective's timeout.
QUICK = ("guards.hang_sec=1", "log_every=1", "checkpoint.every_steps=7", "train.steps=200")
STEP = 40  # by then the monitor knows how long a step takes
CASES = [
    ("stop", "in the forward", "forward"),
    ("python loop", "in the backward", "backward"),
    ("c loop", "in the optimizer", "optimizer"),
    ("c call", "in the forward", "forward"),
    ("deadlock", "in the data", "data"),
    ("stop", "after the backward", "all-reduce"),
    ("python loop", "in the evaluation", "evaluation"),
    ("blocked write", "in the log", "logging"),
    ("blocked write", "in the save", "checkpoint"),
]


def events(folder: Path, kind: str) -> list[dict[str, Any]]:
    """Return the events of one kind."""
    lines = (folder / "events.jsonl").read_text().splitlines()
    return [event for event in map(json.loads, lines) if event["event"] == kind]


def the_hang(folder: Path) -> tuple[dict[str, Any], str]:
    """Return the one event of a hang, and its report."""
    found = events(folder, "hang")
    assert len(found) == 1, found
    return found[0], Path(found[0]["report"]).read_text()


def stacks(report: str) -> list[str]:
    """Return the part of the report that belongs to each rank of the node."""
    return re.split(r"^== rank \d+ ==$", report, flags=re.MULTILINE)[1:]


@pytest.mark.slow
@pytest.mark.parametrize(("how", "place", "phase"), CASES)
def test_a_rank_that_hangs_is_named_and_killed(
    how: str, place: str, phase: str, tmp_path: Path
) -> None:
    folder, mark = tmp_path / "run", tmp_path / "fired"
    rank = 0 if phase in ("logging", "checkpoint") else 1  # only rank 0 writes
    fault = Fault(rank=rank, step=STEP, place=place, kind=how, mark=str(mark))
    config = small(folder, *QUICK, "guards.hang_sec=0.5", "eval.every_steps=9")
    outcomes = start_ranks_of(train_with, 2, config, fault)
    assert mark.exists(), f"{fault} never fired: {outcomes}"
    assert outcomes[rank].exit_code == -signal.SIGKILL
    assert outcomes[1 - rank].exit_code != 0 or outcomes[1 - rank].error is not None
    event, report = the_hang(folder)
    assert event["time"] - mark.stat().st_mtime < 25, "not before a collective's timeout"
    assert event["rank"] == rank
    assert f"rank {rank} on" in event["reason"]
    assert f"hangs: {phase} at step {event['step']}" in event["reason"]
    assert STEP <= event["step"] <= STEP + 20
    assert len(stacks(report)) == 2
    for number, part in enumerate(stacks(report)):
        assert "stopped by a signal" in part if number == rank and how == "stop" else "File" in part
    status = json.loads((folder / "status.json").read_text())
    assert (status["state"], status["rank"], status["exit_code"]) == ("failed", rank, None)
    assert status["reason"] == event["reason"]
    again = run_ranks(train_with, 2, config, None)[0]
    assert (again["state"], again["steps"]) == ("finished", 200)


@pytest.mark.slow
def test_victims_that_wait_inside_their_backward_are_not_blamed(tmp_path: Path) -> None:
    folder, mark = tmp_path / "run", tmp_path / "fired"
    fault = Fault(rank=1, step=STEP, place="in the forward", kind="c call", mark=str(mark))
    outcomes = start_ranks_of(train_with, 2, small(folder, *QUICK, "parallel.sync=ddp"), fault)
    assert mark.exists(), "the fault never fired"
    assert outcomes[1].exit_code == -signal.SIGKILL
    event, report = the_hang(folder)
    assert f"rank 1 on {socket.gethostname()} hangs: forward at step {STEP}" in event["reason"]
    assert f"rank 0 on {socket.gethostname()}: backward at step {STEP}" in report


def with_slow_rank(config: Any, rank: int) -> Any:
    """Train with one rank whose forward takes 30 ms more from STEP on."""

    def slow(*args: Any, **kwargs: Any) -> Any:
        if int(os.environ["RANK"]) == rank and now["step"] >= STEP:
            time.sleep(0.03)
        return forward(*args, **kwargs)

    def counted(*args: Any, **kwargs: Any) -> Any:
        now["step"] = kwargs["step"]
        return step(*args, **kwargs)

    now = {"step": 0}
    forward, step = Replica.__call__, train.train_step
    with (
        mock.patch.object(Replica, "__call__", slow),
        mock.patch.object(train, "train_step", counted),
    ):
        return train_with(config, None)


@pytest.mark.slow
def test_a_slow_rank_is_named_and_goes_on(tmp_path: Path) -> None:
    config = small(tmp_path, *QUICK, "guards.hang_sec=5", "train.steps=400")
    assert run_ranks(with_slow_rank, 3, config, 2)[0]["state"] == "finished"
    (named,) = (event for event in events(tmp_path, "straggler") if event["rank"] == 2)
    assert named["factor"] > 1.4
    assert named["step"] > STEP
    assert re.match(r"rank 2 on .* is slow: it works [\d.]+ ms a step", named["reason"])


@pytest.mark.slow
def test_a_loader_worker_that_is_stuck_is_a_hang_of_its_rank_in_data(tmp_path: Path) -> None:
    folder, mark = tmp_path / "run", tmp_path / "fired"
    config = small(
        folder,
        *QUICK,
        "data.name=tests.faults:StuckPictures",
        "data.args={stuck: 77, mark: " + str(mark) + "}",
        "data.loader=workers",
        "data.num_workers=1",
        "data.image_size=12",
        "data.val_fraction=0",
        "eval.every_epochs=null",
        "train.steps=30",
    )
    outcomes = start_ranks_of(train_with, 2, config, None)
    assert mark.exists(), "no worker asked for the picture"
    event, report = the_hang(folder)
    culprit = event["rank"]
    assert outcomes[culprit].exit_code == -signal.SIGKILL
    assert f"rank {culprit} on" in event["reason"]
    assert "hangs: data at step" in event["reason"]
    assert "_try_get_data" in stacks(report)[culprit]
    workers = [int(pid) for pid in re.findall(r"started process (\d+)", report)]
    assert workers, "the report lists what a rank has started"
    while any(Path(f"/proc/{pid}").exists() for pid in workers):
        time.sleep(0.1)
    assert run_ranks(train_with, 2, config, None)[0]["state"] == "finished"


def with_wrong_collective(config: Any, how: str, mark: str, rank: int = 1, step: int = STEP) -> Any:
    """Train; from `step` on `rank` leaves out one collective, or calls one with another shape."""
    real = {"skip": Ranks.control_sum, "shape": Ranks.all_reduce}[how]

    def wrong(ranks: Ranks, value: Any) -> Any:
        reached = ranks.rank == rank and ranks.pulse._step >= step
        armed = reached and not Path(mark).exists()
        if not armed:
            return real(ranks, value)
        Path(mark).touch()
        return value if how == "skip" else real(ranks, torch.cat([value, value]))

    with mock.patch.object(Ranks, real.__name__, wrong):
        return train_with(config, None)


@pytest.mark.slow
def test_a_skipped_collective_ends_the_run_with_the_calls_of_both_ranks(tmp_path: Path) -> None:
    folder, mark = tmp_path / "run", tmp_path / "fired"
    config = small(folder, *QUICK, "eval.every_steps=9")
    outcomes = start_ranks_of(with_wrong_collective, 2, config, "skip", str(mark))
    assert mark.exists(), "no collective was skipped"
    event, report = the_hang(folder)
    assert event["time"] - mark.stat().st_mtime < 25, "not before a collective's timeout"
    assert event["ranks"] == []
    assert "all ranks wait in collectives: they call different ones" in event["reason"]
    calls = dict(re.findall(r"rank (\d): waits for other ranks in evaluation.*?: (\w+) of", report))
    assert calls == {"0": "control_sum", "1": "all_reduce"}
    for part, call in zip(stacks(report), ("in control_sum", "in all_reduce"), strict=True):
        assert call in part
    assert [o.exit_code for o in outcomes] == [-signal.SIGKILL] * 2
    assert json.loads((folder / "status.json").read_text())["reason"] == event["reason"]


@pytest.mark.slow
def test_a_collective_of_another_shape_leaves_the_stacks_of_the_rank_that_crashed(
    tmp_path: Path,
) -> None:
    folder, mark = tmp_path / "run", tmp_path / "fired"
    outcomes = start_ranks_of(with_wrong_collective, 2, small(folder, *QUICK), "shape", str(mark))
    assert mark.exists(), "the collective was as it should be"
    assert outcomes[0].exit_code == -signal.SIGABRT, "gloo ends the process"
    assert outcomes[1].error is not None
    while not (deaths := events(folder, "died")):
        time.sleep(0.1)
    (death,) = deaths
    assert death["rank"] == 0
    report = Path(death["report"]).read_text()
    assert re.match(rf"rank 0 on .* died in {death['phase']} at step {death['step']}\n", report)
    assert "in all_reduce" in report


def on_two_nodes(config: Any, fault: Fault | None) -> Any:
    """Train; each rank has a monitor of its own, as on another machine."""
    os.environ |= {"GROUP_RANK": os.environ["RANK"], "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    return train_with(config, fault)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_the_monitors_of_two_nodes_agree_on_the_culprit(rank: int, tmp_path: Path) -> None:
    folder, mark = tmp_path / "run", tmp_path / "fired"
    config = small(folder, *QUICK)
    fault = Fault(rank=rank, step=STEP, place="in the forward", kind="c call", mark=str(mark))
    outcomes = start_ranks_of(on_two_nodes, 2, config, fault)
    assert mark.exists(), "the fault never fired"
    assert outcomes[rank].exit_code == -signal.SIGKILL
    event, report = the_hang(folder)
    assert f"rank {rank} on" in event["reason"]
    assert "hangs: forward at step" in event["reason"]
    assert len(stacks(report)) == 1, "a monitor sees the ranks of its own node"
    assert f"rank {1 - rank} on" in report, "but hears of the others"


@pytest.mark.slow
def test_a_save_on_one_node_is_no_hang_of_ranks_on_another(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    config = small(folder, *QUICK, "guards.hang_sec=0.5", "train.steps=60")
    outcomes = start_ranks_of(with_pauses, 2, config, "slow save", str(tmp_path / "paused"), True)
    assert [o.error for o in outcomes] == [None, None], outcomes[0].trace
    assert (tmp_path / "paused").exists(), "there was no pause"
    assert events(folder, "hang") == []


def with_pauses(config: Any, what: str, mark: str, two_nodes: bool = False) -> Any:
    """Train with pauses longer than guards.hang_sec, each of a kind that is no hang."""
    owner, name = {
        "slow first step": (train, "train_step"),
        "long evaluation": (classification, "eval_sums"),
        "slow save": (Run, "save"),
        "slow disk": (Run, "save"),
    }[what]
    real = getattr(owner, name)

    def paused(*args: Any, **kwargs: Any) -> Any:
        if what != "slow first step" or not Path(mark).exists():
            Path(mark).touch()
            if what == "slow disk":
                for _ in range(60):
                    time.sleep(0.2)
                    Path(f"{mark}.{os.getpid()}").write_bytes(bytes(1 << 16))
            else:
                time.sleep(3)
        return real(*args, **kwargs)

    with mock.patch.object(owner, name, paused):
        return on_two_nodes(config, None) if two_nodes else train_with(config, None)


@pytest.mark.slow
@pytest.mark.parametrize("what", ["slow first step", "long evaluation", "slow save", "slow disk"])
def test_a_pause_is_no_hang(what: str, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    more = ("guards.hang_sec=0.5", "train.steps=10", "eval.every_epochs=null")
    config = small(folder, *QUICK, *more, "data.args.num_test=70")
    value = run_ranks(with_pauses, 2, config, what, str(tmp_path / "paused"))[0]
    assert (tmp_path / "paused").exists(), "there was no pause"
    assert value["state"] == "finished"
    assert events(folder, "hang") == []


def with_slow_rollback(config: Any) -> Any:
    """Go back once after STEP steps; the checkpoint takes longer to load than a step may."""
    left, real_step, real_restore = {STEP}, train.train_step, rollback.restore

    def train_step(*args: Any, **kwargs: Any) -> Any:
        if kwargs["step"] in left:
            left.clear()
            raise RollBack("told to", new_order=False)
        return real_step(*args, **kwargs)

    def restore(*args: Any) -> Any:
        time.sleep(3)
        return real_restore(*args)

    with (
        mock.patch.object(train, "train_step", train_step),
        mock.patch.object(rollback, "restore", restore),
    ):
        return train_with(config, None)


@pytest.mark.slow
def test_going_back_to_a_large_checkpoint_is_no_hang(tmp_path: Path) -> None:
    config = small(tmp_path, *QUICK, "guards.hang_sec=0.5", "train.steps=60")
    assert run_ranks(with_slow_rollback, 2, config)[0]["state"] == "finished"
    assert len(events(tmp_path, "rolled_back")) == 1
    assert events(tmp_path, "hang") == []


def its_monitors(pid: int) -> list[int]:
    """Return the monitors that a rank has started."""
    return [
        child
        for child, _ in descendants(pid)
        if b"monitor.main" in Path(f"/proc/{child}/cmdline").read_bytes()
    ]


def with_all_killed(config: Any, told: str) -> Any:
    """Train, and at STEP kill this rank after telling who its monitor is."""

    def die(*args: Any, **kwargs: Any) -> Any:
        if kwargs["step"] == STEP:
            if os.environ["RANK"] == "0":
                Path(told).write_text(str(its_monitors(os.getpid())[0]))
                os.kill(its_monitors(os.getpid())[0], signal.SIGTERM)  # as SLURM does: ignored
            time.sleep(0.3)
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args, **kwargs)

    real = train.train_step
    with mock.patch.object(train, "train_step", die):
        return train_with(config, None)


@pytest.mark.slow
def test_the_monitor_goes_with_the_last_rank_and_leaves_nothing(tmp_path: Path) -> None:
    told = tmp_path / "monitor"
    outcomes = start_ranks_of(with_all_killed, 2, small(tmp_path / "run", *QUICK), str(told))
    assert {o.exit_code for o in outcomes} == {-signal.SIGKILL}
    pid = int(told.read_text())
    end = time.monotonic() + 20
    while Path(f"/proc/{pid}").exists():
        assert time.monotonic() < end, "the monitor outlives the ranks"
        time.sleep(0.1)
    assert not [name for name in os.listdir("/dev/shm") if "dist_train" in name]
    assert {event["rank"] for event in events(tmp_path / "run", "died")} == {0, 1}
    assert events(tmp_path / "run", "hang") == [], "a rank that is dead does not hang"


def with_watch_of_one(folder: str) -> list[str]:
    """Ctrl-Z of a lone process, as a shell does it; returns what the report folder holds."""
    config = small(folder, *QUICK, "guards.hang_sec=0.5", "train.steps=60")

    def suspended(*args: Any, **kwargs: Any) -> Any:
        if kwargs["step"] == STEP:
            subprocess.Popen([sys.executable, "-c", CONTINUE, str(os.getpid())])
            os.kill(os.getpid(), signal.SIGSTOP)
        return real(*args, **kwargs)

    real = train.train_step
    with mock.patch.object(train, "train_step", suspended):
        train_with(config, None)
    return sorted(path.name for path in (Path(folder) / "log").iterdir())


CONTINUE = "import os, signal, sys, time; time.sleep(4); os.kill(int(sys.argv[1]), signal.SIGCONT)"


@pytest.mark.slow
def test_a_lone_process_that_is_suspended_goes_on(tmp_path: Path) -> None:
    assert run_ranks(with_watch_of_one, 0, str(tmp_path / "run")) == [["rank0.txt"]]


@pytest.mark.slow
def test_torchrun_restarts_a_run_whose_ranks_hang_to_the_same_bits(tmp_path: Path) -> None:
    clean = run_ranks(train_with, 2, small(tmp_path / "clean", *HARD), None)[0]
    folder = tmp_path / "run"
    faults = [
        {"rank": 1, "step": 13, "place": "in the forward", "kind": "stop"},
        {"rank": 0, "step": 30, "place": "in the backward", "kind": "c call"},
    ]
    for number, fault in enumerate(faults):
        fault["mark"] = str(tmp_path / f"f{number}")
    _, errors = torchrun_with(faults, *HARD, f"run_dir={folder}", "guards.hang_sec=2")
    assert [event["rank"] for event in events(folder, "hang")] == [1, 0]
    assert "dist_train: rank 1 on" in errors
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["attempt"] == 2
    assert summary["weights_sha256"] == clean["weights_sha256"]
    assert ranks_of(folder) == []
