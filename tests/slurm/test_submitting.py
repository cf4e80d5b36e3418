"""`dist-train submit`, `jobs`, `cancel` and `requeue` on a real cluster."""

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.faults import train_with
from tests.ranks import run_ranks
from tests.settings import SMALL, small
from tests.slurm.cluster import Cluster
from tests.slurm.jobs import PACED, STEPS, Submitted
from tests.slurm.test_training import RESNET

pytestmark = pytest.mark.slurm


class User:
    """Types `dist-train` in a folder."""

    def __init__(self, cluster: Cluster, folder: Path) -> None:
        self.cluster, self.folder = cluster, folder

    def types(self, *words: str) -> str:
        jobs = ("--jobs-dir", str(self.folder / "jobs"))
        return self.cluster.run(sys.executable, "-m", "launch.cli", *words, *jobs)

    def submits(self, *words: str, tasks: int = 1) -> Submitted:
        limit = () if "--time" in words else ("--time", "10")
        options = (*limit, "--gpus-per-node", "0", "--tasks-per-node", str(tasks))
        run_dir = self.folder / "run"
        told = self.types("submit", *options, f"run_dir='{run_dir}'", *words)
        assert "follow it" in told, told
        job_id = told.split()[1].rstrip(",")
        output = self.folder / "jobs" / f"{job_id}.out"
        return Submitted(cluster=self.cluster, job_id=job_id, run_dir=run_dir, output=output)

    def states(self, job: str) -> list[dict[str, Any]]:
        return json.loads(self.types("jobs", job, "--json"))


@pytest.fixture
def user(cluster: Cluster, tmp_path: Path) -> User:
    return User(cluster, tmp_path)


@pytest.mark.parametrize("shape", ["srun", "torchrun"])
def test_resnet9_submitted_on_two_nodes(shape: str, user: User, tmp_path: Path) -> None:
    local = run_ranks(train_with, 4, small(tmp_path / "local", *RESNET), None)[0]
    job = user.submits("--nodes=2", "--shape", shape, *SMALL, *RESNET, tasks=2)
    assert job.wait_for_end().state == "COMPLETED", job.text()
    assert job.summary()["weights_sha256"] == local["weights_sha256"]
    assert job.summary()["world_size"] == 4
    [state] = user.states(job.job_id)
    assert (state["slurm"], state["run"], state["step"]) == ("COMPLETED", "finished", 4)


def test_a_submitted_job_is_requeued_at_its_word_though_the_controller_dies(
    user: User, tmp_path: Path
) -> None:
    config = small(tmp_path / "local", *PACED, "model.args.sec=0.0")
    local = run_ranks(train_with, 1, config, None)[0]
    # --export=NONE is for the job's script: what that sets is for its ranks.
    words = ("--snapshot", "--sbatch-arg=--export=NONE", "--setup", "export MINE='a b'")
    job = user.submits(*words, *PACED)
    job.wait_for_step(8)
    variables = job.processes()[job.rank(0)]
    assert variables["MINE"] == "a b"
    assert variables["PYTHONPATH"].startswith(f"{tmp_path}/jobs/"), "the copy of the code"
    limit = job.job().end_time
    assert limit is not None
    assert variables["DIST_TRAIN_END_TIME"] == str(int(limit))
    with user.cluster.without_controller():
        os.kill(job.rank(0), signal.SIGUSR2)  # a dying controller may lose what scancel told it
        job.wait_until(lambda: "SLURM does not answer" in job.text(), "a question")
        assert job.status()["state"] == "preempted"
        told = user.types("cancel", job.job_id)
        assert told.startswith("dist-train: error: SLURM does not answer: "), told
    job.wait_until(lambda: "SLURM answers again" in job.text(), "an answer")
    assert job.wait_for_end().state == "COMPLETED", job.text()
    assert job.summary()["weights_sha256"] == local["weights_sha256"]
    assert job.steps() == list(range(1, STEPS + 1))
    [state] = user.states(job.job_id)
    assert state["restarts"] == 1


def test_the_users_words_hold_and_any_text_is_read_as_it_is(user: User) -> None:
    text = "it is Requeue=1 StdOut=/x\n   JobState=FAILED Restarts=9"
    user = User(user.cluster, user.folder / "a b JobState=FAILED")
    options = ("--name", "x JobState=FAILED", "--time", "unlimited", "--sbatch-arg=--no-requeue")
    options += ("--sbatch-arg=--hold", f"--sbatch-arg=--comment={text}".partition("\n")[0])
    other = {"SBATCH_OUTPUT": "/dev/null", "SBATCH_JOB_NAME": "y", "SBATCH_TIMELIMIT": "1"}
    refused = user.types("submit", *options, "--gpus-per-node=0", "--tasks-per-node=1", *SMALL)
    assert "--sbatch-arg=--comment=it is Requeue=1 StdOut=/x is not for sbatch's" in refused
    user.cluster.env |= other
    try:
        job = user.submits(*options[:-1], "--comment", text.partition("\n")[0], *SMALL)
    finally:
        for name in other:
            del user.cluster.env[name]
    user.cluster.run("scontrol", "update", f"JobId={job.job_id}", f"Comment={text}")
    shown = job.job()
    assert (shown.state, shown.name) == ("PENDING", "x JobState=FAILED")
    assert (shown.may_requeue, shown.restarts) == (False, 0)
    assert shown.output == str(job.output)
    assert "TimeLimit=UNLIMITED" in user.cluster.run("scontrol", "show", "job", job.job_id)
    [state] = user.states(job.job_id)
    assert (state["slurm"], state["output"]) == ("PENDING", str(job.output))
    assert "cancelled" in user.types("cancel", job.job_id)


def test_an_address_left_over_in_a_job_of_two_nodes_is_told_at_once(user: User) -> None:
    user.cluster.env["MASTER_ADDR"] = "127.0.0.1"
    try:
        job = user.submits("--nodes=2", *SMALL)
    finally:
        del user.cluster.env["MASTER_ADDR"]
    ended = job.wait_for_end()
    assert (ended.state, ended.exit_code) == ("FAILED", "2:0"), job.text()
    assert "MASTER_ADDR=127.0.0.1 leads each of the 2 nodes to itself" in job.text()


def test_a_cancelled_job_saves_and_can_be_requeued(user: User) -> None:
    job = user.submits(*PACED)
    job.wait_for_step(8)
    user.types("cancel", job.job_id)
    assert job.wait_for_end().state in ("COMPLETED", "CANCELLED"), job.text()
    assert job.status()["state"] == "preempted"
    assert (job.run_dir / "checkpoints" / f"step_{job.status()['step']:08d}").is_dir()
    told = user.types("requeue", job.job_id)
    job.wait_until(lambda: job.status()["state"] == "finished", told, 120)
    assert job.steps() == list(range(1, STEPS + 1))
    job.wait_for_end()


def test_a_job_that_is_cancelled_before_its_ranks_are_there(user: User) -> None:
    job = user.submits(*PACED)
    job.wait_until(lambda: job.job().is_running, "its start")
    told = user.types("cancel", job.job_id)
    assert "SLURM does not requeue it" in told, told
    ended = job.wait_for_end()
    assert ended.restarts == 0
    assert job.steps() == [], job.text()


def test_a_sweep_of_four_two_at_a_time_of_which_one_fails(user: User) -> None:
    words = ("model.factory=tests.nets:plain_net", "train.steps=12", "checkpoint.every_steps=4")
    words += ("train.order=fixed", "train.num_shards=2", "optim.lr=0.05,0.1,1e30,0.02")
    words += ("optim.clip_norm=null", "guards.max_consecutive=2")
    job = user.submits("--array-parallelism", "2", *SMALL, *words)
    most, end = 0, time.monotonic() + 240
    states = user.states(job.job_id)
    while not all(state["run"] in ("finished", "failed") for state in states):
        assert time.monotonic() < end, states
        most = max(most, user.cluster.run("squeue", "-h", "-t", "R", "-r").count("\n"))
        time.sleep(0.5)
        states = user.states(job.job_id)
    assert most == 2
    by_rate = {state["overrides"][0].partition("=")[2]: state for state in states}
    assert {rate: state["run"] for rate, state in by_rate.items()} == {
        "0.05": "finished",
        "0.1": "finished",
        "1e30": "failed",
        "0.02": "finished",
    }
    assert "not finite" in by_rate["1e30"]["reason"]
    table = user.types("jobs", job.job_id, "--compare")
    assert table.count("finished") == 3
    assert [line[0] for line in table.splitlines()[1:5]] == ["*", " ", " ", " "]
    assert by_rate["1e30"]["reason"] in user.types("jobs", job.job_id)


def test_an_element_of_an_array_is_requeued_by_its_own_number(user: User) -> None:
    job = user.submits(*PACED, "seed=1,2")
    runs = {state["job_id"]: Path(state["run_dir"]) for state in user.states(job.job_id)}
    elements = [
        Submitted(
            cluster=user.cluster,
            job_id=f"{job.job_id}_{n}",
            run_dir=runs[f"{job.job_id}_{n}"],
            output=job.output.with_name(f"{job.job_id}_{n}.out"),
        )
        for n in range(2)
    ]
    elements[1].wait_for_step(8)
    user.cluster.run("scancel", "--signal=USR2", elements[1].job_id)
    for element in elements:
        element.wait_until(lambda e=element: e.status().get("state") == "finished", "its end", 120)
        assert element.steps() == list(range(1, STEPS + 1))
    restarts = {state["job_id"]: state["restarts"] for state in user.states(job.job_id)}
    assert restarts == {f"{job.job_id}_0": 0, f"{job.job_id}_1": 1}


def test_a_chain_goes_on_where_requeueing_is_forbidden(user: User, tmp_path: Path) -> None:
    config = small(tmp_path / "local", *PACED, "model.args.sec=0.0")
    local = run_ranks(train_with, 1, config, None)[0]
    job = user.submits("--chain", "2", *PACED)
    job.wait_for_step(8)
    user.cluster.run("scontrol", "update", f"JobId={job.job_id}", "Requeue=0")
    user.cluster.run("scancel", "--signal=USR2", job.job_id)
    assert job.wait_for_end().state == "COMPLETED", job.text()
    assert "not requeued, as the job forbids it" in job.text()
    job.wait_until(lambda: job.status()["state"] == "finished", "the end of the next job", 120)
    assert job.summary()["weights_sha256"] == local["weights_sha256"]
    assert job.steps() == list(range(1, STEPS + 1))
    assert (job.status()["chain"], job.status()["attempt"]) == (f"slurm-{job.job_id}", 1)
