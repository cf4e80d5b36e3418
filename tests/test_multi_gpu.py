"""What only several GPUs can show; `make gpu-check` runs these where there are two."""

import json
import signal
from pathlib import Path

import pytest
import torch

from dist_train.config import Config
from dist_train.step_failure import StepFailedError
from tests.faults import Fault, train_with
from tests.ranks import run_ranks, start_ranks_of
from tests.settings import small
from tests.step_faults import StepFault
from tests.test_resume import HARD
from tests.test_step_failures import (
    NUM_STEPS,
    SETTINGS,
    Ended,
    accumulated,
    check_all,
    follow,
    memory_faults,
    not_finite,
)

pytestmark = pytest.mark.multi_gpu

GPUS = ("device=cuda", "deterministic=true")
CHOSEN = (
    *("forward 5, step 0", "backward 5, step 1", "after the last gradient, step 2"),
    *("before bucket 1, step 1", "forward 5 of the trial step", "two ranks at different places"),
    *("until two at a time", "nan, forward 0, step 1", "inf, backward 5, step 2", "nan, all ranks"),
)


def follow_one(config: Config, fault: StepFault) -> Ended:
    return follow(config, (fault,), {})


@pytest.mark.parametrize("sync", ["flat", "ddp"])
def test_a_failure_in_a_step_is_taken_back(sync: str, tmp_path: Path) -> None:
    scenarios = [s for s in (*memory_faults(2, sync), *not_finite(2)) if s[0] in CHOSEN]
    assert len(scenarios) == len(CHOSEN) - (sync == "flat"), "it has no buckets"
    check_all(tmp_path / "whole", 2, scenarios, f"parallel.sync={sync}", *GPUS)
    pieces = [s for s in accumulated(2, sync) if "step 1" in s[0] and "piece 1" in s[0]]
    options = (f"parallel.sync={sync}", "train.micro_batch_size=3", *GPUS)
    check_all(tmp_path / "pieces", 2, pieces, *options)


@pytest.mark.parametrize("sync", ["flat", "ddp"])
def test_an_exception_on_one_rank_ends_all_with_its_cause(sync: str, tmp_path: Path) -> None:
    fault = StepFault(ranks=(1,), step=2, place="backward", kind="error")
    config = small(tmp_path, *SETTINGS, f"parallel.sync={sync}", *GPUS)
    outcomes = start_ranks_of(follow_one, 2, config, fault)
    assert all(isinstance(o.error, StepFailedError) for o in outcomes), outcomes[0].trace
    [text] = {str(o.error).split("\n")[0] for o in outcomes}
    assert text == "rank 1 failed at step 2: ValueError: a bug in the user's code (injected)"


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_buckets_of_ddp_have_the_sums_of_the_flat_buffer(precision: str, tmp_path: Path) -> None:
    found: dict[str, list[Ended]] = {}
    for sync in ("flat", "ddp"):
        options = (*SETTINGS, f"parallel.sync={sync}", f"precision={precision}", *GPUS)
        found[sync] = run_ranks(follow, 2, small(tmp_path / sync, *options), (), {})
    for name in found["flat"][0].params:
        flat, *others = [ended.weights[name] for ended in (*found["flat"], *found["ddp"])]
        assert torch.equal(others[0], flat), "the ranks of one run hold the same"
        assert torch.equal(others[1], others[2]), "the ranks of one run hold the same"
        torch.testing.assert_close(others[1], flat, rtol=1e-3, atol=1e-4)  # another order of sums
    assert found["ddp"][0].samples_seen == NUM_STEPS * 24


@pytest.mark.parametrize("sync", ["flat", "ddp"])
def test_a_run_in_parts_has_the_bits_of_an_unbroken_one(sync: str, tmp_path: Path) -> None:
    options = (*HARD, "optim.schedule=constant", f"parallel.sync={sync}", *GPUS)
    clean = run_ranks(train_with, 2, small(tmp_path / "a", *options, "train.steps=20"), None)
    for steps in (9, 20):
        part = small(tmp_path / "b", *options, f"train.steps={steps}")
        parts = run_ranks(train_with, 2, part, None)
    assert {s["weights_sha256"] for s in parts} == {s["weights_sha256"] for s in clean}
    assert len({s["weights_sha256"] for s in parts}) == 1


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("place", ["before the step", "after the backward", "in the evaluation"])
def test_a_killed_rank_ends_all_and_the_next_start_has_the_bits_of_an_unbroken_one(
    rank: int, place: str, tmp_path: Path
) -> None:
    options = (*HARD, "train.steps=16", *GPUS)
    clean = run_ranks(train_with, 2, small(tmp_path / "clean", *options), None)[0]
    config, mark = small(tmp_path / "run", *options), tmp_path / "fired"
    fault = Fault(rank=rank, step=6, place=place, number=signal.SIGKILL, mark=str(mark))
    outcomes = start_ranks_of(train_with, 2, config, fault)
    assert mark.exists(), "the fault never fired"
    assert outcomes[rank].exit_code == -signal.SIGKILL
    other = outcomes[1 - rank]
    assert other.exit_code == -signal.SIGKILL or other.error is not None, other
    events = [json.loads(x) for x in (tmp_path / "run" / "events.jsonl").read_text().splitlines()]
    assert rank in [event["rank"] for event in events if event["event"] == "died"]
    again = run_ranks(train_with, 2, config, None)[0]
    assert again["weights_sha256"] == clean["weights_sha256"]


@pytest.mark.parametrize("sync", ["flat", "ddp"])
@pytest.mark.parametrize(
    ("how", "place"),
    [("stop", "in the forward"), ("deadlock", "in the data"), ("c call", "in the optimizer")],
)
def test_a_rank_that_hangs_is_named_and_all_are_ended(
    how: str, place: str, sync: str, tmp_path: Path
) -> None:
    options = (
        "guards.hang_sec=1",
        "train.steps=200",
        f"parallel.sync={sync}",
        *SETTINGS[:1],
        *GPUS,
    )
    mark = tmp_path / "fired"
    fault = Fault(rank=1, step=40, place=place, kind=how, mark=str(mark))
    outcomes = start_ranks_of(train_with, 2, small(tmp_path / "run", *options), fault)
    assert mark.exists(), "the fault never fired"
    assert outcomes[1].exit_code == -signal.SIGKILL
    assert outcomes[0].exit_code != 0 or outcomes[0].error is not None
    events = [json.loads(x) for x in (tmp_path / "run" / "events.jsonl").read_text().splitlines()]
    [hang] = [event for event in events if event["event"] == "hang"]
    assert hang["ranks"][0] == 1
    assert f"hangs: {place.removeprefix('in the ')} at step" in hang["reason"]
