"""--dry-run says what would happen, for any number of ranks, and does none of it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.settings import SMALL

pytestmark = pytest.mark.slow


REPOSITORY = Path(__file__).parents[1]
WORDS = ("run_dir=run", "train.epochs=2", "train.micro_batch_size=2", "optim.lr_scaling=linear")


def dry_run(cwd: Path, *words: str) -> subprocess.CompletedProcess[str]:
    env = os.environ | {"PYTHONPATH": str(REPOSITORY), "CUDA_VISIBLE_DEVICES": ""}
    env.pop("OMP_NUM_THREADS", None)
    command = [sys.executable, "-m", "launch.cli", "run", *words, "--dry-run"]
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, check=False)


def test_eight_ranks_are_laid_out_without_a_gpu(tmp_path: Path) -> None:
    words = [word for word in SMALL if not word.startswith("threads")]
    done = dry_run(tmp_path, "--nproc=8", *words, *WORDS)
    assert done.returncode == 0, done.stderr
    rows = dict(line.split(maxsplit=1) for line in done.stdout.splitlines() if "  " in line)
    text = " ".join(done.stdout.split())
    assert rows["world"].startswith("8 ranks"), done.stdout
    assert rows["threads"] == f"{max(1, len(os.sched_getaffinity(0)) // 8)} a rank"
    assert "synthetic: 216 train, 24 val, 70 test, 10 classes" in text
    assert "global batch 24 (at most 3 a rank)" in text
    assert "micro-batch 2 (2 accumulated)" in text
    assert "steps 9 an epoch, 18 in all" in text
    assert "0.009375 at the peak" in text, "0.1 * 24 / 256"
    assert "GiB a rank" in text
    assert "memory format channels_last (auto)" in text
    assert "run folder run" in text
    assert done.stderr == ""
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("factory", "told"),
    [
        ("no_module", "returned str"),
        ("thousand_classes", "gives 1000 outputs, the data have 10 classes"),
    ],
)
def test_a_dry_run_refuses_what_the_run_would_refuse(
    factory: str, told: str, tmp_path: Path
) -> None:
    done = dry_run(tmp_path, "--nproc=8", *SMALL, *WORDS, f"model.factory=tests.nets:{factory}")
    assert done.returncode == 2
    assert done.stderr.startswith(f"dist-train: error: model.factory=tests.nets:{factory} {told}")
    assert done.stderr.count("\n") == 1
    assert done.stdout == ""
