"""What is found out about DDP before it is trusted: the same on all ranks, and never a hang."""

import contextlib
from pathlib import Path
from unittest import mock

import pytest

from dist_train.config import Config
from dist_train.ddp import BucketGradients
from dist_train.ddp_check import Found, try_ddp
from dist_train.distributed import start_ranks
from tests.ranks import run_ranks, start_ranks_of
from tests.settings import small
from tests.test_step_failures import DEFECTS
from tests.wrong_backends import BACKENDS, backend, wrong_without_a_failure


def tried(config: Config, name: str, find_unused: bool, always: bool) -> Found:
    with start_ranks(config) as ranks, backend(name), contextlib.ExitStack() as stack:
        if always:
            stack.enter_context(wrong_without_a_failure())
        return try_ddp(ranks, find_unused=find_unused)


@pytest.mark.parametrize("find_unused", [False, True])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_a_failure_can_be_taken_back_here(
    world_size: int, find_unused: bool, tmp_path: Path
) -> None:
    for found in run_ranks(tried, world_size, small(tmp_path), "", find_unused, False):
        assert (found.sums, found.recovers, found.reason) == (True, True, "")


@pytest.mark.slow
@pytest.mark.parametrize("name", BACKENDS)
def test_a_wrong_backend_is_found_out_by_all_alike(name: str, tmp_path: Path) -> None:
    _, sums, told = BACKENDS[name]
    config = small(tmp_path)
    if name == "hangs later" and config.device == "cuda":  # it has the thread of all backwards
        for outcome in start_ranks_of(tried, 2, config, name, False, False):
            assert "set parallel.sync=flat, which does not try it" in str(outcome.error)
        return
    found = run_ranks(tried, 2, config, name, False, False)
    assert {(f.sums, f.recovers) for f in found} == {(sums, False)}
    [reason] = {f.reason for f in found}
    assert any(text in reason for text in told)


@pytest.mark.slow
def test_sums_of_ddp_that_are_wrong_without_a_failure_are_found_out(tmp_path: Path) -> None:
    for found in run_ranks(tried, 2, small(tmp_path), "lies later", False, True):
        assert (found.sums, found.recovers) == (False, False)
        assert "the sum of gradients is wrong, without any failure" in found.reason


@pytest.mark.slow
@pytest.mark.parametrize(
    "defect", [name for name, (_, _, sync) in DEFECTS.items() if sync == "ddp"]
)
def test_a_defect_of_the_recovery_is_found_out(defect: str, tmp_path: Path) -> None:
    for found in run_ranks(with_defect, 2, small(tmp_path), defect):
        assert (found.sums, found.recovers) == (True, False)


def with_defect(config: Config, defect: str) -> Found:
    with mock.patch(*DEFECTS[defect][:2]):
        return tried(config, "", False, False)


def test_a_private_method_that_is_gone_is_found_out(tmp_path: Path) -> None:
    for found in run_ranks(without_a_method, 2, small(tmp_path)):
        assert (found.sums, found.recovers) == (True, False)
        assert "rank 0: AttributeError: _reset_state is gone" in found.reason


def without_a_method(config: Config) -> Found:
    gone = AttributeError("_reset_state is gone")
    with mock.patch.object(BucketGradients, "give_up", side_effect=gone):
        return tried(config, "", False, False)
