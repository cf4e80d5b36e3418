"""One rank fails in the middle of a step: all of them repeat it, skip it or fail, together."""

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from dist_train.config import Config
from dist_train.overlap import BucketGradients
from dist_train.recovery import Recovery, StepFailedError
from tests.ranks import free_port, run_ranks, start_ranks_of
from tests.settings import metrics, small
from tests.step_faults import StepFault, faulty

NUM_STEPS = 4
SETTINGS = (
    "model.factory=tests.nets:noisy_net",
    f"train.steps={NUM_STEPS}",
    "train.global_batch_size=24",
    "log_every=1",
    "optim.clip_norm=1",
    "optim.lr=0.05",
    "data.val_fraction=0",
    "parallel.step_timeout_sec=15",
)
Weights = dict[str, torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class Ended:
    """What a rank is left with."""

    weights: Weights
    fired: int
    samples_seen: int
    sizes: list[int | None]  # the micro-batch in force at each step


def follow(config: Config, faults: tuple[StepFault, ...], plan: dict[int, Any]) -> Ended:
    """Train with faults; or without them by a plan: {step: micro-batch, or "skip"}."""
    from dist_train import train as loop

    kept: dict[str, Any] = {}
    sizes: list[int | None] = []
    with faulty(faults) as clock, pytest.MonkeyPatch.context() as patch:
        step_taken, evaluation, decide = loop.train_step, loop._final_evaluation, Recovery.decide

        def train_step(parts: Any, feed: Any, *, step: int, generation: int) -> Any:
            if isinstance(plan.get(step), int):
                parts.recovery.micro_batch_size = plan[step]
            result = step_taken(parts, feed, step=step, generation=generation)
            sizes.append(parts.recovery.micro_batch_size)
            return result

        def decided(self: Any, norm: torch.Tensor, failure: Any, step: int) -> Any:
            return decide(
                self, norm * torch.nan if plan.get(step) == "skip" else norm, failure, step
            )

        def final(parts: Any, *args: Any) -> Any:
            kept.update({k: v.clone() for k, v in parts.replica.module.state_dict().items()})
            return evaluation(parts, *args)

        patch.setattr(loop, "train_step", train_step)
        patch.setattr(Recovery, "decide", decided)
        patch.setattr(loop, "_final_evaluation", final)
        summary = loop.train(config)
    return Ended(
        weights=kept,
        fired=sum(clock.fired.values()),
        samples_seen=summary["samples_seen"],
        sizes=sizes,
    )


def follow_all(jobs: list[tuple[Config, tuple[StepFault, ...], dict[int, Any]]]) -> list[Ended]:
    """Run several trainings one after another in the same processes."""
    ended = []
    for number, (config, faults, plan) in enumerate(jobs):
        os.environ["MASTER_PORT"] = str(int(os.environ["TEST_PORTS"].split(",")[number]))
        ended.append(follow(config, faults, plan))
    return ended


def memory_faults(world_size: int, sync: str) -> Iterator[tuple[str, tuple[StepFault, ...]]]:
    """Yield the scenarios in which memory is short and every step is taken in the end."""
    last = world_size - 1
    for step in (0, 1, 2):
        late = ("before the all-reduce",) if sync == "flat" else ()
        for place in ("copy", "before the backward", "after the last gradient", *late):
            yield f"{place}, step {step}", (StepFault(ranks=(last,), step=step, place=place),)
        for place in ("forward", "backward"):
            for layer in (0, 5, 11):
                fault = StepFault(ranks=(last,), step=step, place=place, layer=layer)
                yield f"{place} {layer}, step {step}", (fault,)
    if sync == "overlap":
        for bucket in range(4):
            fault = StepFault(ranks=(last,), step=2, place=f"bucket {bucket}")
            yield f"before bucket {bucket}", (fault,)
    yield "rank 0", (StepFault(ranks=(0,), step=1, place="backward"),)
    both = (
        StepFault(ranks=(0,), step=1, place="forward"),
        StepFault(ranks=(last,), step=1, place="backward", layer=5),
    )
    yield "two ranks at different places", both
    yield "all ranks", (StepFault(ranks=tuple(range(world_size)), step=1, place="backward"),)
    yield "again in the retry", (StepFault(ranks=(last,), step=1, place="backward", times=2),)
    short = StepFault(ranks=(last,), step=1, place="backward", times=99, above=2)
    yield "until two at a time", (short,)
    two = tuple(StepFault(ranks=(last,), step=s, place="forward") for s in (1, 2))
    yield "two steps", two
    yield "really short", (StepFault(ranks=(last,), step=1, place="backward", kind="real memory"),)


def accumulated(world_size: int) -> Iterator[tuple[str, tuple[StepFault, ...]]]:
    last = world_size - 1
    for piece in (0, 1, 3):
        for place in ("forward", "before the backward", "backward"):
            fault = StepFault(ranks=(last,), step=1, place=place, piece=piece)
            yield f"{place}, piece {piece} of 4", (fault,)


def check_all(
    tmp_path: Path,
    world_size: int,
    scenarios: list[tuple[str, tuple[StepFault, ...]]],
    *options: str,
) -> None:
    """Run every scenario, then each one's clean twin by the micro-batches that were in force."""
    monkey = pytest.MonkeyPatch()
    monkey.setenv("TEST_PORTS", ",".join(str(free_port()) for _ in scenarios))
    ports = {"TEST_PORTS": os.environ["TEST_PORTS"]}
    monkey.undo()
    jobs = [
        (small(tmp_path / f"fault{i}", *SETTINGS, *options), faults, {})
        for i, (_, faults) in enumerate(scenarios)
    ]
    outcomes = start_ranks_of(follow_all, world_size, jobs, env=ports, timeout_sec=400)
    assert not [o.trace for o in outcomes if o.error or o.exit_code]
    found = [o.value for o in outcomes]
    plans = []
    for i in range(len(scenarios)):
        sizes = found[0][i].sizes
        plans.append({s: size for s, size in enumerate(sizes) if size is not None})
    ports = {"TEST_PORTS": ",".join(str(free_port()) for _ in scenarios)}
    twins = [
        (small(tmp_path / f"clean{i}", *SETTINGS, *options), (), plan)
        for i, plan in enumerate(plans)
    ]
    outcomes = start_ranks_of(follow_all, world_size, twins, env=ports, timeout_sec=400)
    assert not [o.trace for o in outcomes if o.error or o.exit_code]
    clean = [o.value for o in outcomes]
    for i, (name, faults) in enumerate(scenarios):
        expected = sum(len(f.ranks) for f in faults)
        assert sum(rank[i].fired for rank in found) >= expected, f"{name}: a fault never fired"
        for rank, (mine, twin) in enumerate(zip(found, clean, strict=True)):
            assert mine[i].sizes == found[0][i].sizes, f"{name}: rank {rank} used other pieces"
            assert mine[i].samples_seen == NUM_STEPS * 24, name
            for key, value in mine[i].weights.items():
                same = torch.equal(value, twin[i].weights[key])
                assert same, f"{name}: {key} of rank {rank} is not that of a clean run"
        lines = [
            [m.get("train/loss") for m in metrics(tmp_path / f"{k}{i}")] for k in ("fault", "clean")
        ]
        assert lines[0] == lines[1], f"{name}: the losses differ"
        events = _events(tmp_path / f"fault{i}")
        told = [e for e in events if e["event"] == "out_of_memory"]
        assert told, name
        assert told[0]["step"] == faults[0].step, name
        assert set(told[0]["ranks"]) <= {rank for f in faults for rank in f.ranks}, name


def _events(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "events.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("sync", ["flat", "overlap"])
def test_a_rank_short_of_memory_costs_a_repeated_step(sync: str, tmp_path: Path) -> None:
    scenarios = list(memory_faults(2, sync))
    chosen = [
        s for s in scenarios if s[0] in ("backward 5, step 1", "after the last gradient, step 2")
    ]
    assert len(chosen) == 2
    check_all(tmp_path, 2, chosen, f"parallel.sync={sync}")


@pytest.mark.exhaustive
@pytest.mark.parametrize("sync", ["flat", "overlap"])
@pytest.mark.parametrize("world_size", [2, 3])
def test_short_of_memory_anywhere_in_a_step(sync: str, world_size: int, tmp_path: Path) -> None:
    check_all(tmp_path, world_size, list(memory_faults(world_size, sync)), f"parallel.sync={sync}")


@pytest.mark.exhaustive
@pytest.mark.parametrize("sync", ["flat", "overlap"])
@pytest.mark.parametrize("world_size", [2, 3])
def test_short_of_memory_while_accumulating(sync: str, world_size: int, tmp_path: Path) -> None:
    options = (f"parallel.sync={sync}", f"train.micro_batch_size={24 // world_size // 4}")
    check_all(tmp_path, world_size, list(accumulated(world_size)), *options)


@pytest.mark.exhaustive
def test_short_of_memory_with_unused_parameters(tmp_path: Path) -> None:
    options = ("parallel.sync=overlap", "parallel.find_unused_parameters=true")
    check_all(tmp_path, 2, list(memory_faults(2, "overlap")), *options)


@pytest.mark.slow
@pytest.mark.parametrize("sync", ["flat", "overlap"])
def test_memory_and_then_a_nan_drop_the_one_and_skip_the_other(sync: str, tmp_path: Path) -> None:
    options = (*SETTINGS, f"parallel.sync={sync}")
    faults = (
        StepFault(ranks=(1,), step=1, place="backward"),
        StepFault(ranks=(1,), step=2, place="forward", kind="nan"),
    )
    found = run_ranks(follow, 2, small(tmp_path / "a", *options), faults, {})
    assert [f.fired for f in found] == [0, 2]
    plan = {1: 6, 2: "skip", 3: 6}
    clean = run_ranks(follow, 2, small(tmp_path / "b", *options), (), plan)
    for mine, twin in zip(found, clean, strict=True):
        assert all(torch.equal(mine.weights[k], twin.weights[k]) for k in mine.weights)


@pytest.mark.parametrize("sync", ["flat", "overlap"])
@pytest.mark.parametrize("place", ["copy", "forward", "backward", "before the backward"])
def test_an_exception_on_one_rank_is_the_same_failure_on_all(
    sync: str, place: str, tmp_path: Path
) -> None:
    fault = StepFault(ranks=(1,), step=2, place=place, kind="error")
    config = small(tmp_path, *SETTINGS, f"parallel.sync={sync}")
    outcomes = start_ranks_of(follow, 3, config, (fault,), {})
    texts = {str(o.error) for o in outcomes}
    assert texts == {"rank 1 failed at step 2: ValueError: a bug in the user's code (injected)"}
    assert all(isinstance(o.error, StepFailedError) for o in outcomes)
    status = json.loads((tmp_path / "status.json").read_text())
    assert (status["state"], status["step"], status["exit_code"]) == ("failed", 2, 1)


def test_one_process_alone_repeats_its_step_in_smaller_pieces(tmp_path: Path) -> None:
    fault = StepFault(ranks=(0,), step=1, place="backward", times=2)
    ended = run_ranks(follow, 0, small(tmp_path, *SETTINGS), (fault,), {})[0]
    assert (ended.fired, ended.sizes) == (2, [None, 6, 6, 6])


def test_a_rank_short_of_memory_with_one_sample_ends_all_with_a_cure(tmp_path: Path) -> None:
    fault = StepFault(ranks=(1,), step=1, place="forward", times=99)
    outcomes = start_ranks_of(follow, 2, small(tmp_path, *SETTINGS), (fault,), {})
    [text] = {str(o.error) for o in outcomes}
    assert "rank 1 ran out of memory at step 1, even with one sample at a time" in text


@pytest.mark.slow
def test_the_smaller_micro_batch_survives_a_resume_unless_another_is_asked_for(
    tmp_path: Path,
) -> None:
    fault = StepFault(ranks=(0,), step=1, place="backward")
    run = tmp_path / "run"
    run_ranks(follow, 2, small(run, *SETTINGS), (fault,), {})
    longer = (*SETTINGS, "train.steps=6")
    assert run_ranks(follow, 2, small(run, *longer), (), {})[0].sizes == [6, 6]
    other = (*SETTINGS, "train.steps=8", "train.micro_batch_size=5")
    assert run_ranks(follow, 2, small(run, *other), (), {})[0].sizes == [5, 5]


def nothing(*_args: Any, **_kwargs: Any) -> None:
    pass


def at_once(_self: Any, work: Callable[[], None]) -> None:
    work()


DEFECTS = {
    "does not poison": ("dist_train.gradients.FlatGradients.poison", nothing, "flat"),
    "does not restore buffers": ("dist_train.gradients.Buffers.restore", nothing, "flat"),
    "does not reset": ("dist_train.overlap.BucketGradients.give_up", nothing, "overlap"),
    "does not hold back the last bucket": (
        "dist_train.overlap.BucketGradients._after_backward",
        at_once,
        "overlap",
    ),
    "does not poison buckets": ("dist_train.overlap.BucketGradients._poison", nothing, "overlap"),
}


def defective(
    defect: str, jobs: list[tuple[Config, tuple[StepFault, ...], dict[int, Any]]]
) -> list[Ended]:
    name, instead, _ = DEFECTS[defect]
    with mock.patch(name, instead):
        return follow_all(jobs)


@pytest.mark.exhaustive
@pytest.mark.parametrize("defect", DEFECTS)
def test_a_recovery_with_a_defect_is_noticed(
    defect: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, _, sync = DEFECTS[defect]
    names = ("backward 5, step 2", "after the last gradient, step 2")
    scenarios = [s for s in memory_faults(2, sync) if s[0] in names]
    monkeypatch.setattr(f"{__name__}.follow_all", _Defective(defect))
    options = (f"parallel.sync={sync}", "parallel.step_timeout_sec=3")
    with pytest.raises(AssertionError):
        check_all(tmp_path, 2, scenarios, *options)


class _Defective:
    """follow_all with a defect, as something that can be sent to other processes."""

    def __init__(self, defect: str) -> None:
        self.defect = defect

    def __call__(self, jobs: Any) -> list[Ended]:
        return defective(self.defect, jobs)


def test_auto_takes_the_whole_share_where_memory_is_plenty(tmp_path: Path) -> None:
    options = (*SETTINGS, "train.micro_batch_size=auto")
    assert run_ranks(follow, 2, small(tmp_path, *options), (), {})[0].sizes == [12] * NUM_STEPS
    [event] = [e for e in _events(tmp_path) if e["event"] == "micro_batch_size"]
    assert event["sizes"] == [12, 12]


def with_little_memory(config: Config, left: dict[str, int]) -> Ended:
    from dist_train import start

    with mock.patch.object(start, "host_memory_left", return_value=left[os.environ["RANK"]]):
        return follow(config, (), {})


def test_auto_takes_what_fits_on_the_rank_with_the_least_memory(tmp_path: Path) -> None:
    from dist_train.memory import SAFETY, bytes_per_sample
    from tests.nets import noisy_net

    each = bytes_per_sample(noisy_net(10), (3, 12, 12))
    left = {"0": 1 << 40, "1": int(2 * 5.5 * each / SAFETY)}  # two local ranks share it
    options = (*SETTINGS, "train.micro_batch_size=auto")
    found = run_ranks(with_little_memory, 2, small(tmp_path, *options), left)
    assert [f.sizes for f in found] == [[5] * NUM_STEPS] * 2


@pytest.mark.parametrize("limit", [1, 2, 3, 7, 50, 63, 64])
def test_the_largest_size_that_fits_is_found_with_a_margin(limit: int) -> None:
    from dist_train.memory import largest_that_fits

    def attempt(size: int) -> None:
        if size > limit:
            raise torch.OutOfMemoryError("CUDA out of memory")

    found = largest_that_fits(64, attempt)
    assert found <= limit
    assert found >= (64 if limit == 64 else max(1, int(0.75 * limit)))


def test_overlap_is_recoverable_on_the_torch_that_is_tested(tmp_path: Path) -> None:
    assert BucketGradients is not None
    from dist_train.overlap import TESTED

    release = ".".join(str(torch.__version__).split(".")[:2])
    assert (release, "gloo") in TESTED, "run this file, then add the release to overlap.TESTED"
