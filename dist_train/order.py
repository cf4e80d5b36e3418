"""Which samples belong to a step, for all ranks, and the random numbers of each sample.

Everything is a function of (seed, generation, step or sample): computed, never remembered. So a
resumed run, or one on another number of ranks, sees the same batches with the same augmentation.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch.utils.data import DistributedSampler

_MASK = (1 << 64) - 1


def seed_of(*parts: int) -> int:
    """Mix whole numbers into a 63-bit seed (SplitMix64 finaliser, Steele et al. 2014)."""
    state = 0x9E3779B97F4A7C15
    for part in parts:
        state = (state ^ (part & _MASK)) + 0x9E3779B97F4A7C15 & _MASK
        state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 & _MASK
        state = (state ^ (state >> 27)) * 0x94D049BB133111EB & _MASK
        state ^= state >> 31
    return state >> 1


def sample_uniform(key: int, samples: np.ndarray, count: int) -> np.ndarray:
    """Return uniform numbers in [0, 1) that depend on `key` and each sample alone.

    Args:
        key: a seed, for example seed_of(seed, generation, epoch).
        samples: (n,) int64, sample indices or positions.
        count: numbers for each sample.

    Returns:
        (n, count) float64.
    """
    base = samples.astype(np.uint64)[:, None] * np.uint64(count) + np.arange(count, dtype=np.uint64)
    x = base * np.uint64(0x9E3779B97F4A7C15) + np.uint64(key & _MASK)
    for _ in range(2):  # one round leaves neighbouring counters correlated
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        x = x ^ (x >> np.uint64(31))
    return (x >> np.uint64(11)).astype(np.float64) * 2.0**-53


def share(total: int, rank: int, world_size: int) -> tuple[int, int]:
    """Return [first, last) of `total` items for `rank`: contiguous, sizes differ by at most one."""
    size, extra = divmod(total, world_size)
    first = rank * size + min(rank, extra)
    return first, first + size + (rank < extra)


def micro_batches(num_samples: int, micro_batch_size: int | None) -> list[tuple[int, int]]:
    """Cut a rank's share into [first, last) pieces of at most `micro_batch_size`, sizes even."""
    pieces = 1 if micro_batch_size is None else -(-num_samples // micro_batch_size)
    return [share(num_samples, i, pieces) for i in range(max(1, pieces))]


def shards(total: int, rank: int, world_size: int, num_shards: int) -> list[tuple[int, int]]:
    """Return the [first, last) positions of the shards of `rank`: num_shards / world_size of them.

    The cut of `total` into shards is the same for any number of ranks that divides num_shards.
    """
    each = num_shards // world_size
    return [share(total, shard, num_shards) for shard in range(rank * each, (rank + 1) * each)]


@dataclass(frozen=True, kw_only=True, slots=True)
class StepShare:
    """A rank's part of one global batch."""

    step: int
    epoch: int
    global_size: int  # samples of this step over all ranks
    first_position: int  # of this rank's first sample within the global batch
    positions: np.ndarray  # (local,) within the global batch
    indices: np.ndarray  # (local,) into the data set
    global_indices: np.ndarray  # (global_size,) of the whole step, in order


class GlobalOrderSampler(DistributedSampler):
    """One permutation per epoch for all ranks; step s takes its next `global_batch_size` samples.

    The epoch follows from the step, so that there is no set_epoch to forget. `take` is what the
    data paths read; iterating gives the rank's indices of the epoch at hand, for code that expects
    a plain DistributedSampler.
    """

    def __init__(
        self,
        num_samples: int,
        *,
        global_batch_size: int,
        rank: int,
        world_size: int,
        seed: int,
        generation: int = 0,
        drop_last: bool = True,
        num_shards: int | None = None,
    ) -> None:
        super().__init__(
            range(num_samples),  # type: ignore[arg-type] # only its length is used
            num_replicas=world_size,
            rank=rank,
            shuffle=True,
            seed=seed,
            drop_last=drop_last,
        )
        self.dataset_size = num_samples
        self.global_batch_size = global_batch_size
        self.generation = generation
        self.num_shards = num_shards
        self.steps_per_epoch = steps_per_epoch(num_samples, global_batch_size, drop_last=drop_last)
        self._order: tuple[tuple[int, int], np.ndarray] | None = None

    def order(self, epoch: int) -> np.ndarray:
        """Return the permutation of the whole data set, (num_samples,) int64, of `epoch`."""
        key = (self.generation, epoch)
        if self._order is None or self._order[0] != key:
            generator = torch.Generator().manual_seed(seed_of(self.seed, self.generation, epoch, 1))
            self._order = (key, torch.randperm(self.dataset_size, generator=generator).numpy())
        return self._order[1]

    def take(self, step: int) -> StepShare:
        """Return this rank's share of the global batch of `step` (counted over the whole run)."""
        epoch, within = divmod(step, self.steps_per_epoch)
        start = within * self.global_batch_size
        indices = self.order(epoch)[start : start + self.global_batch_size]
        first, last = share(len(indices), self.rank, self.num_replicas)
        if self.num_shards is not None:
            own = shards(len(indices), self.rank, self.num_replicas, self.num_shards)
            first, last = own[0][0], own[-1][1]
        return StepShare(
            step=step,
            epoch=epoch,
            global_size=len(indices),
            first_position=first,
            positions=np.arange(first, last),
            indices=indices[first:last],
            global_indices=indices,
        )

    def __iter__(self) -> Iterator[int]:
        """Yield this rank's indices of the epoch set by set_epoch, step after step."""
        first = self.epoch * self.steps_per_epoch
        for step in range(first, first + self.steps_per_epoch):
            yield from self.take(step).indices.tolist()

    def __len__(self) -> int:
        first = self.epoch * self.steps_per_epoch
        return sum(len(self.take(first + s).indices) for s in range(self.steps_per_epoch))


def steps_per_epoch(num_samples: int, global_batch_size: int, *, drop_last: bool) -> int:
    """Return the steps of one epoch; the remainder is a smaller step, or dropped."""
    whole, rest = divmod(num_samples, global_batch_size)
    return whole + (rest > 0 and not drop_last)
