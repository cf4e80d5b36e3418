"""`dist-train requeue JOB`: once more into the queue, with no failures counted.

A job that is over, and that SLURM may not requeue or has forgotten, is submitted anew: same script,
same code, same run folder, another number.
"""

import dataclasses
import sys
import time
from pathlib import Path

from dist_train.chain_status import forget
from dist_train.config import ConfigError
from dist_train.config.arguments import Parser, print_error
from dist_train.config.redact import redact_words
from launch import scontrol
from launch.job_record import JobRecord, write_record
from launch.jobs import add_jobs_dir, records_of
from launch.submission import submit_again

VERIFY_SEC = 60.0  # a running job ends first, within the cluster's KillWait
LOOK_EVERY_SEC = 0.5


def main(argv: list[str]) -> int:
    """Run `dist-train requeue`; returns 0, or 2 for the user's mistake or SLURM's refusal."""
    parser = Parser(
        prog="dist-train requeue",
        description="Put a job into the queue again; its restarts are counted from zero.",
    )
    parser.add_argument("job", metavar="JOB", help="77, 77_3, or a run folder")
    add_jobs_dir(parser)
    try:
        options = parser.parse_intermixed_args(argv)
        records = records_of(options.jobs_dir, options.job)
        if len(records) > 1 and records[0].chain:
            names = ", ".join(record.job_id for record in records)
            raise ConfigError(f"{options.job} belongs to a chain of jobs: name one of {names}")
        for record in records:
            sys.stdout.write(f"{_requeue(record, options.jobs_dir)}\n")
    except scontrol.SlurmError as error:
        print_error(str(error))
        return 2
    except ConfigError as mistake:
        print_error(str(mistake))
        return 2
    return 0


def _requeue(record: JobRecord, jobs_dir: Path) -> str:
    """Requeue a job and see that it waits; returns what became of it.

    Raises:
        ConfigError: SLURM has forgotten it, or it does not come back.
        SlurmError: SLURM refuses.
    """
    job = scontrol.job_of(record.job_id)
    if job is not None and job.is_waiting:
        return f"job {record.job_id} waits already ({job.state} {job.reason})"
    # Without it the next start is the first of its chain; a job that runs now must end before.
    folder = record.path(record.run_dir)
    if job is None or not job.is_running:
        forget(folder)
    if job is None or (job.is_over and not job.may_requeue):
        return _again(record, jobs_dir)
    if not job.may_requeue:
        scontrol.allow_requeue(record.job_id)
    scontrol.requeue(record.job_id)
    return _verify(record, job, folder)


def _again(record: JobRecord, jobs_dir: Path) -> str:
    """Submit a job anew that SLURM has forgotten, or may not requeue: it is over."""
    job_id = submit_again(record.job_id, jobs_dir=jobs_dir, cwd=record.cwd)
    if job_id is None:
        raise ConfigError(
            f"SLURM cannot requeue job {record.job_id} any more: submit it again, and it continues "
            f"the run; its words: {' '.join(redact_words(record.words))}"
        )
    output = str(Path(record.output).with_name(f"{job_id}.out"))
    new = dataclasses.replace(record, job_id=job_id, submitted=time.time(), output=output)
    write_record(jobs_dir, new)
    return (
        f"job {record.job_id} is over for SLURM: submitted again as job {job_id}, which continues "
        "the run"
    )


def _verify(record: JobRecord, before: scontrol.Job, folder: Path) -> str:
    end = time.monotonic() + VERIFY_SEC
    while time.monotonic() < end:
        job = scontrol.job_of(record.job_id)
        if job is not None and job.is_waiting:
            if before.is_running:
                forget(folder)
            if "HOLD" in job.state or "held" in job.reason.lower():  # JobHeldUser, JobHeldAdmin
                return f"job {record.job_id} is held: scontrol release {record.job_id}"
            return f"job {record.job_id} waits in the queue ({job.state}) and continues by itself"
        if job is not None and job.is_running and job.restarts > before.restarts:
            return f"job {record.job_id} runs again"
        time.sleep(LOOK_EVERY_SEC)
    raise ConfigError(
        f"job {record.job_id} was requeued, and does not wait in the queue after "
        f"{VERIFY_SEC:.0f} s: look at `scontrol show job {record.job_id}`"
    )
