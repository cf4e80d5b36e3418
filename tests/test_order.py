"""The same global batches, sample for sample, at any number of ranks."""

import hashlib
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch.utils.data import DistributedSampler

from dist_train.config import Config
from dist_train.data.loaders import open_data, split_indices
from dist_train.data.pictures import Pictures
from dist_train.data.sources import load_source
from dist_train.distributed import start_ranks
from dist_train.order import (
    GlobalOrderSampler,
    micro_batches,
    sample_uniform,
    seed_of,
    share,
    steps_per_epoch,
)
from tests.ranks import run_ranks
from tests.settings import metrics, small

MIXED = ("data.mixup=0.3", "data.cutmix=0.5", "data.cutout=3")


def sampler_of(config: Config, num_train: int, ranks: Any) -> GlobalOrderSampler:
    return GlobalOrderSampler(
        num_train,
        global_batch_size=config.train.global_batch_size,
        rank=ranks.rank,
        world_size=ranks.world_size,
        seed=config.seed,
        drop_last=config.train.drop_last,
    )


def batch_digests(config: Config, first_step: int, last_step: int) -> list[list[str]]:
    """Return, for each step, a digest of each of this rank's samples as the model sees them."""
    with start_ranks(config) as ranks:
        data = open_data(config, ranks)
        sampler = sampler_of(config, data.num_train, ranks)
        steps = []
        for batch in data.loader.train_batches(sampler, first_step, last_step):
            rows = []
            for row in range(len(batch)):
                text = batch.images[row].contiguous().cpu().numpy().tobytes()
                text += bytes(str(batch.labels[row].item()), "ascii")
                if batch.own_weight is not None and batch.partner_labels is not None:
                    text += batch.own_weight[row].cpu().numpy().tobytes()
                    text += bytes(str(batch.partner_labels[row].item()), "ascii")
                rows.append(hashlib.sha256(text).hexdigest()[:16])
            steps.append(rows)
        return steps


def joined(by_rank: list[list[list[str]]]) -> list[list[str]]:
    """Put the ranks' shares of each step one after the other."""
    return [[x for part in shares for x in part] for shares in zip(*by_rank, strict=True)]


@pytest.mark.slow
@pytest.mark.parametrize("loader", ["memory", "workers"])
@pytest.mark.parametrize("extra", [(), MIXED], ids=["plain", "mixed"])
def test_the_same_samples_with_the_same_augmentation_on_1_2_3_and_4_ranks(
    loader: str, extra: tuple[str, ...], tmp_path: Path
) -> None:
    config = small(
        tmp_path,
        f"data.loader={loader}",
        "data.num_workers=0",
        "data.image_size=12",
        "train.global_batch_size=22",  # 3 and 4 do not divide it
        "train.drop_last=false",
        *extra,
    )
    last = 12  # crosses the end of the epoch of 10 steps, the last of them short
    alone = joined(run_ranks(batch_digests, 1, config, 0, last))
    assert [len(step) for step in alone] == [22] * 9 + [18] + [22] * 2
    assert len({x for step in alone[:10] for x in step}) == 216, "a sample came twice in an epoch"
    assert alone[0] != alone[10], "the second epoch has the order of the first"
    for world_size in (2, 3, 4):
        assert joined(run_ranks(batch_digests, world_size, config, 0, last)) == alone
    resumed = joined(run_ranks(batch_digests, 3, config, 7, last))
    assert resumed == alone[7:], "a resume sees other batches"


def losses(config: Config) -> list[float]:
    from dist_train.train import train

    train(config)
    run_dir = Path(config.run_dir or "")
    return [m["train/loss"] for m in metrics(run_dir) if "train/loss" in m]


@pytest.mark.slow
def test_losses_of_20_steps_agree_at_1_2_3_and_4_ranks(tmp_path: Path) -> None:
    extra = ("train.steps=20", "log_every=1", "train.global_batch_size=26", "optim.lr=0.05")
    alone = run_ranks(losses, 1, small(tmp_path / "1", *extra))[0]
    assert len(alone) == 20
    for world_size in (2, 3, 4):
        others = run_ranks(losses, world_size, small(tmp_path / str(world_size), *extra))[0]
        np.testing.assert_allclose(others, alone, rtol=1e-4)


@pytest.mark.slow
def test_a_resume_on_another_number_of_ranks_continues_the_same_losses(tmp_path: Path) -> None:
    extra = (
        "log_every=1",
        "train.global_batch_size=26",
        "optim.lr=0.05",
        "optim.schedule=constant",
    )
    alone = run_ranks(losses, 1, small(tmp_path / "one", *extra, "train.steps=20"))[0]
    run_ranks(losses, 3, small(tmp_path / "two", *extra, "train.steps=11"))
    resumed = run_ranks(losses, 2, small(tmp_path / "two", *extra, "train.steps=20"))[0]
    np.testing.assert_allclose(resumed, alone, rtol=1e-4)


class Backwards(GlobalOrderSampler):
    """Takes the samples in the order of their numbers, last first."""

    def order(self, epoch: int) -> np.ndarray:
        return np.arange(self.dataset_size)[::-1]


@pytest.mark.parametrize("loader", ["memory", "workers"])
def test_both_data_paths_take_their_indices_from_the_sampler(loader: str, tmp_path: Path) -> None:
    config = small(
        tmp_path,
        f"data.loader={loader}",
        "data.num_workers=0",
        "data.image_size=12",
        "data.val_fraction=0",
    )
    with start_ranks(config) as ranks:
        data = open_data(config, ranks)
        plain = sampler_of(config, data.num_train, ranks)
        swapped = Backwards(
            data.num_train, global_batch_size=24, rank=0, world_size=1, seed=config.seed
        )
        source = load_source(config.data).train
        first = next(iter(data.loader.train_batches(plain, 0, 1))).labels.cpu().numpy()
        second = next(iter(data.loader.train_batches(swapped, 0, 1))).labels.cpu().numpy()
    if isinstance(source, Pictures):
        everything = source.labels
    else:
        everything = np.array([source[(i, None)][1] for i in range(240)])
    np.testing.assert_array_equal(second, everything[::-1][:24])
    np.testing.assert_array_equal(first, everything[plain.take(0).indices])
    assert (first != second).any()


def test_the_sampler_is_a_distributed_sampler_and_iterates_an_epoch() -> None:
    samplers = [
        GlobalOrderSampler(50, global_batch_size=16, rank=r, world_size=3, seed=1) for r in range(3)
    ]
    assert all(isinstance(s, DistributedSampler) for s in samplers)
    seen = [list(s) for s in samplers]
    assert [len(s) for s in samplers] == [len(x) for x in seen] == [18, 15, 15]
    assert len({x for part in seen for x in part}) == 48
    for sampler in samplers:
        sampler.set_epoch(1)
    assert [list(s) for s in samplers] != seen


def test_shares_are_contiguous_and_differ_by_at_most_one() -> None:
    for total in range(30):
        for world_size in range(1, 9):
            parts = [share(total, rank, world_size) for rank in range(world_size)]
            assert parts[0][0] == 0
            assert parts[-1][1] == total
            assert all(a[1] == b[0] for a, b in pairwise(parts))
            sizes = {last - first for first, last in parts}
            assert max(sizes) - min(sizes) <= 1


def test_micro_batches_cover_the_share_and_stay_below_their_limit() -> None:
    assert micro_batches(10, None) == [(0, 10)]
    assert micro_batches(10, 4) == [(0, 4), (4, 7), (7, 10)]
    assert micro_batches(3, 100) == [(0, 3)]


def test_random_numbers_belong_to_the_sample_and_look_uniform() -> None:
    samples = np.arange(20_000)
    drawn = sample_uniform(seed_of(1, 2), samples, 3)
    np.testing.assert_array_equal(
        drawn[[5, 77]], sample_uniform(seed_of(1, 2), samples[[5, 77]], 3)
    )
    assert (drawn != sample_uniform(seed_of(1, 3), samples, 3)).all()
    counts = np.stack([np.histogram(drawn[:, i], bins=20, range=(0, 1))[0] for i in range(3)])
    assert abs(counts - 1000).max() < 150  # five standard deviations
    assert abs(np.corrcoef(drawn.T) - np.eye(3)).max() < 0.04
    assert abs(np.corrcoef(drawn[1:, 0], drawn[:-1, 0])[0, 1]) < 0.04


def test_the_validation_split_never_overlaps_the_training_split() -> None:
    train, val = split_indices(1000, 0.1, seed=3)
    assert len(val) == 100
    assert sorted([*train, *val]) == list(range(1000))
    assert (split_indices(1000, 0.1, seed=4)[1] != val).any()


def test_the_remainder_of_an_epoch_is_dropped_or_a_step_of_its_own() -> None:
    assert steps_per_epoch(100, 32, drop_last=True) == 3
    assert steps_per_epoch(100, 32, drop_last=False) == 4
    assert steps_per_epoch(96, 32, drop_last=False) == 3


def test_a_mixing_partner_comes_from_the_same_group_of_eight() -> None:
    from dist_train.data.batch import plan_mixing

    config = small("unused", "data.mixup=1.0").data
    sampler = GlobalOrderSampler(100, global_batch_size=30, rank=1, world_size=2, seed=0)
    partners = {}
    for step_share in _shares(sampler):
        mixing = plan_mixing(config, step_share, seed=0, generation=0)
        for row, position in enumerate(step_share.positions):
            partner = mixing.positions[mixing.partner[row]]
            assert partner // 8 == position // 8
            assert partner != position
            partners[(step_share.step, int(position))] = int(partner)
    assert len(set(partners.values())) > 8


def _shares(sampler: GlobalOrderSampler) -> Iterator[Any]:
    for step in range(3):
        yield sampler.take(step)
