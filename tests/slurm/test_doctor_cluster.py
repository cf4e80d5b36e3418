"""`dist-train doctor` on a real cluster: a sound one has no problem, and each sickness is named."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.slurm.cluster import Cluster, running_cluster
from tests.slurm.sicknesses import (
    LongCable,
    dropped,
    filled,
    nameless,
    small_disk,
    throttled,
    why_no_quota,
    without_locks,
)
from tests.test_torchrun import REPOSITORY

pytestmark = pytest.mark.slurm

NODES = 3  # of two, nobody could say which is the sick one
PORT = 17123
WRONG_CLOCK = REPOSITORY / "benchmarks/reliability/wrong_clock"
DOCTOR = [sys.executable, "-m", "launch.cli", "doctor", "--quick", "--wait=90"]


@dataclass(frozen=True, kw_only=True)
class Examined:
    """How an examination ended."""

    exit_code: int
    text: str
    told: dict[str, Any]

    def errors(self) -> list[str]:
        """Return the sentences of all problems."""
        sections = self.told["sections"]
        return [f["text"] for s in sections for f in s["findings"] if f["level"] == "error"]


@pytest.fixture(scope="module")
def disk(slurm_is_here: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with small_disk(tmp_path_factory.mktemp("disks") / "small", "2m") as folder:
        yield folder


@pytest.fixture(scope="module")
def cluster(disk: Path) -> Iterator[Cluster]:
    """Start one of its own: with fake GPUs, and with the small disk in every node."""
    with running_cluster(num_nodes=NODES, cpus=2, gpus=2) as running:
        yield running


def examine(
    cluster: Cluster,
    folder: Path,
    *options: str,
    run_dir: Path | None = None,
    before: str = "",
    **variables: str,
) -> Examined:
    """Run the doctor in a step of its own; `before` is done by each task's shell first."""
    report = folder / "report.json"
    words = [*DOCTOR, f"--run-dir={run_dir or folder / 'runs'}", f"--json={report}"]
    step = ["srun", f"--nodes={NODES}", "--ntasks-per-node=1", *options]
    shell = ["bash", "-c", f'{before}\nexec "$@"', "doctor"] if before else []
    env = os.environ | cluster.env | {"PYTHONPATH": str(REPOSITORY)} | variables
    done = subprocess.run(
        [*step, *shell, *words],
        env=env | {"OMP_NUM_THREADS": "1", "MASTER_PORT": str(PORT)},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    text = done.stdout + done.stderr
    (folder / "report.txt").write_text(text)
    assert report.exists(), text
    return Examined(exit_code=done.returncode, text=text, told=json.loads(report.read_text()))


def the_problem(found: Examined, pattern: str) -> None:
    """Check that a problem of this kind was found."""
    assert found.exit_code == 1, found.text
    assert any(re.search(pattern, sentence) for sentence in found.errors()), found.text


def test_a_sound_cluster_has_no_problem(cluster: Cluster, tmp_path: Path) -> None:
    found = examine(cluster, tmp_path, "--nodes=2", "--ntasks-per-node=2")
    assert (found.exit_code, found.errors()) == (0, []), found.text
    facts = found.told["facts"]
    assert len(facts["machines"]) == len(facts["speeds"]) == 4
    assert [link["outcome"] for link in facts["links"]] == ["reached"] * 2
    assert facts["traffic"]["0"]["reductions"]
    assert facts["traffic"]["0"]["pairs"][0]["nodes"] == ["node1", "node2"]
    assert [view["got_lock"] for view in facts["views"]] == [None, False]
    assert facts["settings"]["cluster"]["KillWait"] == "5 sec"


def test_a_node_whose_name_the_others_cannot_resolve(cluster: Cluster, tmp_path: Path) -> None:
    with nameless(cluster, "node2", on=[1, 3]):
        found = examine(cluster, tmp_path)
    the_problem(found, "node1 and node3 cannot find node2, though its address can be reached: the")


def test_a_first_node_whose_name_another_cannot_resolve(cluster: Cluster, tmp_path: Path) -> None:
    with nameless(cluster, "node1", on=[3]):
        found = examine(cluster, tmp_path)
    the_problem(
        found, "rank 2 on node3 started, but cannot reach rank 0 at node1:.*does not resolve"
    )


def test_a_port_that_is_blocked(cluster: Cluster, tmp_path: Path) -> None:
    with dropped(cluster, PORT, on=1):
        found = examine(cluster, tmp_path)
    the_problem(
        found,
        rf"ranks 1 and 2 on node2 and node3 started, but cannot reach rank 0 at node1:{PORT} "
        r"\(.*\): no answer: a firewall drops it",
    )


def test_two_ranks_bound_to_one_gpu(cluster: Cluster, tmp_path: Path) -> None:
    words = ("--nodes=2", "--ntasks-per-node=2", "--gpus-per-node=2")
    found = examine(cluster, tmp_path, *words, "--gpu-bind=map_gpu:0,0")
    the_problem(found, r"local ranks 0 and 1 on node1 and node2 are by SLURM's binding on one GPU")
    assert "leave out --gpu-bind=map_gpu:0,0 and give --gpus-per-node=2" in " ".join(found.errors())


def test_a_node_whose_cores_are_throttled(cluster: Cluster, tmp_path: Path) -> None:
    reason = why_no_quota()
    if reason is not None:
        pytest.skip(reason)
    with throttled(cluster, 3, 0.2):
        found = examine(cluster, tmp_path)
    the_problem(
        found,
        r"node3 (computes|copies memory) at \d+% of the others' speed: its cgroup's quota of 0.2 ",
    )


def test_a_link_with_100_ms_of_delay(cluster: Cluster, tmp_path: Path) -> None:
    with LongCable(cluster, 3, 0.1) as cable:
        found = examine(cluster, tmp_path)
    assert cable.num_carried > 100
    the_problem(found, r"a message between node3 and any other node takes \d+ ms, one between oth")


def test_a_clock_that_is_off_by_five_minutes(cluster: Cluster, tmp_path: Path) -> None:
    wrong = f"export PYTHONPATH={WRONG_CLOCK}:$PYTHONPATH WRONG_CLOCK_SEC=300"
    before = f'if [ "$SLURMD_NODENAME" = node2 ]; then {wrong}; fi'
    found = examine(cluster, tmp_path, before=before)
    the_problem(found, r"node2's clock is 300 s ahead of the median of the nodes: have chrony")


def test_a_disk_that_is_full(cluster: Cluster, disk: Path, tmp_path: Path) -> None:
    with filled(disk):
        found = examine(cluster, tmp_path, run_dir=disk)
    the_problem(found, rf"the disk of {disk} is full \(No space left on device: 0 B free of 2 MiB")


def test_a_file_system_without_working_locks(cluster: Cluster, tmp_path: Path) -> None:
    found = examine(cluster, tmp_path, LD_PRELOAD=str(without_locks(tmp_path)))
    the_problem(found, "a lock in .* does not keep out another process of the same node, so that")
