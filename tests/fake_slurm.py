"""SLURM's commands as small scripts: they keep how they were called, and jobs as files."""

import json
import os
import stat
from pathlib import Path

import pytest

# Each call is kept as a line of JSON: the command's name, then its words.
SCRIPT = """#!{python} -IS
import json, os, re, sys
folder = {folder!r}
name, words = os.path.basename(sys.argv[0]), sys.argv[1:]
with open(f"{{folder}}/calls", "a") as file:
    file.write(json.dumps([name, *words]) + "\\n")
if os.path.exists(f"{{folder}}/{{name}}.refuses"):
    times, _, text = open(f"{{folder}}/{{name}}.refuses").read().partition(" ")
    if times == "1":
        os.unlink(f"{{folder}}/{{name}}.refuses")
    else:
        open(f"{{folder}}/{{name}}.refuses", "w").write(f"{{int(times) - 1}} {{text}}")
    sys.exit(text)

def job_file(job_id):
    return f"{{folder}}/jobs/{{job_id}}"

def lines(job_id):
    names = sorted(os.listdir(f"{{folder}}/jobs"))
    mine = [n for n in names if n == job_id or n.startswith(f"{{job_id}}_")]
    return [open(job_file(n)).read() for n in mine]

def change(job_id, old, new):
    text = open(job_file(job_id)).read()
    assert re.search(old, text), (job_id, old, text)
    open(job_file(job_id), "w").write(re.sub(old, new, text))

{body}
"""
BODIES = {
    "sbatch": """
number = 77 + sum('"sbatch"' in line for line in open(f"{folder}/calls")) - 1
open(f"{folder}/script_{number}", "w").write(open(words[-1]).read())
open(f"{folder}/environment_{number}", "w").write(json.dumps(dict(os.environ)))
print(number if "--parsable" in words else f"Submitted batch job {number}")
""",
    "srun": "",
    "scontrol": """
if words[:2] == ["show", "job"]:
    found = lines(words[-1])
    if not found:
        sys.exit("slurm_load_jobs error: Invalid job id specified")
    print("".join(found), end="")
elif words[0] == "update":
    change(words[1].partition("=")[2], r"Requeue=\\d", words[2])
elif words[0] == "requeue":
    change(words[1], r"JobState=\\w+ Reason=\\w+", "JobState=PENDING Reason=BeginTime")
""",
    # It prints fixed columns, as squeue --Format does; unknown jobs among known ones are left out.
    "squeue": """
wanted = next(w for w in words if w.startswith("--jobs=")).partition("=")[2].split(",")
columns = next(w for w in words if w.startswith("--Format=")).partition("=")[2].split(",")
found = [line for job_id in wanted for line in lines(job_id)]
if not found and len(wanted) == 1:
    sys.exit("slurm_load_jobs error: Invalid job id specified")
for line in found:
    fields = dict(re.findall(r"(\\w+)=(\\S*)", line))
    task = fields.get("ArrayTaskId")
    values = {
        "JobArrayID": fields["ArrayJobId"] + "_" + task if task else fields["JobId"],
        "State": fields["JobState"], "RestartCnt": fields["Restarts"], "Reason": fields["Reason"],
    }
    for column in columns:
        name, width = column.split(":")
        print(values[name].ljust(int(width))[: int(width)], end="")
    print()
""",
    "scancel": "",
    "sacct": "sys.exit('Slurm accounting storage is disabled')",
}


class FakeSlurm:
    """Puts the commands first in PATH; jobs are what a test says they are."""

    def __init__(self, folder: Path, python: str, patch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        (folder / "bin").mkdir(parents=True)
        (folder / "jobs").mkdir()
        (folder / "calls").touch()
        for name, body in BODIES.items():
            path = folder / "bin" / name
            path.write_text(SCRIPT.format(python=python, folder=str(folder), body=body))
            path.chmod(path.stat().st_mode | stat.S_IXUSR)
        patch.setenv("PATH", f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}")

    def job(
        self,
        job_id: str,
        state: str,
        *,
        reason: str = "None",
        restarts: int = 0,
        may_requeue: bool = True,
        end_time: str = "Unknown",
    ) -> None:
        """Let SLURM know a job, or an element of an array."""
        array, _, task = job_id.partition("_")
        element = f"ArrayJobId={array} ArrayTaskId={task} " if task else ""
        written = self.folder / "job"
        written.write_text(
            f"JobId={array} {element}JobName=x\n"
            f"   JobState={state} Reason={reason} Dependency=(null)\n"
            f"   Requeue={int(may_requeue)} Restarts={restarts} BatchFlag=1 ExitCode=0:0\n"
            f"   StartTime=Unknown EndTime={end_time} Deadline=N/A\n"
            "   NodeList=(null)\n\n"
        )
        written.rename(self.folder / "jobs" / job_id)  # whole, whoever asks meanwhile

    def forget(self, job_id: str) -> None:
        """Let SLURM forget a job, as it does some minutes after its end."""
        (self.folder / "jobs" / job_id).unlink()

    def refuse(self, command: str, text: str, *, times: int = 0) -> None:
        """Let a command fail with a text from now on, or so many times."""
        (self.folder / f"{command}.refuses").write_text(f"{times} {text}")

    def calls(self, *names: str) -> list[list[str]]:
        """Return the calls of these commands so far, in order."""
        lines = (self.folder / "calls").read_text().splitlines()
        return [call for call in map(json.loads, lines) if call[0] in names]

    def scripts(self) -> list[str]:
        """Return what sbatch was given, in order."""
        return [path.read_text() for path in sorted(self.folder.glob("script_*"))]

    def environments(self) -> list[dict[str, str]]:
        """Return sbatch's environments, in order: a job inherits them."""
        paths = sorted(self.folder.glob("environment_*"))
        return [json.loads(path.read_text()) for path in paths]
