"""Batches through torch's DataLoader: for pictures that do not fit in memory or are uneven."""

import multiprocessing.util
import os
import signal
import tempfile
import threading
from collections.abc import Iterator
from multiprocessing import resource_tracker

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from dist_train.config import ConfigError, DataConfig
from dist_train.data.ahead import copied_ahead
from dist_train.data.batch import Batch, Mixing, mix, plan_mixing
from dist_train.data.image_size import settle_size
from dist_train.data.num_workers import NodeShare
from dist_train.data.pictures import check_channels
from dist_train.data.worker_dataset import WorkerPictures
from dist_train.data.worker_exchange import (
    InWorker,
    check_sendable,
    collate,
    received,
    script_hidden,
)
from dist_train.order import GlobalOrderSampler, StepShare, seed_of
from dist_train.preemption import SIGNALS, blocked

# Of the ImageNet training pictures: what pretrained torchvision models expect.
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
GREY_MEAN, GREY_STD = (0.449,), (0.226,)  # their means: for any other number of channels

# man 7 unix: 108 bytes with the zero; multiprocessing adds /pymp-abcdefgh/listener-abcdefgh.
LONGEST_TMPDIR = 107 - len("/pymp-abcdefgh/listener-abcdefgh")
SHORT_TMPDIRS = ("/tmp", "/var/tmp", "/dev/shm")
LOOK_SEC = 1.0  # between two looks for the rank

# What the server of the workers imports once, and no worker again: importing torch takes longer
# than a small evaluation, and what is imported before the fork is in memory once. The first name is
# the default.
PRELOADED = ("__main__", "torchvision.transforms.v2", "dist_train.data.worker_exchange")

Keys = list[tuple[int, int | None]]


class WorkerLoader:
    """Serves a training split and evaluation splits through worker processes."""

    def __init__(
        self,
        train: WorkerPictures,
        splits: dict[str, tuple[WorkerPictures, np.ndarray]],
        train_indices: np.ndarray,
        config: DataConfig,
        device: torch.device,
        share: NodeShare,
    ) -> None:
        self._train = train
        self._train_indices = train_indices
        self._splits = splits
        self._config = config
        self._device = device
        self._hide_script = True
        both = {id(pictures): pictures for pictures in (train, *(p for p, _ in splits.values()))}
        parcels = []
        if config.num_workers:  # before an item is asked for: it may open what cannot be sent
            parcels = [check_sendable(p, f"data.name={config.name}") for p in both.values()]
            self._hide_script = not any(parcel.needs_script for parcel in parcels)
        self.settled = settle_size(list(both.values()), config)
        self.image_shape = train.first(int(train_indices[0]), 0)
        for split, (pictures, indices) in splits.items():
            if len(indices) > 0:
                shape = pictures.first(int(indices[0]), None)
                _check_same_channels(split, shape[0], self.image_shape[0])
        if config.num_workers == "auto":
            largest = max(parcel.num_bytes for parcel in parcels)
            self.num_workers = share.num_workers(
                data_set_bytes=largest, image_bytes=train.image_bytes()
            )
        else:
            self.num_workers = config.num_workers
        self._mean, self._std = _statistics(config, self.image_shape[0], device)

    def train_batches(
        self, sampler: GlobalOrderSampler, first_step: int, last_step: int
    ) -> Iterator[Batch]:
        """Yield this rank's batch of every step in [first_step, last_step)."""
        plan = _StepKeys(sampler, self._train_indices, self._config, first_step, last_step)
        for step, (images, labels) in enumerate(self._load(self._train, plan), first_step):
            share, mixing = plan.step(step)
            images = self._normalised(images)
            if mixing is not None:
                yield mix(images, labels, mixing, share)
                continue
            yield Batch(
                images=images,
                labels=labels,
                first_position=share.first_position,
                global_size=share.global_size,
            )

    def some_pictures(self, count: int) -> Tensor:
        """Return up to `count` training pictures, evenly spaced, as a network gets them."""
        spaced = self._train_indices[:: max(1, -(-len(self._train_indices) // count))]
        pictures = [self._train[(int(index), None)][0] for index in spaced]
        return self._normalised(torch.stack(pictures).to(self._device))

    def num_eval_batches(self, split: str) -> int:
        """Return how many batches a split is cut into."""
        return -(-len(self._splits[split][1]) // self._config.eval_batch_size)

    def eval_batches(self, split: str, rank: int, world_size: int) -> Iterator[tuple[int, Batch]]:
        """Yield (number, batch) of every world_size-th batch of a split; the same cut for all."""
        pictures, indices = self._splits[split]
        size = self._config.eval_batch_size
        numbers = range(rank, self.num_eval_batches(split), world_size)
        keys: list[Keys] = [
            [(int(i), None) for i in indices[n * size : (n + 1) * size]] for n in numbers
        ]
        for number, (images, labels) in zip(numbers, self._load(pictures, keys), strict=True):
            yield number, Batch(images=self._normalised(images), labels=labels)

    def _load(
        self, pictures: WorkerPictures, keys: "_StepKeys | list[Keys]"
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Return batches of images and labels on the device."""
        workers = min(self.num_workers, len(keys))  # one without work may start too late
        if workers:
            find_place_for_sockets()
            multiprocessing.set_forkserver_preload(list(PRELOADED))
        loader = DataLoader(
            InWorker(pictures) if workers else pictures,
            batch_sampler=keys,
            num_workers=workers,
            pin_memory=self._device.type == "cuda",
            # a fork after torch has started its threads may deadlock
            multiprocessing_context="forkserver" if workers else None,
            worker_init_fn=_end_with_own_rank if workers else None,
            collate_fn=collate,
        )
        # torchrun and SLURM signal every process of a rank. Workers and their server inherit this
        # mask: they outlive the signal, so that the rank can finish its step and save.
        with blocked():
            resource_tracker.ensure_running()  # it unblocks two of the signals again
            with blocked(), script_hidden(hide=self._hide_script and workers > 0):
                batches = received(iter(loader))
        return copied_ahead(batches, self._device) if self._device.type == "cuda" else batches

    def _normalised(self, images: Tensor) -> Tensor:
        """(n, c, h, w) uint8 -> normalised float32; float pictures are taken as they are."""
        if images.dtype == torch.uint8:
            images = (images.float() - self._mean) / self._std
        return images


def _check_same_channels(split: str, channels: int, of_training: int) -> None:
    if channels != of_training:
        raise ConfigError(
            f"the images of the {split} split have {channels} channels, those of training "
            f"{of_training}: make all alike, for example by image.convert"
        )


def _statistics(config: DataConfig, channels: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return mean and deviation of pixels 0..255, each (1, c, 1, 1) or (1, 1, 1, 1)."""
    given = (config.mean, config.std)
    if config.mean is None or config.std is None:
        given = (IMAGENET_MEAN, IMAGENET_STD) if channels == 3 else (GREY_MEAN, GREY_STD)
    check_channels(config, channels)
    mean, std = (torch.tensor(values, device=device).view(1, -1, 1, 1) for values in given)
    return 255 * mean, 255 * std


def find_place_for_sockets() -> None:
    """Let workers meet in a folder whose name is short enough for a socket; TMPDIR may be longer.

    Raises:
        ConfigError: no shorter one can be written to.
    """
    given = tempfile.gettempdir()
    if len(os.fsencode(given)) <= LONGEST_TMPDIR:
        return
    for folder in SHORT_TMPDIRS:
        if os.access(folder, os.W_OK | os.X_OK):
            break
    else:
        raise ConfigError(
            f"TMPDIR={given} is too long for the sockets of loader workers: set TMPDIR to a folder "
            f"of at most {LONGEST_TMPDIR} letters, or data.num_workers=0"
        )
    before, tempfile.tempdir = tempfile.tempdir, folder
    try:
        multiprocessing.util.get_temp_dir()  # made once for this process and all that it starts
    finally:
        tempfile.tempdir = before


def _end_with_own_rank(_number: int) -> None:
    """Let this worker end with its rank, or by SIGTERM from it, and by no other's signal.

    A rank that ends waits for its workers. One that is killed leaves them to the server, which
    lives as long as they do, and is the parent whose death torch's workers look for.
    """
    rank = multiprocessing.parent_process()
    assert rank is not None

    def listen() -> None:
        while rank.is_alive():
            news = signal.sigtimedwait(SIGNALS, LOOK_SEC)
            if news and (news.si_signo, news.si_pid) == (signal.SIGTERM, rank.pid):
                break
        os._exit(0)

    threading.Thread(target=listen, name="end of the rank", daemon=True).start()


class _StepKeys:
    """The (index, seed) keys of each step, as a batch sampler."""

    def __init__(
        self,
        sampler: GlobalOrderSampler,
        train_indices: np.ndarray,
        config: DataConfig,
        first_step: int,
        last_step: int,
    ) -> None:
        self._sampler = sampler
        self._train_indices = train_indices
        self._config = config
        self._steps = range(first_step, last_step)

    def __len__(self) -> int:
        return len(self._steps)

    def __iter__(self) -> Iterator[Keys]:
        seed, generation = self._sampler.seed, self._sampler.generation
        for step in self._steps:
            share, mixing = self.step(step)
            wanted = share.indices if mixing is None else share.global_indices[mixing.positions]
            yield [
                (int(i), seed_of(seed, generation, share.epoch, int(i), 4))
                for i in self._train_indices[wanted]
            ]

    def step(self, step: int) -> tuple[StepShare, Mixing | None]:
        """Return a step's share and its mixing."""
        sampler, config = self._sampler, self._config
        share = sampler.take(step)
        if config.mixup == 0 and config.cutmix == 0:
            return share, None
        return share, plan_mixing(config, share, seed=sampler.seed, generation=sampler.generation)
