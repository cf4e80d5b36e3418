"""What needs a GPU, run without one: the tests of GPUs, and those of the CPU with device=cuda."""

from pathlib import Path

import pytest

from tests.emulated_gpu.build import ROOT
from tests.emulated_gpu.inside import check_inside

HERE = "tests/emulated_gpu"
# A few cases of each kind; every line is one process, and its start takes seconds.
SOME = {
    "what the emulation promises": (f"{HERE}/device.py",),
    "planted defects, copying ahead": (f"{HERE}/defects.py", f"{HERE}/copying_ahead.py"),
    "scarce memory": (f"{HERE}/scarce.py", f"{HERE}/own_memory_of_nccl.py"),
    "ranks that are gone": (f"{HERE}/gone.py",),
    "steps and their waits": (
        f"{HERE}/step_costs.py",
        "tests/test_gpu.py",
        *("-k", "waits_once and (fp16 or mixup) or waits_for and mixing1-bf16 or unbroken_one"),
    ),
    "failures in a step": (
        *("tests/test_step_failures.py", "tests/test_sync_form.py"),
        *("-k", "short_of_memory_costs or on_one_rank and backward-ddp or on_gpus_ddp_is"),
    ),
    "two GPUs": (
        *("tests/test_multi_gpu.py", "-k"),
        "exception and overlap or killed_rank and backward-1 or hangs and data-flat",
    ),
    "rollback, checkpoints, measuring": (
        *("tests/test_rollback.py", "tests/test_bench.py", "tests/test_checkpoint.py"),
        "-k",
        "divergence_goes_back or other_blocks_do_not or falls_back_to_the_checkpoint",
    ),
}
# Files with tests that train, and which of them; the rest is the same on any device.
TRAINING = {
    "test_augmentation": "",
    "test_checkpoint": "",
    "test_checkpoint_writer": "",
    "test_ddp_check": "",
    "test_evaluate": "",
    "test_fixed_order": "",
    "test_gradients": "",
    "test_muon": "",
    "test_nonfinite": "",
    "test_optim": "",
    "test_order": "",
    "test_outputs": "",
    "test_own_memory": "",
    "test_resume": "kill and 2",
    "test_rollback": "not flipped_bit_in_a_replica or 30-",
    "test_save_period": "",
    "test_step_failures": "",
    "test_sync_form": "",
}


@pytest.mark.slow
@pytest.mark.parametrize("what", SOME)
def test_some_on_an_emulated_gpu(what: str) -> None:
    check_inside(*SOME[what], "-m", "not exhaustive")


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    "file", ["tests/test_gpu.py", "tests/test_multi_gpu.py", f"{HERE}/step_costs.py"]
)
def test_all_that_needs_a_gpu(file: str) -> None:
    check_inside(file, num_gpus=2)


@pytest.mark.emulated
@pytest.mark.parametrize("file", TRAINING)
def test_what_trains_on_a_cpu_trains_on_gpus(file: str) -> None:
    check_inside(f"tests/{file}.py", "-m", "not exhaustive", "-k", TRAINING[file])


@pytest.mark.exhaustive
def test_the_worker_of_a_benchmark_measures_gpus() -> None:
    ways = "loader_anew or loaded_ahead or ranks_alone or goes_wrong_alone or bare_step or barrier"
    check_inside("tests/test_bench.py", "-k", ways)


@pytest.mark.emulated
@pytest.mark.parametrize(
    "chosen",
    [
        "short_of_memory_anywhere and 2-flat",
        "short_of_memory_anywhere and 2-ddp",
        "while_accumulating and 2-ddp",
        "with_unused_parameters and 2",
        "not_finite_anywhere and 2-ddp",
    ],
)
def test_a_failure_anywhere_in_a_step_of_two_gpus(chosen: str) -> None:
    check_inside("tests/test_step_failures.py", "-m", "exhaustive", "-k", chosen)


@pytest.mark.slow
def test_a_test_that_fails_inside_fails_here(tmp_path: Path) -> None:
    wrong = tmp_path / "test_wrong.py"
    wrong.write_text(
        "import torch\n\n\ndef test_wrong():\n    assert torch.ones(2, device='cuda').sum() == 3\n"
    )
    with pytest.raises(AssertionError, match="1 failed"):
        check_inside(str(wrong), f"--rootdir={ROOT}")
