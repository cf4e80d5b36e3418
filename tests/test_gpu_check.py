"""`make gpu-check`: its page says what was found, what failed, and what was not done and why."""

import os
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest

from benchmarks import gpu_check
from benchmarks.gpu_check import Check, NotDoneError, results_in
from benchmarks.gpu_page import page
from tests.emulated_gpu.build import ROOT, variables

MACHINE = {
    "gpus": ["NVIDIA H200, 140 GiB"] * 2,
    "driver": "570.1",
    "torch": "2.11.0",
    "cuda": "13.0",
    "nccl": "2.28.3",
    "cores": 32,
}
SMALL_NET = (
    "model.factory=tests.nets:noisy_net",
    "model.args={}",
    "data.args.num_train=2000",
    "data.args.num_test=60",
    "data.args.image_size=12",
)


def test_results_are_read_as_pytest_prints_them_alone_or_with_xdist() -> None:
    log = (
        "tests/test_gpu.py::test_a[fp32-mixing0] PASSED                       [  2%]\n"
        "[gw1] [  4%] PASSED tests/test_gpu.py::test_b \n"
        "[gw0] [  6%] FAILED tests/test_gpu.py::test_c[bf16] \n"
        "tests/test_gpu.py::test_d ERROR\n"
        "tests/test_gpu.py::test_e \n"
    )
    assert results_in(log) == {
        "tests/test_gpu.py::test_a[fp32-mixing0]": True,
        "tests/test_gpu.py::test_b ": True,
        "tests/test_gpu.py::test_c[bf16] ": False,
        "tests/test_gpu.py::test_d": False,
    }


def test_the_page_names_failures_and_what_was_not_done() -> None:
    run = {"images_per_sec": 1000.0, "precision": "bf16"}
    found = {
        "machine": MACHINE,
        "date": "2026-12-01",
        "wall_sec": 402.0,
        "tests": {
            "passed": 61,
            "failed": ["tests/test_gpu.py::test_c"],
            "error": "not done in 9 s",
        },
        "nccl": {
            "reductions": [{"num_bytes": 1 << 30, "sec": 0.005, "bus_bytes_per_sec": 215e9}],
            "transports": {"P2P": 24},
        },
        "steps": {"error": "exit code 1: RuntimeError: NCCL error", "wall_sec": 3.0},
        "speed": {"left_out": "needs two GPUs"},
        "rates": {"cifar10_resnet18": {"1": run, "2": run | {"images_per_sec": 1900.0}}},
    }
    assert page(found).splitlines() == [
        "gpu-check of 2026-12-01, 6.7 minutes",
        "GPUs               2 x NVIDIA H200, 140 GiB",
        "software           driver 570.1, torch 2.11.0, CUDA 13.0, NCCL 2.28.3; 32 CPU cores",
        "tests              NOT DONE: not done in 9 s",
        "tests              61 passed, 1 failed",
        "  failed           tests/test_gpu.py::test_c",
        "all-reduce         1 GiB: 5,000 us, 215.0 GB/s a GPU",
        "NCCL uses          P2P (24 channels)",
        "steps              NOT DONE: exit code 1: RuntimeError: NCCL error",
        "speed              left out: needs two GPUs",
        "cifar10_resnet18   1,000 images/s, bf16, 1 GPU",
        "cifar10_resnet18   1,900 images/s, bf16, 2 GPUs: 1.90 times one (95%)",
    ]


def test_a_part_that_fails_or_takes_too_long_says_why(tmp_path: Path) -> None:
    wrong = "import sys; print('RuntimeError: no NCCL'); print('ChildFailedError:'); sys.exit(3)"
    with pytest.raises(NotDoneError, match=r"^exit code 3: RuntimeError: no NCCL$"):
        gpu_check._run([sys.executable, "-c", wrong], tmp_path / "log", 60)
    slow = "import subprocess, time; subprocess.Popen(['sleep', '600']); time.sleep(600)"
    with pytest.raises(NotDoneError, match="not done in 1 s"):
        gpu_check._run([sys.executable, "-c", slow], tmp_path / "log", 1)
    left = subprocess.run(["pgrep", "-f", "sleep 600"], stdout=subprocess.PIPE, text=True).stdout
    assert not [pid for pid in left.split() if _folder_of(pid) == str(ROOT)]


def _folder_of(pid: str) -> str:
    try:
        return os.readlink(f"/proc/{pid}/cwd")
    except OSError:  # it has ended
        return ""


def test_without_a_gpu_one_line_says_so() -> None:
    command = [sys.executable, "-m", "benchmarks.gpu_check"]
    env = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "gpu-check: error: torch sees no GPU on this machine\n"


@pytest.mark.exhaustive
def test_the_whole_page_of_two_emulated_gpus(tmp_path: Path) -> None:
    words = [*SMALL_NET, "train.steps=12"]
    check = Check(num_gpus=2, data=None, words=words, folder=tmp_path)
    with_kernels = variables(2) | {
        "PYTHONPATH": f"{ROOT}/tests/emulated_gpu/site:{ROOT}",
        "PYTEST_ADDOPTS": "-p tests.emulated_gpu.plugin -k one_rank_on_nccl_learns --no-showlocals",
    }
    unlimited = dict.fromkeys(("TESTS_SEC", "NCCL_SEC", "STEPS_SEC", "SPEED_SEC", "RATES_SEC"), 600)
    with (
        mock.patch.multiple(gpu_check, **unlimited),
        mock.patch.dict(gpu_check.PRESETS, {"cifar10_resnet9": 8}, clear=True),
        mock.patch.dict(os.environ, with_kernels),
    ):
        found = {name: part(check) for name, part in gpu_check.PARTS.items()}
    assert found["tests"]["failed"] == []
    assert found["tests"]["passed"] == 6
    assert found["nccl"]["reductions"][0]["num_bytes"] == 4
    assert found["steps"]["waits"] == {"as it is": 1, "guards.lag=1": 0}
    assert found["steps"]["world_size"] == 2
    assert set(found["rates"]["cifar10_resnet9"]) == {"1", "2"}
    text = page({"machine": MACHINE, "date": "today", "wall_sec": 1.0, **found})
    assert "NOT DONE" not in text
    assert "left out" not in text
