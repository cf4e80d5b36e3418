"""Rows J1 and P3: jobs on a real SLURM cluster of four nodes on this machine."""

import time

from benchmarks.reliability.row import Row, Trial, check
from tests.slurm.cluster import running_cluster, why_not
from tests.slurm.disturb import (
    FAULTS,
    NODES,
    disturbed,
    preempt,
    requeue,
    submitted,
    user_signal,
)
from tests.slurm.jobs import PACED, STEPS, Submitted

TASKS = 2  # of each node
STOPS = {"preemption": preempt, "scontrol requeue": requeue, "USR2": user_signal}


def j1(trial: Trial) -> float | None:
    """One fault on two nodes of two ranks."""
    name = trial.one_of(tuple(FAULTS))
    step = trial.dice.randrange(2, STEPS // 2)
    trial.notes["step"] = step
    with running_cluster(cpus=TASKS) as cluster:
        with disturbed(cluster, name, trial.folder, step=step, tasks=TASKS) as job:
            trial.fired = True
            begin = time.monotonic()
            _check_end(trial, job, restarts=_restarts_of(name, job))
        return time.monotonic() - begin


def p3(trial: Trial) -> float | None:
    """Three stops, each at a step of its own and of a kind of its own."""
    with (
        running_cluster(cpus=TASKS) as cluster,
        submitted(cluster, "B", trial.folder, *PACED, nodes=NODES, tasks=TASKS) as job,
    ):
        begin = time.monotonic()
        for attempt in range(3):
            kind = trial.dice.choice(sorted(STOPS))
            step = trial.dice.randrange(7 * attempt + 1, 7 * attempt + 7)
            trial.notes[f"stop {attempt}"] = f"{kind} at step {step}"
            job.wait_for_step(step, attempt=attempt)
            STOPS[kind](job)
        trial.fired = True
        _check_end(trial, job, restarts=3)
        return time.monotonic() - begin


def _restarts_of(name: str, job: Submitted) -> int:
    """Return how many restarts must have been counted when a job that met this fault is over."""
    job.wait_for_end()
    if name == "time limit":  # a job may need more than one stretch of it
        return len(job.events("preempted"))
    if name == "cut cable":  # healed before the ranks gave each other up, it needs none
        return min(1, len(job.events("started")) - 1)
    return 1


def _check_end(trial: Trial, job: Submitted, *, restarts: int) -> None:
    ended = job.wait_for_end()
    check(ended.state == "COMPLETED", f"the job is {ended.state}: {job.text()[-2000:]}")
    check(job.steps() == list(range(1, STEPS + 1)), f"steps: {job.steps()}")
    counted = job.status()["attempt"]
    check(counted == restarts, f"{counted} restarts were counted instead of {restarts}")
    trial.notes["restarts"] = counted
    # How long a step waits changes nothing but the clock.
    words = tuple("model.args.sec=0.0" if w.startswith("model.args.sec") else w for w in PACED)
    difference = trial.clean.difference(job.run_dir, NODES * TASKS, words)
    check(difference is None, str(difference))


ROWS = (
    Row(
        id="J1",
        promise="a job that SLURM, a machine or a kill ends is one continuous run, bitwise",
        injection=", ".join(FAULTS),
        num_trials=5 * len(FAULTS),
        measures="from the fault to the end of the job",
        work=j1,
        limit_sec=400.0,
        needs="root and SLURM's daemons",
        cannot_run=why_not,
    ),
    Row(
        id="P3",
        promise="a job that SLURM stops and requeues three times is one continuous run, bitwise",
        injection="preemption, requeue, signal on a real SLURM",
        num_trials=10,
        measures="the whole job",
        work=p3,
        small=0,
        limit_sec=600.0,
        needs="root and SLURM's daemons",
        cannot_run=why_not,
    ),
)
