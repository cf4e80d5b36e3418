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

from dist_train.broken_device import is_broken_device
from dist_train.chain import read as read_chain
from dist_train.config import Config
from dist_train.ddp import BucketGradients
from dist_train.ddp_check import Found
from dist_train.memory import NO_ENGINE, is_out_of_memory
from dist_train.recovery import Recovery
from dist_train.step_failure import StepFailedError
from tests import step_faults
from tests.ranks import free_port, run_ranks, start_ranks_of
from tests.settings import metrics, small
from tests.step_faults import StepFault, faulty

NUM_STEPS = 4
TRIAL = -1  # the throw-away step before the first, as a fault counts
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
    params: list[str]  # which of the weights are parameters; the others are buffers
    fired: int
    positions: dict[int, list[int]]  # of the global batch, forwarded here by each step's last try
    samples_seen: int
    sizes: list[int | None]  # the micro-batch in force at each step


def follow(config: Config, faults: tuple[StepFault, ...], plan: dict[int, Any]) -> Ended:
    """Train with faults; or without them by a plan: {step: micro-batch, or "skip"}."""
    from dist_train import step as step_module
    from dist_train import train as loop

    kept: dict[str, Any] = {}
    params: list[str] = []
    positions: dict[int, list[int]] = {}
    sizes: list[int | None] = []
    with faulty(faults) as clock, pytest.MonkeyPatch.context() as patch:
        step_taken, evaluation, decide = loop.train_step, loop._final_evaluation, Recovery.decide
        accumulate, forward = step_module._accumulate, step_module._forward

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

        def accumulated(parts: Any, batch: Any, *args: Any, step: int, generation: int) -> None:
            positions[step] = []
            accumulate(parts, batch, *args, step=step, generation=generation)

        def forwarded(parts: Any, part: Any, *, step: int, bare: bool = False, **more: Any) -> Any:
            if not bare:  # to find what made a NaN
                positions[step] += range(part.first_position, part.first_position + len(part))
            return forward(parts, part, step=step, bare=bare, **more)

        def final(parts: Any, *args: Any) -> Any:
            kept.update({k: v.cpu().clone() for k, v in parts.replica.module.state_dict().items()})
            params.extend(name for name, _ in parts.replica.module.named_parameters())
            return evaluation(parts, *args)

        patch.setattr(loop, "train_step", train_step)
        patch.setattr(step_module, "_accumulate", accumulated)
        patch.setattr(step_module, "_forward", forwarded)
        patch.setattr(Recovery, "decide", decided)
        patch.setattr(loop, "_final_evaluation", final)
        summary = loop.train(config)
    return Ended(
        weights=kept,
        params=params,
        positions=positions,
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
    for step in (0, 1, 2) if sync == "ddp" else ():
        for bucket in range(4):
            fault = StepFault(ranks=(last,), step=step, place=f"bucket {bucket}")
            yield f"before bucket {bucket}, step {step}", (fault,)
    for place in ("forward", "backward"):
        fault = StepFault(ranks=(last,), step=TRIAL, place=place, layer=5)
        yield f"{place} 5 of the trial step", (fault,)
    if sync == "ddp":
        yield "rank 0 before bucket 2", (StepFault(ranks=(0,), step=1, place="bucket 2"),)
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
    for step in (0, 1, 2):
        for place in ("forward", "backward"):
            really = StepFault(
                ranks=(last,), step=step, place=place, kind="real memory", times=99, above=2
            )
            yield f"really short in the {place}, step {step}", (really,)


def accumulated(world_size: int, sync: str) -> Iterator[tuple[str, tuple[StepFault, ...]]]:
    """Yield the same with four micro-batches a step, of which one fails."""
    last = world_size - 1
    for step in (0, 1, 2):
        for piece in (0, 1, 3):
            for place in ("forward", "before the backward", "backward"):
                fault = StepFault(ranks=(last,), step=step, place=place, piece=piece)
                yield f"{place}, piece {piece} of 4, step {step}", (fault,)
        late = ("after the last gradient",)
        late += tuple(f"bucket {k}" for k in range(4)) if sync == "ddp" else ()
        for place in late:
            fault = StepFault(ranks=(last,), step=step, place=place, piece=3)
            yield f"{place}, piece 3 of 4, step {step}", (fault,)


def not_finite(world_size: int) -> Iterator[tuple[str, tuple[StepFault, ...]]]:
    """Yield the scenarios in which one rank's numbers are not finite, and the step is skipped."""
    last = world_size - 1
    for kind in ("nan", "inf"):
        for step in (0, 1, 2):
            for place, layer in (("forward", 0), ("forward", 11), ("backward", 0), ("backward", 5)):
                fault = StepFault(ranks=(last,), step=step, place=place, layer=layer, kind=kind)
                yield f"{kind}, {place} {layer}, step {step}", (fault,)
    yield "nan, rank 0", (StepFault(ranks=(0,), step=1, kind="nan"),)
    yield "nan, all ranks", (StepFault(ranks=tuple(range(world_size)), step=1, kind="nan"),)


def check_all(
    tmp_path: Path,
    world_size: int,
    scenarios: list[tuple[str, tuple[StepFault, ...]]],
    *options: str,
) -> None:
    """Run every scenario, then its clean twin by the micro-batches that were in force."""
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
    plans: list[dict[int, Any]] = []
    for i, (_, faults) in enumerate(scenarios):
        sizes = found[0][i].sizes
        plan: dict[int, Any] = {s: size for s, size in enumerate(sizes) if size is not None}
        plans.append(plan | {f.step: "skip" for f in faults if f.kind in ("nan", "inf")})
    twins = {tuple(plan.items()): plan for plan in plans}  # scenarios that end alike share one
    numbers = {key: number for number, key in enumerate(twins)}
    ports = {"TEST_PORTS": ",".join(str(free_port()) for _ in twins)}
    jobs = [
        (small(tmp_path / f"clean{number}", *SETTINGS, *options), (), plan)
        for number, plan in enumerate(twins.values())
    ]
    outcomes = start_ranks_of(follow_all, world_size, jobs, env=ports, timeout_sec=400)
    assert not [o.trace for o in outcomes if o.error or o.exit_code]
    clean = [o.value for o in outcomes]
    for i, (name, faults) in enumerate(scenarios):
        twin = numbers[tuple(plans[i].items())]
        _check_scenario(name, faults, [r[i] for r in found], [r[twin] for r in clean])
        _check_records(name, faults, tmp_path / f"fault{i}", tmp_path / f"clean{twin}")


def _check_scenario(
    name: str, faults: tuple[StepFault, ...], ranks: list[Ended], twins: list[Ended]
) -> None:
    """Compare what each rank is left with, with the other ranks' and with its clean twin's."""
    for rank, (mine, twin) in enumerate(zip(ranks, twins, strict=True)):
        due = sum(f.times if not f.above else 2 for f in faults if rank in f.ranks)
        assert mine.fired >= due, (
            f"{name}: on rank {rank} a fault fired {mine.fired} of {due} times"
        )
        assert mine.sizes == ranks[0].sizes, f"{name}: rank {rank} used other pieces"
        assert mine.samples_seen == NUM_STEPS * 24, name
        for key, value in mine.weights.items():
            same = torch.equal(value, twin.weights[key])
            assert same, f"{name}: {key} of rank {rank} is not that of a clean run"
        for key in mine.params:
            same = torch.equal(mine.weights[key], ranks[0].weights[key])
            assert same, f"{name}: {key} differs between ranks 0 and {rank}"
    for fault in faults:
        assert not fault.above or ranks[0].sizes[-1] == fault.above, f"{name}: {ranks[0].sizes}"
    for step in range(NUM_STEPS):
        forwarded = sorted(place for rank in ranks for place in rank.positions[step])
        assert forwarded == list(range(24)), f"{name}: not every sample of step {step} once"


def _check_records(name: str, faults: tuple[StepFault, ...], run: Path, twin: Path) -> None:
    """Compare the losses, and look at the events."""
    skipped = {
        f.step + 1 for f in faults if f.kind in ("nan", "inf")
    }  # their losses are not finite
    mine, theirs = (
        [m.get("train/loss") for m in metrics(folder) if m["step"] not in skipped]
        for folder in (run, twin)
    )
    assert mine == theirs, f"{name}: the losses differ"
    kind = "skipped_step" if skipped else "out_of_memory"
    told = [e for e in _events(run) if e["event"] == kind]
    assert told, name
    assert told[0]["step"] == max(0, faults[0].step), name
    if skipped:
        assert len(told) == len(skipped), name
        [blamed] = {e["step"]: e for e in _events(run) if e["event"] == "not_finite"}.values()
        assert blamed["step"] == faults[0].step, name
        return
    assert set(told[0]["ranks"]) <= {rank for f in faults for rank in f.ranks}, name
    assert all(e["to"] == (e["from"] + 1) // 2 for e in told), name
    assert all("iB" in e["memory"] for e in told), name


def _events(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "events.jsonl").read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize("sync", ["flat", "ddp"])
def test_a_rank_short_of_memory_costs_a_repeated_step(sync: str, tmp_path: Path) -> None:
    scenarios = list(memory_faults(2, sync))
    chosen = [
        s for s in scenarios if s[0] in ("backward 5, step 1", "after the last gradient, step 2")
    ]
    assert len(chosen) == 2
    check_all(tmp_path, 2, chosen, f"parallel.sync={sync}")


@pytest.mark.exhaustive
@pytest.mark.parametrize("sync", ["flat", "ddp"])
@pytest.mark.parametrize("world_size", [2, 3])
def test_short_of_memory_anywhere_in_a_step(sync: str, world_size: int, tmp_path: Path) -> None:
    check_all(tmp_path, world_size, list(memory_faults(world_size, sync)), f"parallel.sync={sync}")


@pytest.mark.exhaustive
@pytest.mark.parametrize("sync", ["flat", "ddp"])
@pytest.mark.parametrize("world_size", [2, 3])
def test_short_of_memory_while_accumulating(sync: str, world_size: int, tmp_path: Path) -> None:
    options = (f"parallel.sync={sync}", f"train.micro_batch_size={24 // world_size // 4}")
    check_all(tmp_path, world_size, list(accumulated(world_size, sync)), *options)


@pytest.mark.exhaustive
@pytest.mark.parametrize("world_size", [2, 3])
def test_short_of_memory_with_unused_parameters(world_size: int, tmp_path: Path) -> None:
    options = ("parallel.sync=ddp", "parallel.find_unused_parameters=true")
    options = (*options, "model.factory=tests.nets:unused_net")
    check_all(tmp_path, world_size, list(memory_faults(world_size, "ddp")), *options)


@pytest.mark.exhaustive
@pytest.mark.parametrize("sync", ["flat", "ddp"])
@pytest.mark.parametrize("world_size", [2, 3])
def test_not_finite_anywhere_in_a_step(sync: str, world_size: int, tmp_path: Path) -> None:
    check_all(tmp_path, world_size, list(not_finite(world_size)), f"parallel.sync={sync}")


@pytest.mark.slow
@pytest.mark.parametrize("sync", ["flat", "ddp"])
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


@pytest.mark.slow
@pytest.mark.parametrize("sync", ["flat", "ddp"])
@pytest.mark.parametrize("place", ["copy", "forward", "backward", "before the backward"])
def test_an_exception_on_one_rank_is_the_same_failure_on_all(
    sync: str, place: str, tmp_path: Path
) -> None:
    fault = StepFault(ranks=(1,), step=2, place=place, kind="error")
    config = small(tmp_path, *SETTINGS, f"parallel.sync={sync}")
    outcomes = start_ranks_of(follow, 3, config, (fault,), {})
    [text] = {str(o.error) for o in outcomes}
    first, where = text.split("\n")
    assert first == "rank 1 failed at step 2: ValueError: a bug in the user's code (injected)"
    assert where.startswith(f"  at {step_faults.__file__}:")
    errors = [o.error for o in outcomes]
    assert all(isinstance(e, StepFailedError) and e.users for e in errors), "no traceback needed"
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
def test_a_shortage_in_the_optimizer_ends_all_and_the_restart_uses_smaller_pieces(
    tmp_path: Path,
) -> None:
    fault = StepFault(ranks=(1,), step=2, place="optimizer")
    config, chain = small(tmp_path, *SETTINGS), {"DIST_TRAIN_CHAIN": "one start"}
    outcomes = start_ranks_of(follow, 2, config, (fault,), {}, env=chain)
    told = "rank 1 failed at step 2: OutOfMemoryError: CUDA out of memory (injected)"
    assert str(outcomes[0].error) == told, outcomes[0].trace
    assert isinstance(outcomes[1].error, torch.OutOfMemoryError)
    assert json.loads((tmp_path / "status.json").read_text())["state"] == "failed"
    restarted = chain | {"TORCHELASTIC_RESTART_COUNT": "1"}
    outcomes = start_ranks_of(follow, 2, config, (), {}, env=restarted)
    assert [o.value.sizes for o in outcomes] == [[6] * NUM_STEPS] * 2, outcomes[0].trace


def follow_unrecoverable(config: Config, faults: tuple[StepFault, ...]) -> Ended:
    found = Found(sums=True, recovers=False, reason="rank 1: so it is told")
    with mock.patch("dist_train.sync_form.try_ddp", return_value=found):
        return follow(config, faults, {})


@pytest.mark.slow
def test_where_ddp_cannot_recover_the_restart_uses_smaller_pieces(tmp_path: Path) -> None:
    fault = StepFault(ranks=(1,), step=2, place="backward")
    config = small(tmp_path, *SETTINGS, "parallel.sync=ddp")
    chain = {"DIST_TRAIN_CHAIN": "one start"}
    outcomes = start_ranks_of(follow_unrecoverable, 2, config, (fault,), env=chain)
    told = "rank 1 failed at step 2: OutOfMemoryError: CUDA out of memory (injected)"
    assert str(outcomes[0].error) == told, outcomes[0].trace
    assert not [e for e in _events(tmp_path) if e["event"] == "out_of_memory"]
    restarted = chain | {"TORCHELASTIC_RESTART_COUNT": "1"}
    outcomes = start_ranks_of(follow_unrecoverable, 2, config, (), env=restarted)
    assert [o.value.sizes for o in outcomes] == [[6] * NUM_STEPS] * 2, outcomes[0].trace


@pytest.mark.parametrize("sync", ["flat", "ddp"])
def test_a_device_that_takes_no_more_work_ends_all_at_once(sync: str, tmp_path: Path) -> None:
    fault = StepFault(ranks=(1,), step=2, place="backward", kind="sticky")
    config = small(tmp_path, *SETTINGS, f"parallel.sync={sync}")
    outcomes = start_ranks_of(follow, 3, config, (fault,), {})
    told = "rank 1 failed at step 2: AcceleratorError: CUDA error: misaligned address"
    assert all(told in str(outcomes[rank].error) for rank in (0, 2)), outcomes[0].trace
    assert isinstance(outcomes[1].error, torch.AcceleratorError), "nothing was agreed on with it"


def test_a_shortage_that_is_read_a_step_late_ends_all_with_a_cure(tmp_path: Path) -> None:
    fault = StepFault(ranks=(1,), step=2, place="backward")
    config, chain = small(tmp_path, *SETTINGS, "guards.lag=1"), {"DIST_TRAIN_CHAIN": "one start"}
    outcomes = start_ranks_of(follow, 2, config, (fault,), {}, env=chain)
    [text] = {str(o.error) for o in outcomes}
    assert "rank 1 ran out of memory at step 2, with guards.lag=1" in text
    assert "set guards.lag=0, or train.micro_batch_size=6" in text
    assert read_chain(tmp_path).micro_batch_size == 6, "a restart begins with it"


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


REPEAT, GIVE_UP = Recovery._repeat_smaller, BucketGradients.give_up


def skip_on_rank_1(self: Recovery, *args: Any, **kwargs: Any) -> str:
    verdict = REPEAT(self, *args, **kwargs)
    return "skip" if os.environ["RANK"] == "1" else verdict


def give_up_on_rank_0(self: BucketGradients) -> None:
    if os.environ["RANK"] == "0":
        GIVE_UP(self)


DEFECTS = {
    "does not poison": ("dist_train.gradients.FlatGradients.poison", nothing, "flat"),
    "does not restore buffers": ("dist_train.gradients.Buffers.restore", nothing, "flat"),
    "does not reset": ("dist_train.ddp.BucketGradients.give_up", nothing, "ddp"),
    "does not hold back the last bucket": (
        "dist_train.ddp.BucketGradients._after_backward",
        at_once,
        "ddp",
    ),
    "does not poison buckets": ("dist_train.ddp.BucketGradients._poison", nothing, "ddp"),
    "resets on one rank only": (
        "dist_train.ddp.BucketGradients.give_up",
        give_up_on_rank_0,
        "ddp",
    ),
    "skips on one rank only": (
        "dist_train.recovery.Recovery._repeat_smaller",
        skip_on_rank_1,
        "flat",
    ),
}


def defective(
    defect: str, jobs: list[tuple[Config, tuple[StepFault, ...], dict[int, Any]]]
) -> list[Ended]:
    name, instead, _ = DEFECTS[defect]
    passed = Found(sums=True, recovers=True)  # else it would be found out before any step
    with mock.patch(name, instead), mock.patch("dist_train.sync_form.try_ddp", return_value=passed):
        return follow_all(jobs)


def check_those_that_notice(tmp_path: Path, sync: str) -> None:
    names = ("backward 5, step 2", "after the last gradient, step 2")
    scenarios = [s for s in memory_faults(2, sync) if s[0] in names]
    assert len(scenarios) == len(names)
    check_all(tmp_path, 2, scenarios, f"parallel.sync={sync}", "parallel.step_timeout_sec=5")


@pytest.mark.exhaustive
@pytest.mark.parametrize("defect", DEFECTS)
def test_a_recovery_with_a_defect_is_noticed(
    defect: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(f"{__name__}.follow_all", _Defective(defect))
    with pytest.raises(AssertionError):
        check_those_that_notice(tmp_path, DEFECTS[defect][2])


@pytest.mark.exhaustive
@pytest.mark.parametrize("sync", ["flat", "ddp"])
def test_what_notices_defects_passes_without_one(sync: str, tmp_path: Path) -> None:
    check_those_that_notice(tmp_path, sync)


class _Defective:
    """follow_all with a defect, as something that can be sent to other processes."""

    def __init__(self, defect: str) -> None:
        self.defect = defect

    def __call__(self, jobs: Any) -> list[Ended]:
        return defective(self.defect, jobs)


MAYBE_SHORT = (
    f"cuDNN: {NO_ENGINE} to run this",
    "CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`",
    "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
    "cuDNN error: CUDNN_STATUS_NOT_INITIALIZED",
)


@pytest.mark.parametrize("text", MAYBE_SHORT)
@pytest.mark.parametrize(
    ("left", "reserved", "short"), [(90, 0, False), (1, 0, True), (90, 49, True)]
)
def test_what_may_mean_something_else_is_short_of_memory_only_where_little_is_left(
    text: str, left: int, reserved: int, short: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (left, 100))
    monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda: 0.5)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: reserved)
    assert is_out_of_memory(RuntimeError(text)) is short


@pytest.mark.parametrize("text", MAYBE_SHORT)
def test_a_gpu_that_does_not_say_what_is_left_is_not_short_of_memory(
    text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken() -> tuple[int, int]:
        raise torch.AcceleratorError("CUDA error: device-side assert triggered")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", broken)
    assert not is_out_of_memory(RuntimeError(text))


LASTING = (
    "an illegal instruction was encountered",
    "an illegal memory access was encountered",
    "device-side assert triggered",
    "hardware stack error",
    "invalid program counter",
    "misaligned address",
    "operation not supported on global/shared address space",
    "the launch timed out and was terminated",
    "uncorrectable ECC error encountered",
    "uncorrectable NVLink error detected during the execution",
    "unspecified launch failure",
)


@pytest.mark.parametrize("text", LASTING)
def test_what_cuda_returns_again_and_again_is_known_in_any_type_of_error(text: str) -> None:
    assert is_broken_device(RuntimeError(f"Triton Error [CUDA]: {text}"))


def test_whatever_cuda_returns_but_a_shortage_may_last() -> None:
    assert is_broken_device(torch.AcceleratorError("CUDA error: unknown error"))
    assert not is_broken_device(torch.AcceleratorError("CUDA error: out of memory"))
    assert not is_broken_device(torch.OutOfMemoryError("CUDA out of memory"))
    assert not is_broken_device(ValueError("a bug in the user's code"))


def test_nccl_without_memory_on_the_gpu_is_short_of_memory() -> None:
    text = "unhandled cuda error, NCCL version 2.28.9\nLast error:\nCuda failure 2 'out of memory'"
    assert is_out_of_memory(torch.distributed.DistBackendError(text))


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
