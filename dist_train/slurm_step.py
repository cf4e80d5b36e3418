"""Is this process a task of a SLURM step, and which one? Never guessed from a job's name.

A job's script, an interactive shell and a login shell that inherited SLURM's variables all carry
variables that look like a task's. What tells them apart are the step's number and the process that
SLURM started (SLURM_TASK_PID): a task is that process or descends from it.
"""

import functools
import itertools
import os
import re
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from dist_train.config import ConfigError

# Numbers from here on are no srun: the batch script, an interactive shell of salloc (slurm.h).
FIRST_SPECIAL_STEP = 0xFFFF_FFF0
FIRST_PID_NAMESPACE = 0xEFFF_FFFC  # PROC_PID_INIT_INO of Linux's include/linux/proc_ns.h
ASK_SEC = 10.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """One task of a step."""

    job: str
    step: str
    rank: int
    local_rank: int
    num_tasks: int
    tasks_here: int  # on this node
    nodes: tuple[str, ...]
    restarts: int  # of the job

    def __str__(self) -> str:
        return f"SLURM step {self.job}.{self.step}"


def find_task(env: Mapping[str, str]) -> tuple[Task | None, str]:
    """Return this process's task, or None, and in words which rule decided.

    Raises:
        ConfigError: a variable of SLURM's is no number.
    """
    if "SLURM_STEP_ID" not in env or "SLURM_PROCID" not in env:
        job = env.get("SLURM_JOB_ID")
        inside = f", in the allocation of SLURM job {job} but not started by srun" if job else ""
        return None, f"no launcher{inside}"
    job, step = env.get("SLURM_JOB_ID", "0"), env["SLURM_STEP_ID"]
    why_not = _why_no_task(env, job, step)
    if why_not is not None:
        return None, f"no launcher: {why_not}"
    nodes = env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST") or "127.0.0.1"
    num_tasks = number(env, "SLURM_STEP_NUM_TASKS", env.get("SLURM_NTASKS", "1"))
    counts = env.get("SLURM_STEP_TASKS_PER_NODE") or env.get("SLURM_TASKS_PER_NODE") or ""
    task = Task(
        job=job,
        step=step,
        rank=number(env, "SLURM_PROCID"),
        local_rank=number(env, "SLURM_LOCALID"),
        num_tasks=num_tasks,
        tasks_here=_tasks_on(counts, number(env, "SLURM_NODEID", "0"), num_tasks),
        nodes=tuple(hosts_of(nodes)),
        restarts=number(env, "SLURM_RESTART_COUNT", "0"),
    )
    return task, str(task)


def hosts_of(nodelist: str) -> list[str]:
    """Return every host of SLURM's compressed list, such as `rack[1-2]node[03-07,9],login`.

    Raises:
        ConfigError: it is no such list.
    """
    hosts = []
    for part in re.split(r",(?![^\[]*\])", nodelist.strip()):
        pieces = re.split(r"\[([^\[\]]*)\]", part)  # text, numbers, text, numbers, text
        if any(c in text for text in pieces[::2] for c in "[],"):
            raise ConfigError(f"SLURM's list of nodes {nodelist!r} cannot be read")
        try:
            choices = [
                _numbers_of(piece) if index % 2 else [piece] for index, piece in enumerate(pieces)
            ]
        except ValueError:
            raise ConfigError(f"SLURM's list of nodes {nodelist!r} cannot be read") from None
        hosts += ["".join(words) for words in itertools.product(*choices)]
    return hosts


def number(env: Mapping[str, str], name: str, default: str | None = None) -> int:
    """Return a launcher's variable as a number. Raises ConfigError if it is none."""
    text = env.get(name, default)
    if text is None or not text.lstrip("-").isdigit():
        raise ConfigError(f"the launcher's variable {name} is {text!r}: it must be a whole number")
    return int(text)


def _numbers_of(text: str) -> list[str]:
    """Return `03-05,9` as 03, 04, 05, 9."""
    found = []
    for part in text.split(","):
        first, _, last = part.partition("-")
        width = len(first)
        found += [f"{n:0{width}}" for n in range(int(first), int(last or first) + 1)]
    return found


def _tasks_on(counts: str, node: int, default: int) -> int:
    """Read a node's number of tasks from SLURM's `2(x3),1`."""
    expanded: list[int] = []
    for part in filter(None, counts.split(",")):
        found = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part.strip())
        if found:
            expanded += [int(found.group(1))] * int(found.group(2) or 1)
    return expanded[node] if node < len(expanded) else default


def _why_no_task(env: Mapping[str, str], job: str, step: str) -> str | None:
    """Return why this process is no task of the step that its variables name, or None."""
    if not step.isdigit() or int(step) >= FIRST_SPECIAL_STEP:
        return f"SLURM job {job}'s script or interactive shell is no srun"
    started = env.get("SLURM_TASK_PID", "")
    if not started.isdigit():
        return None
    own = os.getpid()
    if int(started) == own:
        return None
    if int(started) in ancestors(own):
        if "SLURM_PTY_PORT" in env:
            return f"an interactive shell in SLURM step {job}.{step} (srun --pty)"
        return None
    # In a container's own PID namespace SLURM's number means nothing; there the job is asked for.
    outside = _pid_namespace() == FIRST_PID_NAMESPACE
    if outside or not _is_running(job):
        return f"the variables of SLURM step {job}.{step} are left over, this is no task of it"
    return None


def ancestors(pid: int) -> list[int]:
    """Return the processes that started `pid`, nearest first, as far as they can be seen."""
    found: list[int] = []
    while pid > 1 and len(found) < 100:
        try:
            stat = Path(f"/proc/{pid}/stat").read_text()
        except OSError:
            break
        pid = int(stat.rpartition(")")[2].split()[1])
        found.append(pid)
    return found


def _pid_namespace() -> int:
    try:
        return Path("/proc/self/ns/pid").stat().st_ino
    except OSError:
        return 0


@functools.cache
def _is_running(job: str) -> bool:
    """Say whether SLURM has this job running; True if nobody can be asked."""
    words = ["squeue", "--noheader", "--states=RUNNING,COMPLETING", "--format=%A", f"--jobs={job}"]
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=ASK_SEC, check=False)
    except (OSError, subprocess.SubprocessError):
        return True
    if done.returncode != 0:
        return "Invalid job id" not in done.stderr
    return bool(done.stdout.split())
