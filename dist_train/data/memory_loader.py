"""Batches from pictures in memory: gathered and augmented whole, on the device if it is a GPU.

Legend: n pictures, h height, w width, c channels.
"""

import warnings
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from dist_train.config import DataConfig
from dist_train.data.augment import (
    Normaliser,
    augmented_on_device,
    augmented_on_host,
    draw_cuts,
    packed_cuts,
)
from dist_train.data.batch import Batch, copied_to, mix, plan_mixing
from dist_train.data.pictures import Pictures, check_channels
from dist_train.order import GlobalOrderSampler, sample_uniform, seed_of


class MemoryLoader:
    """Serves a training split and evaluation splits from uint8 tensors."""

    def __init__(
        self,
        train: Pictures,
        splits: dict[str, tuple[Pictures, np.ndarray]],
        train_indices: np.ndarray,
        config: DataConfig,
        device: torch.device,
    ) -> None:
        self._config = config
        self._device = device
        self._train_indices = train_indices
        self._images = _resident(train.images, device)  # (num, h, w, c) uint8
        self._labels = _labels(train, device)
        same = {
            name: self._images if part is train else _resident(part.images, device)
            for name, (part, _) in splits.items()
        }
        self._splits = {
            name: (same[name], _labels(part, device), indices)
            for name, (part, indices) in splits.items()
        }
        height, width, channels = train.images.shape[1:]
        check_channels(config, channels)
        mean, std = config.mean, config.std
        if mean is None or std is None:
            mean, std = _statistics(train.images, train_indices)
        self._normalise = Normaliser(mean, std, (height, width, channels), device)
        # What moves whole rows on the CPU mirrors once; further out one index a pixel does it.
        self._on_host = device.type == "cpu" and config.crop_padding < min(height, width)
        self._turn = (0, False)  # alternating flips: the seed of the first time; every other epoch

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(c, h, w) of every batch."""
        height, width, channels = self._images.shape[1:]
        return channels, height, width

    def train_batches(
        self, sampler: GlobalOrderSampler, first_step: int, last_step: int
    ) -> Iterator[Batch]:
        """Yield this rank's batch of every step in [first_step, last_step)."""
        mixed = self._config.mixup > 0 or self._config.cutmix > 0
        for step in range(first_step, last_step):
            share = sampler.take(step)
            key = seed_of(sampler.seed, sampler.generation, share.epoch, 3)
            self._turn = (seed_of(sampler.seed, sampler.generation, 7), share.epoch % 2 == 1)
            if not mixed:
                images, labels = self._augmented(self._train_indices[share.indices], key)
                yield Batch(
                    images=images,
                    labels=labels,
                    first_position=share.first_position,
                    global_size=share.global_size,
                )
                continue
            mixing = plan_mixing(
                self._config, share, seed=sampler.seed, generation=sampler.generation
            )
            wanted = share.global_indices[mixing.positions]
            images, labels = self._augmented(self._train_indices[wanted], key)
            yield mix(images, labels, mixing, share)

    def some_pictures(self, count: int) -> Tensor:
        """Return up to `count` training pictures, evenly spaced, as a network gets them."""
        spaced = self._train_indices[:: max(1, -(-len(self._train_indices) // count))]
        return self._normalise(self._images[copied_to(self._device, spaced)])

    def num_eval_batches(self, split: str) -> int:
        """Return how many batches a split is cut into."""
        return -(-len(self._splits[split][2]) // self._config.eval_batch_size)

    def eval_batches(self, split: str, rank: int, world_size: int) -> Iterator[tuple[int, Batch]]:
        """Yield (number, batch) of every world_size-th batch of a split; the same cut for all."""
        images, labels, indices = self._splits[split]
        size = self._config.eval_batch_size
        for number in range(rank, self.num_eval_batches(split), world_size):
            rows = copied_to(self._device, indices[number * size : (number + 1) * size])
            yield number, Batch(images=self._normalise(images[rows]), labels=labels[rows])

    def _augmented(self, indices: np.ndarray, key: int) -> tuple[Tensor, Tensor]:
        """Crop, flip and cut out each picture by its own random numbers, then normalise."""
        config, device = self._config, self._device
        height, width = self._images.shape[1:3]
        turn = None
        if config.flip == "alternating":
            first, again = self._turn
            turn = (sample_uniform(first, indices, 1)[:, 0] < 0.5) != again
        cuts = draw_cuts(config, sample_uniform(key, indices, 5), height, width, turn)
        rows = copied_to(device, indices)
        if self._on_host:
            pictures = self._images.numpy()  # the same memory
            images = augmented_on_host(pictures, indices, cuts, config.cutout, self._normalise)
        else:
            packed = copied_to(device, packed_cuts(cuts, len(indices)))
            images = augmented_on_device(self._images, rows, packed, config, self._normalise)
        return images, self._labels[rows]


def _labels(pictures: Pictures, device: torch.device) -> Tensor:
    """Return (num,) int64, which the loss asks for, of labels of any width."""
    return _resident(pictures.labels.astype(np.int64, copy=False), device)


def _resident(array: np.ndarray, device: torch.device) -> Tensor:
    """Return the array as a tensor on the device; on the CPU it shares the array's memory."""
    if not array.flags.writeable and device.type == "cpu":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # read-only memory: nobody writes to it
            return torch.from_numpy(array)
    return torch.from_numpy(np.ascontiguousarray(array)).to(device)


def _statistics(images: np.ndarray, indices: np.ndarray) -> tuple[list[float], list[float]]:
    """Return mean and deviation per channel, 0..1, of up to 10,000 evenly spaced pictures."""
    chosen = indices[:: max(1, -(-len(indices) // 10_000))]
    channels = images.shape[-1]
    total = np.zeros(channels, dtype=np.int64)
    squares = np.zeros(channels, dtype=np.int64)
    count = 0
    for start in range(0, len(chosen), 500):
        pixels = images[chosen[start : start + 500]].reshape(-1, channels).astype(np.int64)
        total += pixels.sum(axis=0)
        squares += (pixels * pixels).sum(axis=0)
        count += len(pixels)
    mean = total / count
    deviation = np.sqrt(np.maximum(squares / count - mean * mean, 1.0))
    return (mean / 255).tolist(), (deviation / 255).tolist()
