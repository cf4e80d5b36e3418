"""The benchmark across the nodes of an allocation."""

import json
import shlex
import sys
from pathlib import Path

import pytest

from tests.settings import SMALL
from tests.slurm.cluster import Cluster

pytestmark = pytest.mark.slurm


def test_an_allocation_is_measured_on_one_node_and_on_two(cluster: Cluster, tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    options = ["--nodes", "1,2", "--scaling", "weak", "--repeats", "2", "--seconds", "0.5"]
    options += ["--json", str(report), "--work-dir", str(tmp_path)]
    bench = [sys.executable, "-m", "launch.cli", "bench", *options, *SMALL]
    line = f"salloc -N2 --ntasks-per-node=1 {shlex.join(bench)}"
    output = cluster.run("bash", "-c", line, OMP_NUM_THREADS="1")
    assert report.is_file(), output
    setups = json.loads(report.read_text())["setups"]
    assert [(r["num_ranks"], r["num_nodes"], r["batch_size"]) for r in setups] == [
        (1, 1, 12),
        (2, 2, 12),
    ]
    [check] = json.loads(report.read_text())["scale"]["checked"]
    assert check["latency_sec"] > 0
