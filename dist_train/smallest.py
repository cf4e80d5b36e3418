"""Try, before anything is trained, the smallest batches that the network will meet.

A last step of one sample has no variance for BatchNorm, and `x.squeeze()` drops a batch of one:
otherwise that shows after a whole epoch.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dist_train.build import checked_logits
from dist_train.config import Config, ConfigError
from dist_train.config.user_code import NEXT_LINE
from dist_train.data.loaders import Data
from dist_train.order import micro_batches, shards, share
from dist_train.plan import Plan


@dataclass(frozen=True, kw_only=True, slots=True)
class SmallBatch:
    """So many samples forwarded at once, when, and what avoids it."""

    size: int
    training: bool
    when: str


def small_batches(
    config: Config, plan: Plan, data: Data, *, world_size: int, micro_batch_size: int | None
) -> list[SmallBatch]:
    """Return the batches that differ from what the trial of a step forwards.

    Equal on all ranks: of all of them the smallest counts.
    """
    batch, found = plan.global_batch_size, []
    whole, least = _sizes(config, batch, world_size, micro_batch_size)
    if least == 1 < whole:  # they differ by one at most: others are as good as the trial's
        when = (
            f"train.global_batch_size={batch} is cut into pieces of {whole} and of 1: set another "
            "one, or another train.micro_batch_size or train.num_shards"
        )
        found.append(SmallBatch(size=least, training=True, when=when))
    rest = plan.num_train % batch
    if not config.train.drop_last and rest and plan.total_steps >= plan.steps_per_epoch:
        _, last = _sizes(config, rest, world_size, micro_batch_size)
        when = (
            f"the last step of an epoch ({rest} of {plan.num_train} samples): set "
            "train.drop_last=true, or another train.global_batch_size"
        )
        found.append(SmallBatch(size=last, training=True, when=when))
    for split, number in (("val", data.num_val), ("test", data.num_test)):
        size = number % config.data.eval_batch_size
        if 0 < size <= whole:  # a larger one would take longer than the trial of a step
            when = (
                f"the last batch of the {split} split: keep the first dimension (of squeeze(), for "
                "example), or set another data.eval_batch_size"
            )
            found.append(SmallBatch(size=size, training=False, when=when))
    return found


@torch.no_grad()
def try_small(
    model: nn.Module,
    blank: Callable[[int], Tensor],
    batches: list[SmallBatch],
    *,
    num_classes: int,
    factory: str,
) -> None:
    """Forward each of the batches; running statistics and random numbers are the caller's.

    Raises:
        ConfigError: the model refuses one.
    """
    try:
        for batch in batches:
            model.train(batch.training)
            try:
                checked_logits(model, blank(batch.size), num_classes, factory)
            except ConfigError as error:
                text = str(error)
                line = NEXT_LINE if NEXT_LINE in text else ". "
                many = "1 sample" if batch.size == 1 else f"{batch.size} samples"
                raise ConfigError(f"{text}{line}{many} at once: {batch.when}") from error
    finally:
        model.train()


def _sizes(
    config: Config, num_samples: int, world_size: int, micro_batch_size: int | None
) -> tuple[int, int]:
    """Return the largest and the smallest number of samples that any rank forwards at once."""
    if config.train.order == "fixed":
        pieces = shards(num_samples, 0, 1, config.train.num_shards)
        sizes = [last - first for first, last in pieces]
    else:
        shares = [share(num_samples, rank, world_size) for rank in (0, world_size - 1)]
        cut = [micro_batches(last - first, micro_batch_size) for first, last in shares]
        sizes = [last - first for pieces in cut for first, last in pieces]
    return max(sizes), min(sizes)
