"""What is remembered of a job, in JOBS_DIR/<job id>.json: who asked for what, where it writes.

SLURM forgets a job some minutes after its end; these files stay. Needs neither SLURM nor submitit.
"""

import dataclasses
import json
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from dist_train.config import ConfigError
from dist_train.config.redact import redact, redact_words
from dist_train.config.typed import build
from dist_train.config.whole_file import read_json, write_atomically

JOBS_DIR = Path("runs/jobs")
FOLDER, LOCK = "submitit", ".lock"  # in the folder of the jobs: submitit's scripts and pickles
JOB_ID = re.compile(r"\d+(?:_\d+)?")


@dataclass(frozen=True, kw_only=True, slots=True)
class GitState:
    """Which code a folder under git holds."""

    root: str  # the top folder of the working tree
    commit: str  # "": nothing is committed yet
    dirty: bool
    diff_sha256: str = ""  # of what differs from the commit; "" if nothing does


@dataclass(frozen=True, kw_only=True, slots=True)
class JobRecord:
    """One job, or one element of an array."""

    job_id: str  # "77", or "77_3" for an array's element
    name: str
    run_dir: str  # relative to cwd, as all paths here
    words: tuple[str, ...]  # dist_train's: overrides and options
    command: Literal["submit", "sbatch"]
    cwd: str
    output: str = ""  # the file that SLURM writes the job's output to; "": not known
    submitted: float = field(default_factory=time.time)  # seconds since 1970
    git: tuple[GitState, ...] = ()  # of the code at submission; empty: not known
    snapshot: str | None = None  # the folder with a copy of the code that the job runs
    overrides: tuple[str, ...] = ()  # of a sweep: what sets this element apart
    chain: str = ""  # of jobs that continue one run after each other: the first one's id

    @property
    def array_index(self) -> int | None:
        """The element's number in its array; None: the job is no array."""
        _, _, index = self.job_id.partition("_")
        return int(index) if index else None

    def path(self, of: str) -> Path:
        """Return one of this record's paths, wherever this process is."""
        return Path(self.cwd) / of


def record_file(jobs_dir: Path, job_id: str) -> Path:
    """Return where a job's record is."""
    return jobs_dir / f"{job_id}.json"


def write_record(jobs_dir: Path, record: JobRecord) -> None:
    """Write a job's record, as a whole and without secrets; makes the folder.

    Raises:
        OSError: the disk does not take it.
    """
    jobs_dir.mkdir(parents=True, exist_ok=True)
    told = redact(dataclasses.asdict(record)) | {"words": redact_words(record.words)}
    write_atomically(record_file(jobs_dir, record.job_id), json.dumps(told, indent=1) + "\n")


def read_records(jobs_dir: Path) -> list[JobRecord]:
    """Return the records of a folder, by job id; files that are none are left out."""
    files = [path for path in jobs_dir.glob("*.json") if JOB_ID.fullmatch(path.stem)]
    read = [_record(read_json(path)) for path in files]
    records = [r for r in read if r is not None and JOB_ID.fullmatch(r.job_id)]
    return sorted(records, key=lambda record: order(record.job_id))


def find_records(records: list[JobRecord], job: str) -> list[JobRecord]:
    """Return the job that is meant, every element of an array, or the last one of a run folder.

    A folder that a chain of jobs writes to has them all.

    Args:
        records: those of a folder.
        job: `77`, `77_3`, or a run folder.
    """
    if JOB_ID.fullmatch(job):
        return [r for r in records if job in (r.job_id, r.job_id.partition("_")[0])]
    folder = Path(job).resolve()
    there = [r for r in records if r.path(r.run_dir).resolve() == folder]
    return [r for r in there if r.chain and r.chain == there[-1].chain] or there[-1:]


def order(job_id: str) -> tuple[int, ...]:
    """Return a job id as numbers, so that 9 comes before 10."""
    return tuple(int(part) for part in re.findall(r"\d+", job_id))


def _record(values: Mapping[str, Any]) -> JobRecord | None:
    known = {f.name for f in dataclasses.fields(JobRecord)}
    try:
        return build(JobRecord, {name: v for name, v in values.items() if name in known})
    except (ConfigError, TypeError):  # a field is of another kind, or missing
        return None
