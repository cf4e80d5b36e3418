"""`dist-train cancel JOB`: the ranks save and end, and the job is not put into the queue again."""

import re
import sys
from pathlib import Path

from dist_train.config import ConfigError
from dist_train.config.arguments import Parser, print_error
from launch import scontrol
from launch.job_record import JOB_ID, find_records, order, read_records
from launch.jobs import add_jobs_dir


def main(argv: list[str]) -> int:
    """Run `dist-train cancel`; returns 0, or 2 for the user's mistake or SLURM's refusal."""
    parser = Parser(
        prog="dist-train cancel",
        description="End a job for good: its ranks save first; the same command continues later.",
    )
    parser.add_argument("job", metavar="JOB", help="77, 77_3, or a run folder")
    parser.add_argument("--now", action="store_true", help="without saving: plain scancel")
    add_jobs_dir(parser)
    try:
        options = parser.parse_intermixed_args(argv)
        said = [
            line
            for job_id in _meant(options.jobs_dir, options.job)
            for line in _cancel(job_id, now=options.now)
        ]
        if not said:
            raise ConfigError(
                f"job {options.job} is over, or SLURM does not know it: nothing to cancel"
            )
        sys.stdout.write("".join(f"{line}\n" for line in said))
    except scontrol.SlurmError as error:
        print_error(str(error))
        return 2
    except ConfigError as mistake:
        print_error(str(mistake))
        return 2
    return 0


def _meant(jobs_dir: Path, job: str) -> list[str]:
    """Return the jobs to cancel: the one that is meant, but first what would go on after it.

    Raises:
        ConfigError: it is a folder, and no job is known that writes there.
    """
    records = read_records(jobs_dir)
    named = find_records(records, job)
    if not named and not JOB_ID.fullmatch(job):
        raise ConfigError(f"{jobs_dir} has no record of a job for {job!r}: name the job by number")
    first = named[0].job_id if named else job
    chains = {record.chain for record in named if record.chain}
    followers = [
        record.job_id
        for record in records
        if record.chain in chains and order(record.job_id) > order(first)
    ]
    return [*reversed(followers), job if JOB_ID.fullmatch(job) else first]


def _cancel(job_id: str, *, now: bool) -> list[str]:
    """Cancel a job, or every element of an array; returns what was done.

    Raises:
        SlurmError: SLURM refuses.
    """
    said = []
    jobs = [job for job in scontrol.jobs_of(job_id) if not job.is_over]
    for job in sorted(jobs, key=lambda job: not job.is_waiting):  # one of them could start now
        name = re.sub(r"%\d+", "", job.job_id)  # 77_[3-5%2]: those still waiting
        if job.is_waiting or now:
            scontrol.cancel(name)
            said.append(f"job {name}: cancelled")
        elif job.is_running:
            scontrol.forbid_requeue(name)
            scontrol.ask_to_stop(name)
            said.append(f"job {name}: its ranks save and end, and SLURM does not requeue it")
        else:
            said.append(f"job {name}: it is ending already ({job.state})")
    return said
