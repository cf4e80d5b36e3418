"""Jobs on the test cluster: submitted as a user would, disturbed, and looked at."""

import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch.scontrol import RECORD, RUNNING, Job, read_job
from tests.settings import SMALL
from tests.slurm.cluster import Cluster
from tests.test_torchrun import REPOSITORY

STEPS = 40
# A step waits, and takes no core: the machine is busy enough with starting ranks.
PACED = (
    *SMALL,
    "model.factory=tests.nets:paced_net",
    "model.args.sec=0.2",
    "log_every=1",
    f"train.steps={STEPS}",
    "checkpoint.every_steps=5",
    "parallel.start_timeout_sec=120",
)
SHAPES = {"A": "slurm/torchrun.sbatch", "B": "slurm/train.sbatch"}


@dataclass(frozen=True, kw_only=True)
class Submitted:
    """A job of the cluster, and the run that it works on."""

    cluster: Cluster
    job_id: str
    run_dir: Path
    output: Path

    def job(self) -> Job:
        """Return what SLURM says of it."""
        text = self.cluster.run("scontrol", "show", "job", self.job_id)
        assert "JobId=" in text, text
        return read_job(next(filter(None, RECORD.split(text))))

    def text(self) -> str:
        """Return its output so far."""
        return self.output.read_text(errors="replace") if self.output.exists() else "(no output)"

    def status(self) -> dict[str, Any]:
        """Return status.json."""
        return _json(self.run_dir / "status.json")

    def summary(self) -> dict[str, Any]:
        """Return summary.json."""
        return _json(self.run_dir / "summary.json")

    def events(self, kind: str) -> list[dict[str, Any]]:
        """Return the events of one kind."""
        path = self.run_dir / "events.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return [event for event in map(json.loads, lines) if event["event"] == kind]

    def steps(self) -> list[int]:
        """Return the steps that metrics.jsonl holds, in its order."""
        path = self.run_dir / "metrics.jsonl"
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        records = [json.loads(line) for line in lines if line.endswith("\n")]
        return [record["step"] for record in records if "train/loss" in record]

    def wait_for_step(self, step: int, *, attempt: int = 0, timeout_sec: float = 120.0) -> None:
        """Wait until an attempt from `attempt` on has logged `step`."""

        def there() -> bool:
            reached = (self.steps() or [0])[-1] >= step
            assert self.job().state not in ("COMPLETED", "FAILED"), f"it ended:\n{self.text()}"
            return reached and self.status().get("attempt", -1) >= attempt

        self.wait_until(there, f"step {step} of attempt {attempt}", timeout_sec)

    def wait_for_end(self, timeout_sec: float = 180.0) -> Job:
        """Wait until SLURM has ended it for good."""
        passing = (*RUNNING, "PENDING", "COMPLETING", "CONFIGURING", "REQUEUED", "PREEMPTED")
        passing += ("NODE_FAIL",)  # it is put back into the queue
        self.wait_until(lambda: self.job().state not in passing, "its end", timeout_sec)
        return self.job()

    def wait_until(self, there: Callable[[], bool], what: str, timeout_sec: float = 60.0) -> None:
        """Wait for something; on failure show the job's output."""
        end = time.monotonic() + timeout_sec
        while not there():
            if time.monotonic() > end:
                late = f"{what} did not come in {timeout_sec:.0f} s"
                raise AssertionError(f"{late}:\n{self.text()}\n{self.cluster.state()}")
            time.sleep(0.1)

    def processes(self, word: str = "dist_train") -> dict[int, dict[str, str]]:
        """Return {process id: its environment} of the job's processes with a word in their line."""
        found = {}
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                words = (entry / "cmdline").read_bytes().decode(errors="replace").split("\0")
                lines = (entry / "environ").read_bytes().decode(errors="replace").split("\0")
            except OSError:
                continue
            env = {name: value for name, _, value in (line.partition("=") for line in lines)}
            mine = env.get("SLURM_CONF") == self.cluster.env["SLURM_CONF"]
            if mine and env.get("SLURM_JOB_ID") == self.job_id and word in words:
                found[int(entry.name)] = env
        return found

    def rank(self, rank: int) -> int:
        """Return the process id of a rank."""
        for pid, env in self.processes().items():
            if env.get("RANK", env.get("SLURM_PROCID")) == str(rank) and _is_rank(pid):
                return pid
        raise AssertionError(f"rank {rank} is not there:\n{self.text()}")


def submit(
    cluster: Cluster,
    shape: str,
    folder: Path,
    *words: str,
    nodes: int | str = 2,
    tasks: int = 2,
    options: tuple[str, ...] = (),
) -> Submitted:
    """Submit one of the project's scripts with plain sbatch."""
    run_dir, output = folder / "run", folder / "job.out"
    per_node = ("--ntasks-per-node=1", f"--cpus-per-task={tasks}")
    if shape == "B":
        per_node = (f"--ntasks-per-node={tasks}", "--cpus-per-task=1")
    command = ["sbatch", "--parsable", f"--nodes={nodes}", *per_node, "--gpus-per-node=0"]
    command += ["--time=10", f"--output={output}", f"--chdir={folder}", *options]
    variables = {"PYTHON": sys.executable, "NPROC_PER_NODE": str(tasks)}
    variables["PYTHONPATH"] = str(REPOSITORY)
    told = cluster.run(
        *command, str(REPOSITORY / SHAPES[shape]), f"run_dir={run_dir}", *words, **variables
    )
    job_id = told.strip().splitlines()[-1]
    assert job_id.isdigit(), told
    return Submitted(cluster=cluster, job_id=job_id, run_dir=run_dir, output=output)


def _is_rank(pid: int) -> bool:
    """Say whether a process is `python [-u] -m dist_train`."""
    try:
        return b"dist_train" in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[1:4]
    except OSError:
        return False


def _json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return {}


def end_leftovers(job: Submitted) -> None:
    """Cancel a job that a failed test left."""
    job.cluster.run("scancel", job.job_id)
