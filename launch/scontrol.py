"""What SLURM says of jobs, and what is asked of it: scontrol, scancel and sacct as functions.

Only facts that SLURM itself holds: whether a job was preempted, cancelled or out of time is never
guessed from a clock. https://slurm.schedmd.com/scontrol.html, https://slurm.schedmd.com/sacct.html
"""

import os
import re
import shutil
import subprocess
import time
from dataclasses import dataclass

TIMEOUT_SEC = 60.0  # a busy controller answers late
RUNNING = ("RUNNING", "SUSPENDED", "STOPPED", "RESIZING", "SIGNALING", "STAGE_OUT")
WAITING = ("PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SPECIAL_EXIT")
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
    """SLURM refused, or does not answer."""


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
    found = _ask("scontrol", "show", "job", "--oneliner", job_id)
    if found.returncode == 0:
        return [read_job(line) for line in found.stdout.splitlines() if "JobId=" in line]
    if "Invalid job id" in found.stderr:
        return _from_accounting(job_id)
    raise SlurmError(_told(found))


def job_of(job_id: str) -> Job | None:
    """Return one job, or one element of an array; None if SLURM does not know it any more."""
    found = jobs_of(job_id)
    return found[0] if found else None


def read_job(line: str) -> Job:
    """Read a line of `scontrol show job --oneliner`."""
    fields = dict(re.findall(r"(?:^|\s)([A-Za-z]\w*)=(\S*)", line))
    job_id = fields["JobId"]
    if "ArrayTaskId" in fields:
        tasks = fields["ArrayTaskId"]
        tasks = tasks if tasks.isdigit() else f"[{tasks}]"
        job_id = f"{fields['ArrayJobId']}_{tasks}"
    reason = fields.get("Reason", "")
    return Job(
        job_id=job_id,
        state=fields["JobState"],
        reason="" if reason == "None" else reason,
        name=fields.get("JobName", ""),
        restarts=int(fields.get("Restarts", "0")),
        may_requeue=fields.get("Requeue") == "1",
        end_time=_seconds(fields.get("EndTime", "")),
        nodes=fields.get("NodeList", "").replace("(null)", ""),
        exit_code=fields.get("ExitCode", ""),
        output=fields.get("StdOut", ""),
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
        raise SlurmError(_told(listed))
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
        raise SlurmError(_told(found))
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
    columns = "JobID,State,JobName,Restarts,NodeList,ExitCode"
    found = _ask("sacct", "-X", "-n", "-P", "-j", job_id, "-o", columns)
    jobs = []
    for line in found.stdout.splitlines() if found.returncode == 0 else []:
        name, state, title, restarts, nodes, code = (line.split("|") + [""] * 6)[:6]
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
        raise SlurmError(_told(done))


def _ask(*words: str) -> "subprocess.CompletedProcess[str]":
    try:
        return subprocess.run(
            words,
            env=os.environ | {"SLURM_TIME_FORMAT": "standard"},
            capture_output=True,
            text=True,
            timeout=TIMEOUT_SEC,
            check=False,
        )
    except FileNotFoundError:
        raise SlurmError(f"{words[0]} is not here: run this where SLURM's commands are") from None
    except subprocess.TimeoutExpired:
        raise SlurmError(f"{' '.join(words)}: no answer within {TIMEOUT_SEC:.0f} s") from None


def _told(done: "subprocess.CompletedProcess[str]") -> str:
    """Return what a refused command said, in one line."""
    text = " ".join((done.stderr or done.stdout).split())
    return text or f"{' '.join(done.args)} ended with {done.returncode}"
