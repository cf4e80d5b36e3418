"""The body of a batch job: start the ranks, start them again, requeue the job, or end it.

    dist-train batch srun ... python -m dist_train -- experiment=cifar10_resnet9 optim.lr=0.4

What stands before `--` starts the ranks, what stands after it are dist_train's words. This process
runs on the job's first node, outside of any container, and imports no torch. It decides by two
sources only: status.json in the run's folder says how the ranks ended, SLURM what it did to the
job. A job whose ranks died is not requeued but its ranks are started again: the nodes are there.
"""

import contextlib
import os
import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from dist_train import chain as chains
from dist_train.chain_status import is_final, status_of
from dist_train.config import ConfigError
from dist_train.config.arguments import Parser, add_run_options, compose_request, print_error
from dist_train.config.identity import run_dir_of
from dist_train.layout import ATTEMPT_VARIABLE, CHAIN_VARIABLE, port_of
from dist_train.preemption import END_TIME_VARIABLE, JOB_LIMIT, OWN_LIMIT
from dist_train.slurm_step import hosts_of
from launch import scontrol
from launch.job_record import JOBS_DIR, JobRecord, record_file, write_record
from launch.ranks_command import RanksCommand, check_exports
from launch.this_job import ThisJob, say

IN_PLACE = 3  # starts in a row on the same nodes that ended before the run had begun
PORTS_TO_TRY = 50
TASK_COUNTS = ("SLURM_NTASKS", "SLURM_NPROCS")
# sbatch --export=NONE sets the first for the job's own sruns: they would keep from the ranks what
# the job's script has set, and what this process tells them.
EXPORTS = ("SLURM_EXPORT_ENV", "SRUN_EXPORT_ENV")


@dataclass(frozen=True, kw_only=True, slots=True)
class Next:
    """What becomes of the job now that its ranks have ended."""

    do: Literal["end", "again", "requeue"]
    code: int = 0  # of the job, if it ends
    say: str = ""


def main(argv: list[str]) -> int:
    """Run the verb: `batch START... -- key=value ...`."""
    split = argv.index("--") if "--" in argv else 0
    if split == 0:
        print_error(
            "batch needs the command that starts the ranks, then --, then dist_train's words: "
            "dist-train batch srun python -m dist_train -- experiment=quickstart"
        )
        return 2
    return run_job(argv[:split], argv[split + 1 :], remember=True)


def run_job(start: list[str], words: list[str], *, remember: bool = False) -> int:
    """Start the ranks until the run is over or the job is; returns the job's exit code.

    Args:
        start: the command that starts the ranks: srun and what it runs.
        words: dist_train's overrides and options, appended to it.
        remember: keep a record of the job: `dist-train submit` has done so, sbatch has not.

    Returns:
        0 finished, or stopped and saved where nothing can be requeued; 1 there is work left, and
        SLURM did not take the job back; 2 the user's mistake; 93 a restart would only repeat it.
    """
    ranks = RanksCommand()  # its handlers come after those that the caller has installed
    parser = Parser(prog="dist-train batch", description="The body of a batch job.")
    add_run_options(parser)
    try:
        check_exports(start)
        folder = run_dir_of(compose_request(parser.parse_intermixed_args(words)).config).absolute()
    except ConfigError as mistake:
        print_error(str(mistake))
        return 2
    this_job = ThisJob(gives_up=lambda: ranks.stopped_by == "SIGINT")
    try:
        return _until_the_end(start, words, folder, ranks, this_job, remember=remember)
    except scontrol.NoAnswerError as silence:
        print_error(
            f"{silence}. The job is not in the queue again; the same command continues the run"
        )
        return 1


def _until_the_end(
    start: list[str],
    words: list[str],
    folder: Path,
    ranks: RanksCommand,
    this_job: ThisJob,
    *,
    remember: bool,
) -> int:
    """Start the ranks until the run is over or the job is; returns the job's exit code.

    Raises:
        NoAnswerError: SLURM does not answer, and the job's time is over.
    """
    chain = os.environ.get(CHAIN_VARIABLE) or f"slurm-{this_job.job_id or os.getpid()}"
    silent = 0
    while True:
        job = this_job.ask()
        if remember and this_job.job_id is not None:
            _remember(this_job.job_id, job, folder, words)
        memory = chains.read(folder)
        attempt = memory.attempt + 1 if memory.chain == chain else 0
        environment = _for_srun(os.environ) | _told(this_job, job, chain, attempt)
        code = ranks.run([*start, *words], environment)
        status = status_of(folder, chain, attempt)
        began = bool(status)
        silent = 0 if began else silent + 1
        if not began and code not in (0, 2, chains.EXIT_CODE) and ranks.stopped_by is None:
            how = f"the ranks ended with {code} before the run had begun"
            endless = chains.count_silent(folder, chain=chain, attempt=attempt, how=how)
            if endless is not None:
                print_error(endless)
                return chains.EXIT_CODE
        memory = chains.read(folder)
        following = what_next(
            code,
            status,
            ask=this_job.ask,
            in_job=this_job.job_id is not None,
            silent=silent,
            first_step=memory.progress if memory.chain == chain else 0,
            stopped=ranks.stopped_by is not None,
        )
        if following.say:
            say(following.say)
        if following.do == "requeue":
            return _requeue(this_job)
        if following.do == "end":
            return following.code
        ranks.wait(chains.back_off(silent))


def what_next(
    code: int,
    status: Mapping[str, Any],
    *,
    ask: Callable[[], scontrol.Job | None],
    in_job: bool,
    silent: int,
    first_step: int,
    stopped: bool,
) -> Next:
    """Decide what becomes of the job.

    Args:
        code: of the command that started the ranks.
        status: status.json as these ranks left it; empty if they ended before the run had begun.
        ask: what SLURM says of the job; None: there is none, or SLURM does not know it. It is
            asked only where the answer counts.
        in_job: this process is in one.
        silent: such starts in a row that ended before the run had begun.
        first_step: the newest checkpoint when these ranks began.
        stopped: this process was asked to stop.
    """
    state, reason = status.get("state"), status.get("reason") or ""
    if state == "finished":
        return Next(do="end")
    if is_final(status):
        return Next(do="end", code=status["exit_code"], say=reason)
    if not status and (code in (2, chains.EXIT_CODE) or (code == 0 and not stopped)):
        return Next(do="end", code=code)  # refused in words, or there was nothing left to do
    saved = state == "preempted" or (not status and code == 0)
    if saved and reason.startswith(OWN_LIMIT):
        return Next(do="end")
    job = ask()
    if job is not None and not job.is_running and not job.is_out_of_time:
        verdict = f"SLURM has taken the job ({job.state})"
        return Next(do="end", code=0 if saved else code or 1, say=verdict)
    if reason.startswith(JOB_LIMIT) and status.get("step", 0) <= first_step:
        return Next(
            do="end",
            code=chains.EXIT_CODE,
            say="not one step fits between the start and the last save in this job's time: ask "
            "for more with --time",
        )
    # Saved, but by the word of a torchrun that died and not of SLURM: the nodes are still there.
    died = not saved or (code != 0 and not reason.startswith(JOB_LIMIT))
    if died and not stopped and silent <= IN_PLACE:
        return Next(do="again", say=f"the ranks ended ({reason or code}): started again")
    code = 0 if saved else code or 1
    if job is None and in_job:  # work is left, and nobody goes on with it
        text = "not requeued, as SLURM does not know this job; the same command continues"
        return Next(do="end", code=code or 1, say=text)
    if job is None:
        text = "not requeued, as this is no job of SLURM's; the same command continues"
        return Next(do="end", code=code, say=text)
    if not job.may_requeue:
        text = "not requeued, as the job forbids it; the same command continues"
        return Next(do="end", code=code, say=text)
    return Next(do="requeue", code=code)


def _for_srun(env: Mapping[str, str]) -> dict[str, str]:
    """Return `env`, all of which reaches the ranks, as srun is to see it.

    Without the number of tasks, where srun can count them itself: with --nodes=2-4 it is that of
    the least nodes, and srun would believe it.
    """
    left_out = (*EXPORTS, *(TASK_COUNTS if "SLURM_NTASKS_PER_NODE" in env else ()))
    return {k: v for k, v in env.items() if k not in left_out}


def _told(this_job: ThisJob, job: scontrol.Job | None, chain: str, attempt: int) -> dict[str, str]:
    """Return what the ranks must know of this start."""
    told = {CHAIN_VARIABLE: chain, ATTEMPT_VARIABLE: str(attempt)}
    if job is not None and job.end_time is not None:
        told[END_TIME_VARIABLE] = str(int(job.end_time))
    nodes = os.environ.get("SLURM_JOB_NODELIST")
    if nodes and "MASTER_ADDR" not in os.environ:
        told["MASTER_ADDR"] = _address_of(hosts_of(nodes), this_job)
    if nodes and "MASTER_PORT" not in os.environ:
        told["MASTER_PORT"] = str(_free_port(f"{chain}.{attempt}"))
    return told


def _address_of(hosts: list[str], this_job: ThisJob) -> str:
    """Return an address of the first host that the others reach: its name, if that leads there.

    On some systems a host's own name leads to 127.0.1.1; then the address is SLURM's own.
    """
    if len(hosts) == 1:
        return "127.0.0.1"
    with contextlib.suppress(OSError):
        if not socket.gethostbyname(hosts[0]).startswith("127."):
            return hosts[0]
    return this_job.address_of(hosts[0]) or hosts[0]


def _free_port(name: str) -> int:
    """Return a port of this job's own which is free on this node, that of rank 0."""
    for number in range(PORTS_TO_TRY):
        port = port_of(f"{name}.{number}")
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("", port))
            return port
    return port_of(name)


def _requeue(this_job: ThisJob) -> int:
    """Put this job back into the queue and see that it waits there; returns the exit code.

    Raises:
        NoAnswerError: SLURM does not answer, and the job's time is over.
    """
    try:
        job = this_job.requeue()
    except scontrol.NoAnswerError:
        raise
    except scontrol.SlurmError as refusal:
        print_error(
            f"{refusal}. The job is not in the queue again; the same command continues the run; "
            "where requeueing is forbidden, submit a chain: dist-train submit --chain N"
        )
        return 1
    if job is None:
        say(f"requeued job {this_job.job_id}, but SLURM still says that it runs: look at squeue")
    else:
        say(f"requeued: job {job.job_id} is {job.state} and continues by itself")
    return 0


def _remember(job_id: str, job: scontrol.Job | None, folder: Path, words: list[str]) -> None:
    """Let `dist-train jobs` know of this job; not being able to is no reason to end it."""
    with contextlib.suppress(OSError):
        if not record_file(JOBS_DIR, job_id).exists():
            write_record(
                JOBS_DIR,
                JobRecord(
                    job_id=job_id,
                    name=os.environ.get("SLURM_JOB_NAME", ""),
                    run_dir=str(folder),
                    words=tuple(words),
                    command="sbatch",
                    cwd=str(Path.cwd()),
                    output="" if job is None else job.output,
                ),
            )
