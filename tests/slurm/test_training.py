"""Training on a real cluster: the ways to start, and every way in which a job is disturbed.

A disturbed job ends with an undisturbed one's weights, bit for bit; no step is missing or repeated
in its metrics.
"""

import sys
from pathlib import Path
from typing import Any

import pytest

from tests.faults import train_with
from tests.ranks import run_ranks
from tests.settings import SMALL, metrics, small
from tests.slurm.cluster import Cluster, running_cluster
from tests.slurm.disturb import FAULTS, NODES, disturbed, preempt, submitted
from tests.slurm.jobs import PACED, SHAPES, STEPS, Submitted

pytestmark = pytest.mark.slurm

# Ranks of a node, where a fault is what matters: starting them is what takes the time.
TASKS = 1
RESNET = ("experiment=cifar10_resnet9", "data.name=synthetic", "data.args.num_train=480")
RESNET += ("data.args.num_test=96", "train.global_batch_size=48", "train.steps=4", "threads=1")
RESNET += ("model.args.width=8", "precision=fp32", "log_every=1", "device=cpu")


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The summary of an undisturbed run on as many ranks, on this machine alone."""
    config = small(tmp_path_factory.mktemp("clean") / "run", *PACED, "model.args.sec=0.0")
    return run_ranks(train_with, NODES * TASKS, config, None)[0]


def check_whole(job: Submitted, clean: dict[str, Any], *, restarts: int | None) -> None:
    """Check that a job ended as if nothing had happened, and that its restarts were counted.

    restarts None: as many as it was stopped for want of time, which depends on the machine.
    """
    ended = job.wait_for_end()
    assert ended.state == "COMPLETED", job.text()
    assert job.status()["state"] == "finished", job.text()
    assert job.steps() == list(range(1, STEPS + 1)), "a step is missing or repeated"
    assert job.summary()["weights_sha256"] == clean["weights_sha256"], job.text()
    if restarts is None:
        restarts = len(job.events("preempted"))
        assert restarts > 0, job.text()
    assert job.status()["attempt"] == restarts, job.text()
    assert len(job.events("resumed")) == restarts, job.text()


@pytest.mark.parametrize("name", FAULTS)
def test_a_disturbed_job_ends_as_if_nothing_had_happened(
    name: str, cluster: Cluster, clean: dict[str, Any], tmp_path: Path
) -> None:
    with disturbed(cluster, name, tmp_path, step=12, tasks=TASKS) as job:
        limited = name == "time limit"
        check_whole(job, clean, restarts=None if limited else 1)
        if limited:
            assert "the job's time is nearly over" in job.events("preempted")[0]["reason"]


@pytest.mark.parametrize("shape", SHAPES)
def test_resnet9_on_two_nodes(shape: str, cluster: Cluster, tmp_path: Path) -> None:
    local = run_ranks(train_with, 4, small(tmp_path / "local", *RESNET), None)[0]
    with submitted(cluster, shape, tmp_path, *SMALL, *RESNET, tasks=2) as job:
        assert job.wait_for_end().state == "COMPLETED", job.text()
        assert job.summary()["world_size"] == 4
        assert job.summary()["weights_sha256"] == local["weights_sha256"]


@pytest.mark.parametrize("order", ["fast", "fixed"])
def test_three_preemptions_and_other_numbers_of_nodes(
    order: str, cluster: Cluster, tmp_path: Path
) -> None:
    words = (*PACED, f"train.order={order}", "train.num_shards=4", "train.global_batch_size=16")
    if order == "fast":  # a net that is the same function at any number of ranks
        words = (*words, "model.factory=tests.nets:paced_plain_net")
    config = small(tmp_path / "local", *words, "model.args.sec=0.0")
    local = run_ranks(train_with, 1, config, None)[0]
    with submitted(cluster, "B", tmp_path, *words, nodes=4, tasks=1) as job:
        for restart, nodes in enumerate((2, 1, 4)):
            job.wait_for_step(7 * (restart + 1), attempt=restart)
            preempt(job)
            job.wait_until(lambda: job.job().state == "PENDING", "the requeue")
            sizes = (f"NumNodes={nodes}", f"NumTasks={nodes}", f"NumCPUs={nodes}")
            update = ("update", f"JobId={job.job_id}", *sizes)
            assert cluster.run("scontrol", *update) == ""
        check_whole(job, {"weights_sha256": job_sha(job, local, order)}, restarts=3)
        sizes = [int(e["world_size"]) for e in job.events("started")]
        assert sizes == [4, 2, 1, 4]


def job_sha(job: Submitted, local: dict[str, Any], order: str) -> str:
    """Return the weights that are due; in fast order sums differ in their last bits."""
    job.wait_for_end()
    if order == "fixed":
        return local["weights_sha256"]
    theirs = [line["train/loss"] for line in metrics(job.run_dir) if "train/loss" in line]
    ours = metrics(Path(local["run_dir"]))
    assert theirs == pytest.approx([x["train/loss"] for x in ours if "train/loss" in x], rel=1e-4)
    return job.summary()["weights_sha256"]


@pytest.mark.parametrize("shape", SHAPES)
def test_a_job_that_fails_the_same_way_three_times_is_not_requeued(
    shape: str, cluster: Cluster, tmp_path: Path
) -> None:
    words = (*SMALL, "model.factory=tests.nets:failing_net", "model.args.kind=exception")
    with submitted(cluster, shape, tmp_path, *words, tasks=1) as job:
        ended = job.wait_for_end()
        assert (ended.state, ended.restarts, ended.exit_code) == ("FAILED", 0, "93:0"), job.text()
        assert len(job.events("failed")) == 3
        status = job.status()
        assert (status["state"], status["exit_code"]) == ("failed", 93)
        assert "3 times, at the same step" in status["reason"]
        assert status["reason"] in job.text()
    records = ("--jobs-dir", str(tmp_path / "runs" / "jobs"))
    told = cluster.run(sys.executable, "-m", "launch.cli", "jobs", job.job_id, *records)
    assert status["reason"] in told, told
    assert "FAILED" in told


@pytest.mark.usefixtures("slurm_is_here")
def test_nodes_whose_own_names_lead_to_themselves(tmp_path: Path) -> None:
    words = (*SMALL, "train.steps=3")
    with running_cluster(cpus=1, num_nodes=2, loopback_names=True) as cluster:
        assert "127.0.1.1" in cluster.run("srun", "-N1", "getent", "ahostsv4", "node1")
        with submitted(cluster, "B", tmp_path, *words, tasks=1) as job:
            assert job.wait_for_end().state == "COMPLETED", job.text()
            assert job.summary()["world_size"] == 2
