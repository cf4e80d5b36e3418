"""What a batch job does when its ranks have ended: a table, and real commands without SLURM."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from dist_train import chain
from dist_train.preemption import JOB_LIMIT, OWN_LIMIT
from launch.batch import Next, what_next
from launch.ranks_command import STOPS, RanksCommand
from launch.scontrol import Job, read_job
from tests.settings import SMALL
from tests.test_torchrun import REPOSITORY

HERE = Job(job_id="77", state="RUNNING", may_requeue=True)
FIXED = Job(job_id="77", state="RUNNING", may_requeue=False)
LIMIT = Job(job_id="77", state="COMPLETING", reason="TimeLimit", may_requeue=True)


def ended(state: str, step: int = 20, **more: Any) -> dict[str, Any]:
    code = {"finished": 0, "preempted": 0, "failed": 1}.get(state)
    return {"state": state, "step": step, "exit_code": code, "attempt": 0} | more


@pytest.mark.parametrize(
    ("code", "status", "job", "do", "exit_code"),
    [
        (0, ended("finished"), HERE, "end", 0),
        (143, ended("finished"), HERE, "end", 0),  # killed while it tidied up
        (0, {}, HERE, "end", 0),  # it was finished before
        (2, {}, HERE, "end", 2),  # refused before the ranks met
        (93, {}, HERE, "end", 93),  # torchrun has tried ten times
        (2, ended("failed", exit_code=2), HERE, "end", 2),
        (1, ended("failed", exit_code=93), HERE, "end", 93),
        (0, ended("preempted", reason="SIGUSR2 on rank 0"), HERE, "requeue", 0),
        (0, ended("preempted", reason="SIGTERM on rank 1"), FIXED, "end", 0),
        (0, ended("preempted", reason="SIGTERM on rank 1"), None, "end", 0),
        (0, ended("preempted", reason=f"{JOB_LIMIT} on rank 0"), HERE, "requeue", 0),
        (143, ended("preempted", reason=f"{JOB_LIMIT} on rank 0"), LIMIT, "requeue", 0),
        (0, ended("preempted", 10, reason=f"{JOB_LIMIT} on rank 0"), HERE, "end", 93),
        (0, ended("preempted", reason=f"{OWN_LIMIT} on rank 0"), HERE, "end", 0),
        # A rank, or a torchrun, was killed: SLURM knows nothing of it, and the nodes are there.
        (137, ended("running"), HERE, "again", 0),
        (1, ended("failed"), HERE, "again", 0),
        (137, ended("preempted", reason="SIGTERM on rank 2"), HERE, "again", 0),
        (1, {}, HERE, "again", 0),
        (1, ended("failed"), None, "again", 0),
    ],
)
def test_what_becomes_of_the_job(
    code: int, status: dict[str, Any], job: Job | None, do: str, exit_code: int
) -> None:
    silent = 0 if status else 1
    found = what_next(code, status, job=job, silent=silent, first_step=10, stopped=False)
    assert (found.do, found.code) == (do, exit_code)


@pytest.mark.parametrize("state", ["COMPLETING", "CANCELLED", "PENDING", "PREEMPTED", "NODE_FAIL"])
@pytest.mark.parametrize(("status", "code"), [("preempted", 0), ("running", 143)])
def test_a_job_that_slurm_has_taken_is_left_to_it(state: str, status: str, code: int) -> None:
    job = Job(job_id="77", state=state, may_requeue=True)
    found = what_next(code, ended(status), job=job, silent=0, first_step=10, stopped=True)
    assert (found.do, found.code) == ("end", code)
    assert state in found.say


def test_ranks_that_died_when_asked_to_stop_are_not_started_again() -> None:
    args: dict[str, Any] = {"silent": 0, "first_step": 10, "stopped": True}
    assert what_next(137, ended("running"), job=HERE, **args).do == "requeue"
    assert what_next(137, ended("running"), job=FIXED, **args) == Next(
        do="end", code=137, say="not requeued, as the job forbids it; the same command continues"
    )


def test_other_nodes_are_asked_for_when_nothing_begins_on_these() -> None:
    found = [
        what_next(1, {}, job=HERE, silent=silent, first_step=0, stopped=False).do
        for silent in range(1, 6)
    ]
    assert found == ["again", "again", "again", "requeue", "requeue"]


def test_a_line_of_scontrol() -> None:
    line = (
        "JobId=78 ArrayJobId=77 ArrayTaskId=3 JobName=a sweep=1 UserId=me(1000) JobState=RUNNING "
        "Reason=None Dependency=(null) Requeue=1 Restarts=2 RunTime=00:00:09 TimeLimit=00:05:00 "
        "EndTime=2026-01-31T12:00:00 NodeList=node[1-2] NumNodes=2 ExitCode=0:0 Command=/a/b.sh x"
    )
    job = read_job(line)
    assert (job.job_id, job.state, job.restarts, job.may_requeue) == ("77_3", "RUNNING", 2, True)
    assert job.end_time == time.mktime((2026, 1, 31, 12, 0, 0, -1, -1, -1))
    assert (job.nodes, job.reason) == ("node[1-2]", "")
    waiting = read_job(
        "JobId=77 ArrayJobId=77 ArrayTaskId=1-3%2 JobName=a JobState=PENDING Reason=Resources "
        "Requeue=0 Restarts=0 EndTime=Unknown NodeList=(null)"
    )
    assert (waiting.job_id, waiting.state) == ("77_[1-3%2]", "PENDING")
    assert (waiting.reason, waiting.end_time, waiting.may_requeue) == ("Resources", None, False)
    assert not waiting.is_running


def batch(
    start: list[str], run_dir: Path, *words: str, env: dict[str, str] | None = None
) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "launch.cli", "batch", *start, "--"]
    variables = {k: v for k, v in os.environ.items() if not k.startswith("SLURM_")}
    return subprocess.Popen(
        [*command, *SMALL, f"run_dir={run_dir}", *words],
        cwd=REPOSITORY,
        env=variables | (env or {}),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.mark.slow
def test_ranks_that_are_killed_are_started_again(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    words = ["model.factory=tests.nets:paced_net", "model.args.sec=0.1", "log_every=1"]
    words += ["train.steps=20", "checkpoint.every_steps=2"]
    process = batch([*start, "-m", "dist_train"], run_dir, *words)
    end = time.monotonic() + 90
    while not (run_dir / "checkpoints" / "step_00000004").exists():
        assert time.monotonic() < end, "no checkpoint"
        time.sleep(0.05)
    launcher = next(
        int(entry.name)
        for entry in Path("/proc").glob("[0-9]*")
        if _parent_of(entry) == process.pid
    )
    os.kill(launcher, signal.SIGKILL)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    assert "started again" in output
    status = json.loads((run_dir / "status.json").read_text())
    assert (status["state"], status["attempt"]) == ("finished", 1)
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    steps = [line["step"] for line in lines if "train/loss" in line]
    assert steps == list(range(1, 21)), "no step is missing or repeated"


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR2])
@pytest.mark.parametrize(("name", "told"), [("srun", "USR2"), ("torchrun", "TERM")])
def test_a_stop_is_passed_on_as_what_the_launcher_understands(
    name: str, told: str, number: signal.Signals, tmp_path: Path
) -> None:
    """srun kills its tasks at a SIGTERM; that they can save takes another signal."""
    launcher, marks = tmp_path / name, tmp_path / "marks"
    launcher.write_text(
        "#!/bin/bash\n"
        f'for name in TERM INT HUP USR1 USR2; do trap "echo $name >> {marks}; exit 1" $name; done\n'
        f"echo ready >> {marks}\nwhile :; do sleep 0.1; done\n"
    )
    launcher.chmod(0o755)
    process = batch([str(launcher)], tmp_path / "run")
    end = time.monotonic() + 60
    while not marks.exists():
        assert time.monotonic() < end
        time.sleep(0.05)
    process.send_signal(number)
    try:
        output, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    assert marks.read_text().split() == ["ready", told], output
    assert process.returncode == 1
    assert "started again" not in output


def test_a_stop_that_comes_while_the_ranks_are_being_started_reaches_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {number: signal.getsignal(number) for number in (*STOPS, signal.SIGCONT)}
    popen = subprocess.Popen

    def interrupted(command: list[str], env: dict[str, str]) -> "subprocess.Popen[bytes]":
        process = popen(command, env=env)
        os.kill(os.getpid(), signal.SIGUSR1)  # heard before anything knows of the process
        return process

    monkeypatch.setattr(subprocess, "Popen", interrupted)
    try:
        ranks = RanksCommand()
        assert ranks.run(["sleep", "60"], dict(os.environ)) == 128 + signal.SIGTERM
        assert ranks.stopped_by == "SIGUSR1"
        assert ranks.run([str(tmp_path / "no command")], {}) == 0, "nothing is started after a stop"
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _parent_of(entry: Path) -> int:
    try:
        return int((entry / "stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return 0


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["optim.lrr=1"], "optim.lr"),
        (["--", "srun"], "needs the command that starts the ranks"),
    ],
)
def test_a_mistake_is_one_line_and_starts_nothing(words: list[str], told: str) -> None:
    start = ["false", "--"] if words[0] != "--" else []
    command = [sys.executable, "-m", "launch.cli", "batch", *start, *words]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert told in done.stderr


def test_ranks_that_never_begin_are_given_up(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    for attempt in range(8):  # of this job, before it was requeued
        told = chain.count_silent(tmp_path / "run", chain="slurm-77", attempt=attempt, how="so")
        assert told is None
    process = batch(["false"], tmp_path / "run", env={"DIST_TRAIN_CHAIN": "slurm-77"})
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 93
    assert "10 attempts in a row ended without a checkpoint beyond step 0" in output
    assert "the ranks ended with 1 before the run had begun" in output
    assert output.count("started again") == 1


def test_a_command_that_cannot_be_started(tmp_path: Path) -> None:
    process = batch(["no-such-launcher"], tmp_path / "run")
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 2
    assert "cannot start the ranks with 'no-such-launcher'" in output
