"""train.order=fixed: the bits of the result do not depend on the number of ranks."""

from pathlib import Path
from typing import Any

import pytest
import torch

from dist_train.config import Config, ConfigError
from dist_train.config.check import check_world
from dist_train.gradients import TreeGradients
from dist_train.order import shards
from tests.faults import Fault, train_with
from tests.ranks import run_ranks, start_ranks_of
from tests.settings import metrics, small
from tests.step_faults import StepFault, faulty

FIXED = (
    "model.factory=tests.nets:noisy_net",
    "train.order=fixed",
    "train.num_shards=4",
    "train.steps=12",
    "train.global_batch_size=22",  # shards of 6, 6, 5 and 5
    "data.mixup=0.3",
    "optim.ema_decay=0.9",
    "optim.clip_norm=1",
    "checkpoint.every_steps=5",
    "log_every=3",
)


def one_sha(outcomes: list[dict[str, Any]]) -> str:
    return outcomes[0]["weights_sha256"]


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, list[Any]]:
    """Return the hash and the losses of one rank."""
    run = tmp_path_factory.mktemp("reference")
    sha = one_sha(run_ranks(train_with, 1, small(run, *FIXED), None))
    return sha, losses_of(run)


def losses_of(run: Path) -> list[Any]:
    return [(m["step"], m.get("train/loss"), m.get("eval/loss")) for m in metrics(run)]


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [0, 2, 4])
def test_the_same_bits_on_any_number_of_ranks(
    world_size: int, reference: tuple[str, list[Any]], tmp_path: Path
) -> None:
    found = run_ranks(train_with, world_size, small(tmp_path, *FIXED), None)
    assert one_sha(found) == reference[0]
    for mine, theirs in zip(losses_of(tmp_path), reference[1], strict=True):
        assert (mine[0], mine[2]) == (theirs[0], theirs[2])
        if theirs[1] is not None:
            assert mine[1] == pytest.approx(theirs[1], rel=1e-12), "a sum in the log, regrouped"


RESNET9 = (
    "model.factory=dist_train.models:resnet9",
    "model.args.width=8",
    "data.args.num_train=512",
    "data.args.image_size=32",
    "data.crop_padding=4",
    "train.global_batch_size=64",
    "train.order=fixed",
    "train.num_shards=8",
    "train.steps=8",
    "checkpoint.every_steps=3",
)


@pytest.mark.exhaustive
def test_resnet9_has_the_same_bits_on_1_to_8_ranks_after_a_kill_and_short_of_memory(
    tmp_path: Path,
) -> None:
    hashes = {
        world_size: one_sha(
            run_ranks(train_with, world_size, small(tmp_path / f"{world_size}", *RESNET9), None)
        )
        for world_size in (1, 2, 4, 8)
    }
    assert len(set(hashes.values())) == 1, hashes
    mark, config = tmp_path / "mark", small(tmp_path / "killed", *RESNET9)
    fault = Fault(rank=2, step=5, place="before the step", mark=str(mark))
    start_ranks_of(train_with, 4, config, fault)
    assert mark.exists(), "the fault never fired"
    assert one_sha(run_ranks(train_with, 2, config, None)) == hashes[1]
    short = StepFault(ranks=(1,), step=4, place="before the backward", piece=1)
    found = run_ranks(with_faults, 2, small(tmp_path / "short", *RESNET9), (short,))
    assert [fired for _, fired in found] == [0, 1]
    assert found[0][0]["weights_sha256"] == hashes[1]


@pytest.mark.slow
def test_it_is_the_same_training_as_in_fast_order(tmp_path: Path) -> None:
    plain = (*FIXED, "model.factory=tests.nets:plain_net", "data.mixup=0")
    losses = []
    for order in ("fixed", "fast"):
        run = tmp_path / order
        run_ranks(train_with, 2, small(run, *plain, f"train.order={order}"), None)
        losses.append([m["train/loss"] for m in metrics(run) if "train/loss" in m])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4), "without BatchNorm and dropout"


def test_fast_order_does_not_promise_it(reference: tuple[str, list[Any]], tmp_path: Path) -> None:
    found = run_ranks(train_with, 2, small(tmp_path, *FIXED, "train.order=fast"), None)
    assert one_sha(found) != reference[0], "the test cannot tell one order from another"


@pytest.mark.slow
def test_the_same_bits_after_kills_and_resumes_on_other_numbers_of_ranks(
    reference: tuple[str, list[Any]], tmp_path: Path
) -> None:
    config = small(tmp_path / "run", *FIXED)
    for number, (world_size, step) in enumerate([(4, 7), (1, 9), (2, 11)]):
        mark = tmp_path / f"mark{number}"
        fault = Fault(rank=0, step=step, place="before the step", mark=str(mark))
        start_ranks_of(train_with, world_size, config, fault)
        assert mark.exists(), "the fault never fired"
    assert one_sha(run_ranks(train_with, 4, config, None)) == reference[0]


def with_faults(config: Config, faults: tuple[StepFault, ...]) -> tuple[dict[str, Any], int]:
    from dist_train import train as loop

    with faulty(faults) as clock:
        summary = loop.train(config)
    return summary, sum(clock.fired.values())


@pytest.mark.slow
@pytest.mark.parametrize("place", ["forward", "backward", "copy"])
def test_the_same_bits_after_a_rank_was_short_of_memory(
    place: str, reference: tuple[str, list[Any]], tmp_path: Path
) -> None:
    fault = StepFault(ranks=(1,), step=6, place=place, piece=0 if place == "forward" else 1)
    found = run_ranks(with_faults, 2, small(tmp_path, *FIXED), (fault,))
    assert [fired for _, fired in found] == [0, 1]
    assert found[0][0]["weights_sha256"] == reference[0]


@pytest.mark.slow
def test_short_of_memory_twice_in_a_step_ends_all_and_names_the_shards(tmp_path: Path) -> None:
    fault = StepFault(ranks=(1,), step=6, place="forward", times=2)
    outcomes = start_ranks_of(with_faults, 2, small(tmp_path, *FIXED), (fault,))
    [text] = {str(o.error) for o in outcomes}
    assert "rank 1 ran out of memory at step 6, also in the second try" in text
    assert "raise train.num_shards (= 4)" in text


def test_a_shortage_in_the_trial_step_does_not_count_as_the_first_steps_own(
    reference: tuple[str, list[Any]], tmp_path: Path
) -> None:
    faults = (StepFault(ranks=(1,), step=-1), StepFault(ranks=(1,), step=0))  # -1: the trial
    found = run_ranks(with_faults, 2, small(tmp_path, *FIXED), faults)
    assert [fired for _, fired in found] == [0, 2]
    assert found[0][0]["weights_sha256"] == reference[0]


def test_a_shortage_that_is_read_a_step_late_ends_all_with_a_cure(tmp_path: Path) -> None:
    fault = StepFault(ranks=(1,), step=6, place="backward")
    config = small(tmp_path, *FIXED, "guards.lag=1")
    outcomes = start_ranks_of(with_faults, 2, config, (fault,))
    [text] = {str(o.error) for o in outcomes}
    assert "rank 1 ran out of memory at step 6, with guards.lag=1" in text
    assert "set guards.lag=0" in text


@pytest.mark.parametrize("world_size", [3, 8])
def test_a_number_of_ranks_that_does_not_fit_is_refused_with_those_that_do(
    world_size: int, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=r"must be one of 1, 2, 4$"):
        check_world(small(tmp_path, *FIXED), world_size)


@pytest.mark.parametrize(
    ("options", "cure"),
    [
        (("train.num_shards=6",), "set 4 or 8"),
        (("train.global_batch_size=3",), "raise the former"),
        (("train.micro_batch_size=2",), "unset train.micro_batch_size"),
        (("threads=2",), "unset threads"),
        (("parallel.sync=ddp",), "unset it"),
    ],
)
def test_what_does_not_go_with_fixed_order_is_refused(
    options: tuple[str, ...], cure: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=cure):
        small(tmp_path, *FIXED, *options)


def test_shards_are_cut_alike_for_any_number_of_ranks() -> None:
    whole = shards(22, 0, 1, 8)
    assert whole[0][0] == 0
    assert whole[-1][1] == 22
    for world_size in (2, 4, 8):
        dealt = [s for rank in range(world_size) for s in shards(22, rank, world_size, 8)]
        assert dealt == whole


def tree_of(values: torch.Tensor, world_size: int) -> torch.Tensor:
    """Return what TreeGradients makes of one gradient a shard, (num_shards, size) float32."""
    import os

    from dist_train.distributed import start_ranks
    from dist_train.gradients import Buffers

    with start_ranks(small("unused")) as ranks:
        param = torch.nn.Parameter(torch.zeros(values.shape[1]))
        buffers = Buffers(torch.nn.Module())
        tree = TreeGradients([param], ranks, buffers, len(values))
        each = len(values) // world_size
        rank = int(os.environ["RANK"])
        tree.begin()
        for value in values[rank * each : (rank + 1) * each]:
            with tree.piece(last=False):
                (param * value).sum().backward()
        tree.reduce(poison=False)
        assert param.grad is not None
        return param.grad.clone()


def statistics_of(pictures: torch.Tensor, num_shards: int) -> torch.Tensor:
    """Return the running mean that a step in fixed order leaves, one rank's part at a time."""
    import os

    from dist_train.distributed import start_ranks
    from dist_train.gradients import Buffers

    norm = torch.nn.BatchNorm1d(pictures.shape[1])
    norm.running_mean.fill_(1.0)  # type: ignore[union-attr] # it has one
    with start_ranks(small("unused")) as ranks:
        buffers = Buffers(norm)
        tree = TreeGradients(list(norm.parameters()), ranks, buffers, num_shards)
        buffers.remember()
        tree.begin()
        each = num_shards // ranks.world_size
        mine = pictures.chunk(num_shards)[int(os.environ["RANK"]) * each :][:each]
        for shard in mine:
            with tree.piece(last=False):
                norm(shard).square().sum().backward()
        tree.reduce(poison=False)
        assert norm.num_batches_tracked == 1, "it counts steps"
        return torch.cat([norm.running_mean, norm.running_var])  # type: ignore[list-item] # as above


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_running_statistics_are_the_mean_over_the_shards(world_size: int) -> None:
    pictures = torch.randn(32, 5, generator=torch.Generator().manual_seed(0)) + 3
    shards_of = pictures.chunk(4)
    mean = torch.stack([0.9 * 1.0 + 0.1 * s.mean(0) for s in shards_of]).mean(0)
    var = torch.stack([0.9 * 1.0 + 0.1 * s.var(0) for s in shards_of]).mean(0)
    for found in run_ranks(statistics_of, world_size, pictures, 4):
        torch.testing.assert_close(found, torch.cat([mean, var]), rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_the_sum_is_that_of_one_binary_tree() -> None:
    values = torch.randn(8, 501, generator=torch.Generator().manual_seed(0)) * 1e3
    level = list(values)
    while len(level) > 1:
        level = [a + b for a, b in zip(level[::2], level[1::2], strict=True)]
    for world_size in (1, 2, 4, 8):
        for found in run_ranks(tree_of, world_size, values, world_size):
            assert torch.equal(found, level[0])
    assert not torch.equal(level[0], values.sum(0)), "the order of additions did not matter"
