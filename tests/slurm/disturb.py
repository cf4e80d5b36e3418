"""What happens to jobs: each way in which SLURM, a machine or a process ends one."""

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from tests.slurm.cluster import Cluster
from tests.slurm.jobs import PACED, Submitted, submit

NODES = 2
# Under a minute's limit: some 25 steps a job, in which the ranks must see the end coming.
SLOW = "model.args.sec=1.2"


def preempt(job: Submitted) -> None:
    """Let a job of a higher partition take all nodes for a second."""
    script = job.run_dir.parent / "urgent.sh"
    script.write_text("#!/bin/bash\nsleep 1\n")
    options = ("--partition=urgent", "--nodes=4", "--exclusive", "--output=/dev/null")
    told = job.cluster.run("sbatch", *options, str(script))
    assert "Submitted" in told, told


def requeue(job: Submitted) -> None:
    """Put it back into the queue, as its owner or an administrator does."""
    told = job.cluster.run("scontrol", "requeue", job.job_id)
    assert told == "", told


def user_signal(job: Submitted) -> None:
    """Ask its ranks to save and stop."""
    told = job.cluster.run("scancel", "--signal=USR2", job.job_id)
    assert told == "", told


def crash(job: Submitted) -> None:
    """Take the power of a node away, and give it back when SLURM has noticed."""
    job.cluster.crash(2)
    job.wait_until(lambda: job.job().restarts == 1, "a requeue after the node's loss")
    job.cluster.boot(2)


def cut(job: Submitted) -> None:
    """Cut a node's cable for eight seconds."""
    job.cluster.cut(2)
    time.sleep(8)
    job.cluster.heal(2)


def kill_rank(job: Submitted) -> None:
    """Kill the last rank, on the second node."""
    os.kill(job.rank(job.events("started")[-1]["world_size"] - 1), signal.SIGKILL)


def kill_torchrun(job: Submitted) -> None:
    """Kill a node's torchrun."""
    agents = [pid for pid, env in job.processes("dist_train.agent").items() if "RANK" not in env]
    assert len(agents) == NODES, agents
    os.kill(agents[0], signal.SIGKILL)


def nothing(job: Submitted) -> None:
    """Wait for the time limit."""


# The script that is submitted, and what is done to its job in the middle of the run.
FAULTS: dict[str, tuple[str, Callable[[Submitted], None]]] = {
    "preemption": ("B", preempt),
    "scontrol requeue": ("A", requeue),
    "scancel --signal=USR2": ("B", user_signal),
    "time limit": ("B", nothing),
    "node crash": ("A", crash),
    "cut cable": ("B", cut),
    "kill -9 of a rank, tasks": ("B", kill_rank),
    "kill -9 of a rank, torchrun": ("A", kill_rank),
    "kill -9 of torchrun": ("A", kill_torchrun),
}


@contextmanager
def submitted(cluster: Cluster, *args: Any, **kwargs: Any) -> Iterator[Submitted]:
    """Submit a job (`jobs.submit`) and leave none behind."""
    job = submit(cluster, *args, **kwargs)
    try:
        yield job
    finally:
        cluster.run("scancel", job.job_id)


@contextmanager
def disturbed(
    cluster: Cluster, name: str, folder: Any, *, step: int, tasks: int
) -> Iterator[Submitted]:
    """Yield a job of `tasks` ranks on each node that has met a fault once it had reached `step`."""
    shape, disturb = FAULTS[name]
    limited = name == "time limit"
    words = (*PACED, SLOW) if limited else PACED
    # Only so much of the user's environment, which srun would obey, too: the ranks must know more.
    options = ("--time=1", "--export=PYTHON,PYTHONPATH") if limited else ()
    with submitted(
        cluster, shape, folder, *words, nodes=NODES, tasks=tasks, options=options
    ) as job:
        job.wait_for_step(min(step, 5) if limited else step)
        disturb(job)
        yield job
