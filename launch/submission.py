"""The job as submitit writes and submits it; the only file that knows submitit."""

import contextlib
import fcntl
import io
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dist_train.config import ConfigError
from launch import scontrol
from launch.job_record import FOLDER, LOCK
from launch.job_settings import JobSettings
from launch.payload import Payload
from launch.sbatch_options import left_aside

if TYPE_CHECKING:
    from submitit.slurm.slurm import SlurmExecutor

# On preemption and at the end of its time SLURM signals this shell, too: it must outlive the
# ranks, which are saving.
TRAP = "trap : TERM USR1 USR2 CONT"
# submitit always asks for a signal. It goes to the shell, which ignores it: the ranks know when
# the job's time is over, and how long their save takes.
SIGNAL = "B:USR2@60"
OF_A_CLUSTER = ("SLURM_CONF", "SLURM_CONF_SERVER", "SLURM_CLUSTERS", "SLURM_JWT")


@dataclass(frozen=True, kw_only=True, slots=True)
class Submission:
    """What becomes one job, or one array."""

    name: str
    settings: JobSettings
    payloads: tuple[Payload, ...]  # several: an array
    jobs_dir: Path
    environment: tuple[tuple[str, str], ...] = ()  # variables of the job
    dependency: str | None = None  # instead of that of the settings

    @property
    def output(self) -> str:
        """The file of a job's output, with SLURM's placeholders for its id."""
        return str(self.jobs_dir.absolute() / ("%A_%a.out" if self.is_array else "%j.out"))

    @property
    def is_array(self) -> bool:
        return len(self.payloads) > 1


def start_command(settings: JobSettings) -> tuple[str, ...]:
    """Return the command that starts the ranks from the job's first node.

    Never --gpus-per-task or CUDA_VISIBLE_DEVICES: every rank sees all GPUs of its node, which the
    fast paths between GPUs need, and takes that of its local number.
    """
    ranks, cores = settings.ranks_per_node, settings.cpus_per_task
    one = settings.shape == "torchrun"  # task on each node
    words = ["srun", "--kill-on-bad-exit=1", f"--ntasks-per-node={1 if one else ranks}"]
    if cores is not None:  # since SLURM 22.05 srun does not take it over from sbatch
        words.append(f"--cpus-per-task={cores * ranks if one else cores}")
    words += [*settings.srun_arg, settings.python or sys.executable]
    words += ["-m", "launch.cli", "run", "--nproc", str(ranks)] if one else ["-m", "dist_train"]
    return tuple(words)


def script_of(submission: Submission) -> str:
    """Return the sbatch script, byte for byte what `submit` hands to sbatch.

    Needs no SLURM. Raises ConfigError without submitit.
    """
    executor = _executor(submission)
    if submission.is_array:
        executor.parameters["map_count"] = len(submission.payloads)
    return executor._make_submission_file_text(executor._submitit_command_str, uid="")


def submit(submission: Submission) -> list[str]:
    """Hand the job to sbatch; returns its id, or those of an array's elements.

    Raises:
        ConfigError: submitit or SLURM is missing, or sbatch refuses; in its words.
        OSError: the folder of the jobs cannot be written.
    """
    for command in ("sbatch", "srun"):
        if shutil.which(command) is None:
            raise ConfigError(
                f"{command} is not here: submit where SLURM's commands are (--dry-run shows the "
                "job anywhere, dist-train run trains without SLURM)"
            )
    executor = _executor(submission)
    folder = executor.folder
    folder.mkdir(parents=True, exist_ok=True)
    with _alone_in(folder):
        before = set(folder.iterdir())
        try:
            # submitit writes on standard error what it raises.
            with _alone_with(script_of(submission)), contextlib.redirect_stderr(io.StringIO()):
                jobs = executor.submit_array(submission.payloads)
        except (RuntimeError, subprocess.SubprocessError) as refusal:
            for path in set(folder.iterdir()) - before:
                path.unlink()
            raise _refused(str(refusal)) from None
    for job in jobs:
        job.paths.submitted_pickle.chmod(0o600)  # a word of the command can be a secret
    return [job.job_id for job in jobs]


def submit_again(job_id: str, *, jobs_dir: Path, cwd: str) -> str | None:
    """Hand the script of an earlier job to sbatch once more; returns the new job's id.

    Returns None if the earlier job's files are gone.

    Raises:
        ConfigError: there is no sbatch, or it refuses; in its words.
    """
    folder, (array, _, index) = (jobs_dir / FOLDER).absolute(), job_id.partition("_")
    script, pickled = folder / f"{array}_submission.sh", folder / f"{job_id}_submitted.pkl"
    if not script.is_file() or not pickled.is_file():
        return None
    words = ["sbatch", "--parsable", *([f"--array={index}"] if index else []), str(script)]
    try:
        with _alone_with(script.read_text()):
            done = subprocess.run(words, cwd=cwd, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as refusal:
        told = getattr(refusal, "stderr", None) or str(refusal)
        raise _refused(told) from None
    new = done.stdout.partition(";")[0].strip()  # "78;cluster"
    shutil.copy2(script, folder / f"{new}_submission.sh")
    copy = folder / f"{new}_{index}_submitted.pkl" if index else folder / f"{new}_submitted.pkl"
    shutil.copy2(pickled, copy.with_suffix(".part"))
    copy.with_suffix(".part").rename(copy)  # the job waits a minute for it, and takes it whole
    return f"{new}_{index}" if index else new


def _executor(submission: Submission) -> "SlurmExecutor":
    try:
        from submitit.slurm.slurm import SlurmExecutor
    except ImportError as missing:
        raise ConfigError(
            f"submitting needs a package that is missing ({missing}): pip install submitit, or "
            "submit a script of slurm/ with sbatch"
        ) from None

    class WithoutSlurm(SlurmExecutor):
        """One that can write its script on a machine without srun, too."""

        @classmethod
        def affinity(cls) -> int:
            return 1

    executor = WithoutSlurm(submission.jobs_dir / FOLDER)
    executor.update_parameters(**_parameters(submission))
    return executor


def _parameters(submission: Submission) -> dict[str, Any]:
    """Return what submitit is told; what is None it leaves out."""
    settings = submission.settings
    ranks, cores = settings.ranks_per_node, settings.cpus_per_task
    one = settings.shape == "torchrun"  # task on each node, with the cores of all its ranks
    return {
        "job_name": submission.name,
        "use_srun": False,
        "nodes": settings.node_counts[0],
        "ntasks_per_node": 1 if one else ranks,
        "cpus_per_task": cores * ranks if one and cores is not None else cores,
        "gpus_per_node": settings.gpus_per_node if settings.gpus else None,
        "time": settings.minutes,
        "mem": settings.mem,
        "partition": settings.partition,
        "account": settings.account,
        "qos": settings.qos,
        "constraint": settings.constraint,
        "exclude": settings.exclude,
        "nodelist": settings.nodelist,
        "comment": settings.comment,
        "dependency": submission.dependency or settings.dependency,
        "exclusive": settings.exclusive or None,
        "array_parallelism": settings.array_parallelism or len(submission.payloads),
        "wckey": None,
        "stderr_to_stdout": True,
        "setup": _setup(submission),
        "additional_parameters": _additional(submission),
    }


def _additional(submission: Submission) -> dict[str, Any]:
    """Return the options of sbatch that submitit has no name for, or has set otherwise."""
    settings = submission.settings
    options: dict[str, Any] = {"requeue": True, "signal": SIGNAL, "output": submission.output}
    if len(settings.node_counts) > 1:
        options["nodes"] = settings.nodes
    if settings.reservation is not None:
        options["reservation"] = settings.reservation
    if settings.is_unlimited:
        options["time"] = "UNLIMITED"
    for word in settings.sbatch_arg:
        name, equals, value = word.removeprefix("--").partition("=")
        options[name] = value if equals else True
    if "no-requeue" in options:
        del options["requeue"]
    return options


def _setup(submission: Submission) -> list[str]:
    lines = [TRAP, *submission.settings.setup]
    for name, value in submission.environment:
        more = '"${PYTHONPATH:+:$PYTHONPATH}"' if name == "PYTHONPATH" else ""
        lines.append(f"export {name}={shlex.quote(value)}{more}")
    return lines


@contextlib.contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Hold a lock: what appears in the folder meanwhile is this process's."""
    with (folder / LOCK).open("ab") as file:
        fcntl.lockf(file, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def _alone_with(script: str) -> Iterator[None]:
    """Hide the variables that sbatch would obey rather than the script.

    Those of an allocation, too: sbatch would hand them on, and srun obey them.
    """
    names = [name for name in os.environ if name.startswith("SLURM_") and name not in OF_A_CLUSTER]
    names += left_aside(script, os.environ)
    hidden = {name: os.environ.pop(name) for name in names}
    try:
        yield
    finally:
        os.environ.update(hidden)


def _refused(text: str) -> ConfigError:
    """Return what sbatch said, in one line."""
    lines = [line.strip().removeprefix("sbatch: ") for line in text.splitlines()]
    told = "; ".join(dict.fromkeys(line.removeprefix("error: ") for line in lines if line))
    if isinstance(scontrol.problem(told), scontrol.NoAnswerError):
        return ConfigError(f"SLURM does not answer ({told}): nothing is submitted, try again later")
    return ConfigError(f"SLURM refuses the job: {told}")
