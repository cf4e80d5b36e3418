"""What SLURM says of jobs, and what is asked of it: scontrol, scancel and sacct as functions.

Only facts that SLURM itself holds: whether a job was preempted, cancelled or out of time is never
guessed from a clock. https://slurm.schedmd.com/scontrol.html, https://slurm.schedmd.com/sacct.html
"""

import os
import re
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass

TIMEOUT_SEC = 60.0  # a busy controller answers late
# What SLURM's commands say when the controller is down, busy or out of reach. The last but one is
# scontrol's for a request that got no reply.
NO_ANSWER = re.compile(
    r"unable to contact|connect failure|connection refused|timed out|zero bytes were transmitted"
    r"|in standby mode|temporarily unable|temporarily unavailable|transport endpoint"
    r"|communication (connection|shutdown) failure|message (send|receive) failure"
    r"|no controller|unexpected message received|slurm_persist_conn",
    re.IGNORECASE,
)
RUNNING = ("RUNNING", "SUSPENDED", "STOPPED", "RESIZING", "SIGNALING", "STAGE_OUT")
WAITING = ("PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SPECIAL_EXIT")
# Of `scontrol show job`: where a job begins, its first line, and of the other lines those that are
# read, by their first word.
RECORD = re.compile(r"^(?=JobId=\d)", re.MULTILINE)
TITLE = re.compile(
    r"JobId=(?P<JobId>\d+)(?: ArrayJobId=(?P<ArrayJobId>\d+) ArrayTaskId=(?P<ArrayTaskId>\S+))?"
    r"(?: \w+=\S*)*? JobName=(?P<JobName>.*)"
)
FIRST_OF_A_LINE = ("JobState", "Requeue", "StartTime", "NodeList")
PATHS = ("StdOut",)
# Of squeue, with their widths in characters.
COLUMNS = {"JobArrayID": 40, "State": 30, "RestartCnt": 12, "Reason": 80}


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """One job, or one element of an array, as SLURM's controller (or accounting) knows it."""

    job_id: str  # "77", or "77_3" for an array's element, "77_[3-5%2]" for those still waiting
    state: (
        str  # JobState: RUNNING, PENDING, COMPLETING, PREEMPTED, TIMEOUT, NODE_FAIL, CANCELLED...
    )
    reason: str = ""  # why it waits
    name: str = ""
    restarts: int = 0
    may_requeue: bool = False
    end_time: float | None = None  # seconds since 1970 when its time is over; None: no limit
    nodes: str = ""  # SLURM's compressed list
    exit_code: str = ""  # "code:signal"
    output: str = ""  # the file that its output goes to

    @property
    def is_waiting(self) -> bool:
        """Whether it is in the queue."""
        return self.state in WAITING

    @property
    def is_running(self) -> bool:
        """Whether it has its nodes, and SLURM has not begun to end it."""
        return self.state in RUNNING

    @property
    def is_over(self) -> bool:
        """Whether it has ended, its last steps too, and is not on its way back to the queue."""
        returns = self.may_requeue and self.state in ("PREEMPTED", "NODE_FAIL")
        return not (self.is_waiting or self.is_running or returns or self.state == "COMPLETING")

    @property
    def is_out_of_time(self) -> bool:
        """Whether SLURM ends it, or has ended it, at its time limit."""
        return self.state == "TIMEOUT" or self.reason == "TimeLimit"


class SlurmError(RuntimeError):
    """SLURM refuses, or does not answer; says which, in one line."""


class NoAnswerError(SlurmError):
    """SLURM does not answer: nobody knows whether it has heard."""


def this_job() -> str | None:
    """Return the id of the job that this process belongs to: `77`, or `77_3` in an array."""
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    return f"{array}_{task}" if array and task else os.environ.get("SLURM_JOB_ID")


def is_available() -> bool:
    """Say whether SLURM's commands are here; inside a container they may not be."""
    return shutil.which("scontrol") is not None


def jobs_of(job_id: str) -> list[Job]:
    """Return the job, or every element of an array; [] if SLURM does not know it any more.

    The controller forgets a job some minutes after its end (MinJobAge); then accounting is asked.

    Raises:
        SlurmError: it does not answer.
    """
    found = _ask("scontrol", "show", "job", job_id)
    if found.returncode == 0:
        return [read_job(text) for text in RECORD.split(found.stdout) if "JobState=" in text]
    if "Invalid job id" in found.stderr:
        return _from_accounting(job_id)
    raise _problem(found)


def job_of(job_id: str) -> Job | None:
    """Return one job, or one element of an array; None if SLURM does not know it any more."""
    found = jobs_of(job_id)
    return found[0] if found else None


def read_job(record: str) -> Job:
    """Read a job's record of `scontrol show job`: of many lines, as some values have blanks.

    The job's name and comment, and its paths, are the user's text: they can look like anything.
    """
    first, *lines = record.splitlines()
    title = TITLE.match(first)
    assert title is not None, record
    fields = {name: value or "" for name, value in title.groupdict().items()}
    paths: dict[str, str] = {}
    for line in lines:
        name, _, value = line.strip().partition("=")
        if name in PATHS:
            paths[name] = value  # the last one: a comment of several lines comes before them
        elif name in FIRST_OF_A_LINE:
            for word in line.split():
                name, _, value = word.partition("=")
                fields.setdefault(name, value)  # the first one: a comment comes after them
    job_id, tasks = fields["JobId"], fields["ArrayTaskId"]
    if tasks:
        job_id = f"{fields['ArrayJobId']}_{tasks if tasks.isdigit() else f'[{tasks}]'}"
    reason = fields.get("Reason", "")
    return Job(
        job_id=job_id,
        state=fields["JobState"],
        reason="" if reason == "None" else reason,
        name=fields["JobName"],
        restarts=int(fields.get("Restarts", "0")),
        may_requeue=fields.get("Requeue") == "1",
        end_time=_seconds(fields.get("EndTime", "")),
        nodes=fields.get("NodeList", "").replace("(null)", ""),
        exit_code=fields.get("ExitCode", ""),
        output=paths.get("StdOut", ""),
    )


def states_of(job_ids: list[str]) -> dict[str, Job]:
    """Return what SLURM says of many jobs, elements of arrays one by one; without the forgotten.

    One question for all: a controller that is asked for each of a hundred jobs is slow for others.

    Raises:
        SlurmError: it does not answer.
    """
    arrays = sorted({job_id.partition("_")[0] for job_id in job_ids}, key=int)
    if not arrays:
        return {}
    columns = ",".join(f"{name}:{width}" for name, width in COLUMNS.items())
    listed = _ask(
        *("squeue", "--noheader", "--array", "--states=all"),
        *(f"--jobs={','.join(arrays)}", f"--Format={columns}"),
    )
    if listed.returncode != 0 and "Invalid job id" not in listed.stderr:  # a lone forgotten one
        raise _problem(listed)
    jobs = [_from_queue(line) for line in listed.stdout.splitlines() if line.strip()]
    known = {job.job_id.partition("_")[0] for job in jobs}
    forgotten = [job_id for job_id in arrays if job_id not in known]
    jobs += _from_accounting(",".join(forgotten)) if forgotten else []
    found = {job.job_id: job for job in jobs}
    # Elements that were cancelled before they were started go by the array's own number.
    of_array = {job_id: found.get(job_id.partition("_")[0]) for job_id in job_ids}
    return {job_id: job for job_id, job in of_array.items() if job is not None} | found


def address_of(node: str) -> str | None:
    """Return the address at which SLURM itself reaches a node. Raises SlurmError."""
    found = _ask("scontrol", "show", "node", "--oneliner", node)
    if found.returncode != 0:
        raise _problem(found)
    match = re.search(r"\bNodeAddr=(\S+)", found.stdout)
    return match.group(1) if match else None


def requeue(job_id: str) -> None:
    """Ask SLURM to put a job back into the queue.

    Raises:
        SlurmError: it refuses: requeueing is forbidden on this cluster or for this job.
    """
    _do("scontrol", "requeue", job_id)


def forbid_requeue(job_id: str) -> None:
    """Let a job end when it stops. Raises SlurmError."""
    _do("scontrol", "update", f"JobId={job_id}", "Requeue=0")


def allow_requeue(job_id: str) -> None:
    """Let a job be put back into the queue. Raises SlurmError."""
    _do("scontrol", "update", f"JobId={job_id}", "Requeue=1")


def ask_to_stop(job_id: str) -> None:
    """Ask a job's ranks to save and end: by SIGUSR2 to its script and what that has started.

    srun passes it on to the ranks, and `batch` knows of it before there are any. At a SIGTERM
    srun would kill its tasks at once. Raises SlurmError.
    """
    _do("scancel", "--full", "--signal=USR2", job_id)


def cancel(job_id: str) -> None:
    """End a job: SIGTERM, and SIGKILL after the cluster's KillWait. Raises SlurmError."""
    _do("scancel", job_id)


def _from_queue(line: str) -> Job:
    """Read a line of squeue, whose columns have fixed widths."""
    values, start = [], 0
    for width in COLUMNS.values():
        values.append(line[start : start + width].strip())
        start += width
    job_id, state, restarts, reason = values
    return Job(
        job_id=job_id,
        state=state,
        restarts=int(restarts) if restarts.isdigit() else 0,
        reason="" if reason == "None" else reason,
    )


def _from_accounting(job_id: str) -> list[Job]:
    if shutil.which("sacct") is None:
        return []
    columns = "JobID,State,Restarts,NodeList,ExitCode,JobName"  # a name can have a | in it
    found = _ask("sacct", "-X", "-n", "-P", "-j", job_id, "-o", columns)
    jobs = []
    for line in found.stdout.splitlines() if found.returncode == 0 else []:
        name, state, restarts, nodes, code, title = (line.split("|", 5) + [""] * 6)[:6]
        jobs.append(
            Job(
                job_id=name,
                state=(state.split() or ["UNKNOWN"])[0],  # "CANCELLED by 1000"
                name=title,
                restarts=int(restarts) if restarts.isdigit() else 0,
                nodes="" if nodes == "None assigned" else nodes,
                exit_code=code,
            )
        )
    return jobs


def _seconds(text: str) -> float | None:
    """Read `2026-01-31T12:00:00`, in this machine's zone as scontrol prints it."""
    try:
        return time.mktime(time.strptime(text, "%Y-%m-%dT%H:%M:%S"))
    except ValueError:  # Unknown, or N/A: no limit
        return None


def _do(*words: str) -> None:
    done = _ask(*words)
    if done.returncode != 0 or "error:" in done.stderr:
        raise _problem(done)


def _ask(*words: str) -> "subprocess.CompletedProcess[str]":
    try:
        return subprocess.run(
            words,
            env=os.environ | {"SLURM_TIME_FORMAT": "standard"},
            capture_output=True,
            encoding=sys.getfilesystemencoding(),
            errors="surrogateescape",  # a folder's name may be any bytes
            timeout=TIMEOUT_SEC,
            check=False,
        )
    except FileNotFoundError:
        raise SlurmError(f"{words[0]} is not here: run this where SLURM's commands are") from None
    except subprocess.TimeoutExpired:
        raise problem(f"{' '.join(words)} timed out after {TIMEOUT_SEC:.0f} s") from None


def problem(text: str) -> SlurmError:
    """Return the error that tells what a command of SLURM's said when it failed."""
    if NO_ANSWER.search(text):
        return NoAnswerError(f"SLURM does not answer: {text}")
    return SlurmError(f"SLURM refuses: {text}")


def _problem(done: "subprocess.CompletedProcess[str]") -> SlurmError:
    text = " ".join((done.stderr or done.stdout).split())
    return problem(text or f"{' '.join(done.args)} ended with {done.returncode}")
