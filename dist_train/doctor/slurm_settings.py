"""SLURM's settings that matter to a training which is preempted, requeued and runs out of time.

What scontrol says is read as it is; see https://slurm.schedmd.com/slurm.conf.html
"""

import os
import re
import shutil
import subprocess
import time
from collections.abc import Mapping
from dataclasses import dataclass, field

from dist_train.doctor.finding import Section

ANSWER_SEC = 10.0
SHORT_KILL_WAIT_SEC = 30
LITTLE_TIME_SEC = 600
DEFAULT_CRED_EXPIRE = "120"
IN_A_LINE = r"(?:^|\s)([A-Z]\w*)=(\S*)"
READ = (  # of the cluster's many
    "AuthInfo",
    "JobRequeue",
    "KillOnBadExit",
    "KillWait",
    "LaunchParameters",
    "PreemptMode",
    "PreemptType",
    "ProctrackType",
    "SLURM_VERSION",
    "SlurmctldParameters",
    "TaskPlugin",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """What scontrol says of the cluster, of this job's partition and of this job."""

    cluster: dict[str, str] = field(default_factory=dict)
    partition: dict[str, str] = field(default_factory=dict)
    job: dict[str, str] = field(default_factory=dict)
    left_sec: float | None = None  # of this job's time; None: no limit, or not known
    why_not: str = ""  # they are not known


def ask_scontrol(env: Mapping[str, str]) -> Settings:
    """Ask scontrol, for some seconds at most."""
    job = env.get("SLURM_JOB_ID")
    if job is None:
        return Settings(why_not="this is no SLURM job")
    if shutil.which("scontrol") is None:
        return Settings(why_not="there is no scontrol here; `scontrol show config` has them")
    try:
        cluster = _told(r"^(\w+)\s*= (.*)$", "config")
        of_job = _told(IN_A_LINE, "--oneliner", "job", job)
        partition = _told(IN_A_LINE, "--oneliner", "partition", of_job.get("Partition", ""))
    except (OSError, subprocess.SubprocessError) as error:
        return Settings(why_not=f"scontrol does not answer ({type(error).__name__})")
    return Settings(
        cluster={k: cluster[k] for k in READ if cluster.get(k, "(null)") != "(null)"},
        partition=partition,
        job=of_job,
        left_sec=_left(of_job.get("EndTime", "")),
    )


def _told(pattern: str, *words: str) -> dict[str, str]:
    done = subprocess.run(
        ["scontrol", "show", *words],
        env=os.environ | {"SLURM_TIME_FORMAT": "standard"},
        capture_output=True,
        text=True,
        timeout=ANSWER_SEC,
        check=True,
    )
    found = re.findall(pattern, done.stdout, re.MULTILINE)
    return {name: value.strip() for name, value in found}


def _left(end: str) -> float | None:
    try:
        return time.mktime(time.strptime(end, "%Y-%m-%dT%H:%M:%S")) - time.time()
    except ValueError:  # Unknown: no limit
        return None


def judge_slurm(settings: Settings) -> Section:
    """What does each setting mean for a training that is stopped and goes on?"""
    section = Section(title="SLURM")
    cluster, partition = settings.cluster, settings.partition
    if settings.why_not:
        section.unchecked(f"SLURM's settings: {settings.why_not}")
        return section
    section.lines.append(", ".join(f"{name}={value}" for name, value in cluster.items()))
    if settings.left_sec is not None and settings.left_sec < LITTLE_TIME_SEC:
        section.note(
            f"{settings.left_sec / 60:.0f} minutes are left of this job's time: ask for more "
            "with --time"
        )
    wait = _seconds(cluster.get("KillWait", str(SHORT_KILL_WAIT_SEC)))
    (section.warning if wait < SHORT_KILL_WAIT_SEC else section.note)(
        f"a save gets {wait} s (KillWait) between SIGTERM and SIGKILL at the time limit or on "
        "requeue: give --signal=TERM@120 or more, and ask the administrators for a longer KillWait "
        "if a save takes longer"
    )
    if cluster.get("PreemptType", "none").endswith("none"):
        section.note("jobs are not preempted here (PreemptType): only time limits stop them")
    else:
        _preemption(section, cluster, partition)
    if settings.job.get("Requeue") == "0":
        section.note("SLURM may not requeue this job (Requeue=0): give #SBATCH --requeue")
    expire = re.search(r"cred_expire=(\d+)", cluster.get("AuthInfo", ""))
    section.note(
        f"a requeued job waits {expire[1] if expire else DEFAULT_CRED_EXPIRE} s before it starts "
        "again (cred_expire in AuthInfo): count that in"
    )
    _processes(section, cluster)
    return section.fine_if_nothing("nothing that would lose work")


def _preemption(section: Section, cluster: dict[str, str], partition: dict[str, str]) -> None:
    mode = partition.get("PreemptMode") or cluster.get("PreemptMode", "OFF")
    if mode == "OFF":
        section.note("jobs of this partition are not preempted (PreemptMode=OFF)")
        return
    if mode.startswith("CANCEL"):
        section.warning(
            "a preempted job is cancelled and not requeued (PreemptMode=CANCEL): chain jobs with "
            "--dependency=afterany, or ask the administrators for REQUEUE"
        )
    if "SUSPEND" in mode or "GANG" in mode:
        section.warning(
            f"a preempted job is suspended and keeps its GPU memory (PreemptMode={mode}), and "
            "ranks that wake at different times time out: ask the administrators for REQUEUE"
        )
    grace = _seconds(partition.get("GraceTime", "0"))
    section.note(
        f"a preempted job gets {grace} s (GraceTime of the partition) before KillWait begins"
        + (": ask the administrators for 120 if a save takes longer" if grace < 120 else "")
    )
    if "preempt_send_user_signal" not in cluster.get("SlurmctldParameters", ""):
        section.note(
            "--signal is not sent on preemption, SIGTERM is (no preempt_send_user_signal in "
            "SlurmctldParameters): let your batch script outlive SIGTERM, or ask for it"
        )


def _processes(section: Section, cluster: dict[str, str]) -> None:
    track, task = cluster.get("ProctrackType", ""), cluster.get("TaskPlugin", "")
    if track and not track.endswith("cgroup"):
        section.note(
            f"processes that leave their session outlive a job (ProctrackType={track}): ask the "
            "administrators for proctrack/cgroup"
        )
    if task.endswith("none"):
        section.note(
            f"ranks are not bound to cores (TaskPlugin={task}): ask the administrators for "
            "task/affinity,task/cgroup"
        )
    if cluster.get("KillOnBadExit") == "0":
        section.note(
            "a rank that fails does not end the others (KillOnBadExit=0): give srun "
            "--kill-on-bad-exit=1"
        )


def _seconds(text: str) -> int:
    """Read `30 sec`, or `120`."""
    found = re.match(r"\d+", text)
    return int(found[0]) if found else 0
