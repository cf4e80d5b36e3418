"""Who started this process? Asked in every place of a real cluster where a user may type."""

import json
import shlex
import sys
from pathlib import Path

import pytest

from tests.settings import SMALL
from tests.slurm.cluster import Cluster

pytestmark = pytest.mark.slurm

TRAIN = f"{sys.executable} -m dist_train"
TORCHRUN = (
    f"{sys.executable} -m torch.distributed.run --standalone --nproc-per-node=2 -m dist_train"
)


def words(folder: Path) -> str:
    return shlex.join([*SMALL, f"run_dir={folder / 'run'}", "train.steps=2"])


def world_size(folder: Path) -> int:
    return json.loads((folder / "run" / "summary.json").read_text())["world_size"]


@pytest.mark.parametrize(
    ("before", "command", "ranks", "rule"),
    [  # "; true": a shell that has nothing more to do would become the command
        ("salloc -N1 -n2", TRAIN, 1, "no launcher, in the allocation of SLURM job"),
        ("salloc -N1 -n2", TORCHRUN, 2, "torchrun"),
        ("salloc -N2 --ntasks-per-node=1", f"srun {TRAIN}", 2, "SLURM step"),
        ("srun -N1 -n1 --pty", TRAIN, 1, "SLURM step"),
        ("srun -N1 -n1 --pty bash -c", f"{TRAIN}; true", 1, "an interactive shell in SLURM step"),
        ("srun -N1 -n1 --pty bash -c", f"{TORCHRUN}; true", 2, "torchrun"),
        ("srun -N1 -n2 --job-name=interactive", TRAIN, 2, "SLURM step"),
    ],
)
def test_the_rule_that_was_used_is_told_and_right(
    before: str, command: str, ranks: int, rule: str, cluster: Cluster, tmp_path: Path
) -> None:
    first, semicolon, rest = command.partition(";")
    line = f"{first} {words(tmp_path)}{semicolon}{rest}"
    if before.endswith("-c"):
        line = shlex.quote(line)
    whole = f"{before} {line}"
    if "--pty" in before:  # srun wants a terminal
        whole = f"script -qec {shlex.quote(whole)} /dev/null"
    output = cluster.run("bash", "-c", whole, OMP_NUM_THREADS="1")
    assert world_size(tmp_path) == ranks, output
    told = "1 rank" if ranks == 1 else f"{ranks} ranks"
    assert f"{told}, started by " in output
    assert rule in output


def test_variables_left_over_in_a_login_shell(cluster: Cluster, tmp_path: Path) -> None:
    kept = cluster.run("srun", "-N1", "-n1", "bash", "-c", "env | grep ^SLURM_")
    variables = dict(line.split("=", 1) for line in kept.splitlines() if "=" in line)
    assert variables["SLURM_STEP_ID"] == "0"
    cluster.run("scancel", variables["SLURM_JOB_ID"])
    output = cluster.run("bash", "-c", f"{TRAIN} {words(tmp_path)}", **variables)
    assert world_size(tmp_path) == 1, output
    assert "are left over, this is no task of it" in output


@pytest.mark.parametrize("flags", ["-n2 -c1", "--ntasks-per-node=2 -N1"])
def test_more_tasks_than_nodes_are_refused_by_run(
    flags: str, cluster: Cluster, tmp_path: Path
) -> None:
    command = f"srun {flags} {sys.executable} -m launch.cli run {words(tmp_path)}"
    output = cluster.run("bash", "-c", command)
    assert "use srun --ntasks-per-node=1, or one task for each GPU" in output
    assert not (tmp_path / "run").exists()
