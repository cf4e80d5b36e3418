"""Batches by step: in order, again when asked again, and how long they were waited for."""

import time
from collections.abc import Iterator

import pytest
import torch

from dist_train.data.batch import Batch
from dist_train.data.feed import Feed
from dist_train.order import GlobalOrderSampler

LATE_SEC = 0.02


class SlowLoader:
    """Gives the step's number as the label; the batch of `bad` cannot be loaded once."""

    image_shape = (1, 1, 1)

    def __init__(self, bad: int | None = None) -> None:
        self.bad = bad

    def train_batches(
        self, sampler: GlobalOrderSampler, first_step: int, last_step: int
    ) -> Iterator[Batch]:
        for step in range(first_step, last_step):
            time.sleep(LATE_SEC)
            if step == self.bad:
                self.bad = None
                raise OSError("the disk is gone")
            yield Batch(images=torch.zeros(1, 1, 1, 1), labels=torch.tensor([step]))

    def some_pictures(self, count: int) -> torch.Tensor:
        return torch.zeros(count, 1, 1, 1)

    def num_eval_batches(self, split: str) -> int:
        return 0

    def eval_batches(self, split: str, rank: int, world_size: int) -> Iterator[tuple[int, Batch]]:
        return iter(())


def feed_of(loader: SlowLoader) -> Feed:
    sampler = GlobalOrderSampler(10, global_batch_size=1, rank=0, world_size=1, seed=0)
    return Feed(loader, sampler, 10, "channels_last")


def test_a_batch_is_the_same_when_asked_again_and_can_be_asked_for_after_a_failure() -> None:
    feed = feed_of(SlowLoader(bad=1))
    assert feed.take(0) is feed.take(0)
    with pytest.raises(OSError, match="the disk is gone"):
        feed.take(1)
    assert [int(feed.take(step).labels[0]) for step in (1, 2, 5)] == [1, 2, 5]


def test_the_time_that_batches_were_waited_for_is_counted_once() -> None:
    feed = feed_of(SlowLoader())
    for step in (0, 0, 1):
        feed.take(step)
    assert feed.take_waited_sec() >= 2 * LATE_SEC
    assert feed.take_waited_sec() == 0.0
