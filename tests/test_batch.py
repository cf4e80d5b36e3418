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
from launch import scontrol, this_job
from launch.batch import Next, what_next
from launch.ranks_command import STOPS, RanksCommand, check_exports
from launch.scontrol import RECORD, Job, read_job
from launch.this_job import ThisJob
from tests.fake_slurm import FakeSlurm
from tests.settings import SMALL
from tests.test_torchrun import REPOSITORY

HERE = Job(job_id="77", state="RUNNING", may_requeue=True)
FIXED = Job(job_id="77", state="RUNNING", may_requeue=False)
ARGS: dict[str, Any] = {"silent": 0, "first_step": 10, "stopped": True}
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
    args: dict[str, Any] = {"silent": silent, "first_step": 10, "stopped": False}
    found = what_next(code, status, ask=lambda: job, in_job=job is not None, **args)
    assert (found.do, found.code) == (do, exit_code)


def test_work_is_left_in_a_job_that_slurm_does_not_know() -> None:
    saved = ended("preempted", reason="SIGUSR2 on rank 0")
    found = what_next(0, saved, ask=lambda: None, in_job=True, **ARGS)
    text = "not requeued, as SLURM does not know this job; the same command continues"
    assert found == Next(do="end", code=1, say=text)


@pytest.mark.parametrize("state", ["COMPLETING", "CANCELLED", "PENDING", "PREEMPTED", "NODE_FAIL"])
@pytest.mark.parametrize(("status", "code"), [("preempted", 0), ("running", 143)])
def test_a_job_that_slurm_has_taken_is_left_to_it(state: str, status: str, code: int) -> None:
    job = Job(job_id="77", state=state, may_requeue=True)
    found = what_next(code, ended(status), ask=lambda: job, in_job=True, **ARGS)
    assert (found.do, found.code) == ("end", code)
    assert state in found.say


def test_ranks_that_died_when_asked_to_stop_are_not_started_again() -> None:
    died = ended("running")
    assert what_next(137, died, ask=lambda: HERE, in_job=True, **ARGS).do == "requeue"
    assert what_next(137, died, ask=lambda: FIXED, in_job=True, **ARGS) == Next(
        do="end", code=137, say="not requeued, as the job forbids it; the same command continues"
    )


def test_other_nodes_are_asked_for_when_nothing_begins_on_these() -> None:
    found = [
        what_next(
            1, {}, ask=lambda: HERE, in_job=True, silent=silent, first_step=0, stopped=False
        ).do
        for silent in range(1, 6)
    ]
    assert found == ["again", "again", "again", "requeue", "requeue"]


# As SLURM 22.05 shows them. Name, comment and folders are the user's text.
RECORDS = """JobId=78 ArrayJobId=77 ArrayTaskId=3 ArrayTaskThrottle=1 JobName=a JobState=FAILED b
   UserId=me(1000) GroupId=me(1000) MCS_label=N/A
   JobState=RUNNING Reason=None Dependency=(null)
   Requeue=1 Restarts=2 BatchFlag=1 Reboot=0 ExitCode=0:0
   RunTime=00:00:04 TimeLimit=00:05:00 TimeMin=N/A
   StartTime=2026-01-31T11:55:00 EndTime=2026-01-31T12:00:00 Deadline=N/A
   ReqNodeList=(null) ExcNodeList=(null)
   NodeList=node[1-2]
   NumNodes=2 NumCPUs=1 NumTasks=1 CPUs/Task=1 ReqB:S:C:T=0:0:*:*
   Command=/a/b.sh Requeue=0
   WorkDir=/tmp/a b
   Comment=it is Requeue=0
   JobState=CANCELLED StdOut=/x
   StdOut=/y
   StdErr=/tmp/a b/o ut-78 StdIn=x.txt
   StdIn=/dev/null
   StdOut=/tmp/a b/o ut-78 StdIn=x.txt
   Power=


JobId=77 ArrayJobId=77 ArrayTaskId=1-3%2 ArrayTaskThrottle=2 JobName=
   JobState=PENDING Reason=JobArrayTaskLimit Dependency=(null)
   Requeue=0 Restarts=0 BatchFlag=1 Reboot=0 ExitCode=0:0
   StartTime=Unknown EndTime=Unknown Deadline=N/A
   NodeList=(null)
   StdOut=/dev/null
   Power=


"""


def test_what_scontrol_shows_of_jobs() -> None:
    running, waiting = (read_job(text) for text in RECORD.split(RECORDS) if text)
    assert (running.job_id, running.name) == ("77_3", "a JobState=FAILED b")
    assert (running.state, running.restarts, running.may_requeue) == ("RUNNING", 2, True)
    assert running.end_time == time.mktime((2026, 1, 31, 12, 0, 0, -1, -1, -1))
    assert (running.nodes, running.reason) == ("node[1-2]", "")
    assert running.output == "/tmp/a b/o ut-78 StdIn=x.txt"
    assert running.is_running
    assert (waiting.job_id, waiting.name, waiting.state) == ("77_[1-3%2]", "", "PENDING")
    assert (waiting.reason, waiting.end_time, waiting.nodes) == ("JobArrayTaskLimit", None, "")
    assert not waiting.may_requeue
    assert not waiting.is_running


@pytest.mark.parametrize(
    ("said", "answered"),
    [
        ("slurm_load_jobs error: Unable to contact slurm controller (connect failure)", False),
        ("slurm_load_jobs error: Socket timed out on send/recv operation", False),
        (
            "Unexpected message received for job 1",
            False,
        ),  # scontrol's, of a controller that is down
        ("Requested operation is presently disabled for job 1", True),
        ("scancel: error: Kill job error on job id 77: Access denied", True),
    ],
)
def test_no_answer_is_no_refusal(said: str, answered: bool) -> None:
    error = scontrol.problem(said)
    assert isinstance(error, scontrol.NoAnswerError) != answered
    assert str(error) == f"SLURM {'refuses' if answered else 'does not answer'}: {said}"


SILENT = "slurm_load_jobs error: Unable to contact slurm controller (connect failure)"


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeSlurm:
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    monkeypatch.setattr(this_job, "PAUSES_SEC", (0.01,))
    return FakeSlurm(tmp_path / "slurm", sys.executable, monkeypatch)


def test_a_controller_that_does_not_answer_is_asked_until_it_does(
    slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]
) -> None:
    slurm.job("77", "RUNNING", may_requeue=False)
    slurm.refuse("scontrol", SILENT, times=9)
    job = ThisJob(gives_up=lambda: False).ask()
    assert job is not None
    assert (job.state, job.may_requeue) == ("RUNNING", False)
    assert len(slurm.calls("scontrol")) == 10
    asked, answered = capsys.readouterr().out.splitlines()
    assert asked.startswith("dist-train: SLURM does not answer: slurm_load_jobs error: Unable")
    assert answered == "dist-train: SLURM answers again"
    slurm.forget("77")
    assert ThisJob(gives_up=lambda: False).ask() is None, "this is an answer"


def test_a_requeue_is_asked_for_until_it_is_answered(slurm: FakeSlurm) -> None:
    slurm.job("77", "RUNNING")
    slurm.refuse("scontrol", "Unexpected message received for job 77", times=3)
    job = ThisJob(gives_up=lambda: False).requeue()
    assert job is not None
    assert job.state == "PENDING"
    calls = [call[1] for call in slurm.calls("scontrol")]
    assert calls == ["requeue", "show"] * 3


def test_a_requeue_that_was_heard_before_the_controller_died(slurm: FakeSlurm) -> None:
    slurm.job("77", "PENDING", reason="BeginTime")
    slurm.refuse("scontrol", SILENT, times=1)  # its answer to the requeue was lost
    job = ThisJob(gives_up=lambda: False).requeue()
    assert job is not None
    assert job.state == "PENDING"
    assert [call[1] for call in slurm.calls("scontrol")] == ["requeue", "show", "show"]
    slurm.refuse("scontrol", "Job is pending execution for job 77", times=1)
    assert ThisJob(gives_up=lambda: False).requeue() is not None


def test_nobody_waits_for_slurm_when_the_jobs_time_is_over(slurm: FakeSlurm) -> None:
    ended = time.time() - this_job.OVER_TIME_SEC - 1
    stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(ended))
    slurm.job("77", "RUNNING", end_time=stamp)
    job = ThisJob(gives_up=lambda: False)
    assert job.ask() is not None
    slurm.refuse("scontrol", SILENT)
    with pytest.raises(scontrol.NoAnswerError):
        job.ask()
    with pytest.raises(scontrol.NoAnswerError):
        job.requeue()
    with pytest.raises(scontrol.NoAnswerError):
        ThisJob(gives_up=lambda: True).ask()


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


def wait_for(path: Path) -> None:
    end = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < end, f"no {path}"
        time.sleep(0.05)


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
    wait_for(marks)
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


# Ranks that save when they are asked to stop; meanwhile the controller dies.
STOPPED_RANKS = """#!{python}
import json, os, signal
env, status = os.environ, {{"state": "preempted", "exit_code": 0, "step": 7}}
status |= {{"chain": env["DIST_TRAIN_CHAIN"], "attempt": int(env["DIST_TRAIN_ATTEMPT"])}}
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR2])
json.dump(dict(env), open("{folder}/environment", "w"))
signal.sigwait([signal.SIGUSR2])
json.dump(status | {{"reason": "SIGUSR2 on rank 0"}}, open("{folder}/run/status.json", "w"))
open("{folder}/slurm/scontrol.refuses", "w").write("{times} Unable to contact slurm controller")
"""


@pytest.mark.parametrize("requeues", [True, False])
def test_a_job_whose_controller_dies_while_it_stops(
    requeues: bool, slurm: FakeSlurm, tmp_path: Path
) -> None:
    slurm.job("77", "RUNNING")
    if not requeues:
        scontrol_ = slurm.folder / "bin" / "scontrol"
        forbids = 'elif words[0] == "requeue":\n    sys.exit("Requested operation is disabled")\n'
        scontrol_.write_text(scontrol_.read_text().replace('elif words[0] == "requeue":', forbids))
    (tmp_path / "run").mkdir()
    srun = slurm.folder / "bin" / "srun"
    srun.write_text(STOPPED_RANKS.format(python=sys.executable, folder=tmp_path, times=2))
    told = {"PATH": os.environ["PATH"], "SLURM_JOB_ID": "77", "SLURM_EXPORT_ENV": "NONE"}
    process = batch(["srun"], tmp_path / "run", env=told | {"MINE": "hello"})
    wait_for(tmp_path / "environment")
    process.send_signal(signal.SIGUSR2)
    output, _ = process.communicate(timeout=60)
    assert "SLURM answers again" in output
    if requeues:
        assert "requeued: job 77 is PENDING and continues by itself" in output
        assert process.returncode == 0, output
    else:
        assert "SLURM refuses: Requested operation is disabled. The job is not in the" in output
        assert process.returncode == 1, "work is left"
    variables = json.loads((tmp_path / "environment").read_text())
    assert variables["MINE"] == "hello"
    assert "SLURM_EXPORT_ENV" not in variables, "it would keep the others from the ranks"


@pytest.mark.parametrize("export", ["--export=NONE", "--export=PATH,HOME"])
def test_srun_may_not_keep_the_jobs_variables_from_the_ranks(export: str, tmp_path: Path) -> None:
    process = batch(["srun", export, "python"], tmp_path / "run")
    output, _ = process.communicate(timeout=60)
    assert (process.returncode, output.count("\n")) == (2, 1)
    assert f"srun's {export} keeps from the ranks what the job's script has set" in output
    check_exports(["srun", "--export=ALL,MINE=1", "python"])
    check_exports(["srun", "--export", "ALL", "python"])
