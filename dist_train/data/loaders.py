"""From the configuration to batches: the source, the validation split, and the loader that fits."""

import contextlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from dist_train.config import Config, ConfigError
from dist_train.config.augmentation import described, in_force
from dist_train.config.streams import put
from dist_train.data.batch import Batch
from dist_train.data.content import content_of
from dist_train.data.image_size import Settled
from dist_train.data.memory_loader import MemoryLoader
from dist_train.data.num_workers import NodeShare, share_of_node
from dist_train.data.pictures import Pictures
from dist_train.data.sources import load_source, needs_a_first
from dist_train.data.splits import Source
from dist_train.data.worker_dataset import WorkerPictures
from dist_train.data.worker_loader import WorkerLoader
from dist_train.distributed import Ranks
from dist_train.order import GlobalOrderSampler, seed_of

WITH_STAND_IN = ("quickstart",)  # experiments that generated images will do for


class Loader(Protocol):
    """What the loop needs of a data path."""

    @property
    def image_shape(self) -> tuple[int, int, int]: ...

    def train_batches(
        self, sampler: GlobalOrderSampler, first_step: int, last_step: int
    ) -> Iterator[Batch]: ...

    def some_pictures(self, count: int) -> Tensor: ...

    def num_eval_batches(self, split: str) -> int: ...

    def eval_batches(
        self, split: str, rank: int, world_size: int
    ) -> Iterator[tuple[int, Batch]]: ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Data:
    """The pictures of a run: train, validation and test never overlap."""

    name: str  # `dataset` of every result
    classes: tuple[str, ...]
    notice: str | None
    remarks: tuple[str, ...]
    augmentation: str  # what is done to training images
    image_size: str  # of all images, and whether it is their own
    loading: str  # in memory, or by how many workers
    num_train: int
    num_val: int
    num_test: int
    loader: Loader
    content: str = ""  # a digest of files, images and labels; empty: not known

    @property
    def num_classes(self) -> int:
        return len(self.classes)

    @property
    def eval_split(self) -> str:
        """Return the split that is evaluated during training."""
        return "val" if self.num_val else "test"

    def fingerprint(self) -> dict[str, str | int]:
        """Return what must be the same when a run is resumed."""
        return {
            "name": self.name,
            "num_classes": self.num_classes,
            "num_train": self.num_train,
            "num_val": self.num_val,
            "num_test": self.num_test,
            "loader": type(self.loader).__name__,
            "image_shape": "x".join(str(side) for side in self.loader.image_shape),
        }


def open_data(config: Config, ranks: Ranks, *, say: Callable[[str], None] | None = None) -> Data:
    """Load the source on every rank and put the loader on it. Collective.

    Args:
        config: of the run.
        ranks: whose hearts beat while pictures are decoded: the start may take as long as that.
        say: told on rank 0 how far it is; None: standard error is.

    Raises:
        ConfigError: a missing or damaged file, or nodes that see different data; on all ranks.
    """
    one_first = ranks.any(ranks.together(lambda: needs_a_first(config.data)))
    take_turns = ranks.first_of_node_first if one_first else ranks.together

    def sign(line: str | None) -> None:
        ranks.pulse.enter("start")
        if line is not None and ranks.rank == 0:
            (say or _to_stderr)(line)

    may_stand_in = config.experiment in WITH_STAND_IN
    source = take_turns(lambda: load_source(config.data, sign, may_stand_in=may_stand_in))
    how = "in memory" if isinstance(source.train, Pictures) else "through workers"
    names = ranks.gather((source.name, len(source.train), len(source.test), how))
    odd = next((rank for rank, name in enumerate(names) if name != names[0]), None)
    if odd is not None:
        raise ConfigError(
            f"rank {odd} sees other data {names[odd]} than rank 0 {names[0]}: give every node the "
            "same files (data.root), and set data.name"
        )
    train, val = split_indices(len(source.train), config.data.val_fraction, config.seed)
    share = share_of_node(ranks, config)
    data = ranks.together(lambda: _make(config, source, train, val, ranks.device, share))
    sizes = ranks.gather((data.image_size, data.loader.image_shape))
    odd = next((rank for rank, size in enumerate(sizes) if size != sizes[0]), None)
    if odd is not None:
        raise ConfigError(
            f"rank {odd} sees other images {sizes[odd]} than rank 0 {sizes[0]}: let an item's size "
            "depend on its index alone, or set data.image_size"
        )
    return data


def split_indices(num: int, val_fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the sorted indices of the training and the validation part: disjoint, by the seed."""
    count = round(num * val_fraction)
    order = np.random.Generator(np.random.Philox(key=seed_of(seed, 5))).permutation(num)
    return np.sort(order[count:]), np.sort(order[:count])


def _make(
    config: Config,
    source: Source,
    train: np.ndarray,
    val: np.ndarray,
    device: torch.device,
    share: NodeShare,
) -> Data:
    test = np.arange(len(source.test))
    settled = in_force(config.data, source.name)
    in_memory = isinstance(source.train, Pictures) and isinstance(source.test, Pictures)
    if isinstance(source.train, Pictures) and isinstance(source.test, Pictures):
        if source.train.images.shape[1:] != source.test.images.shape[1:]:
            raise ConfigError(
                f"{source.name}: training pictures are {source.train.images.shape[1:]} (height, "
                f"width, channels), test pictures {source.test.images.shape[1:]}: set "
                "data.loader=workers, which brings them to one size"
            )
        pictures = {"val": (source.train, val), "test": (source.test, test)}
        if settled.randaugment:
            raise ConfigError(
                f"data.randaugment=true works on single images, and {source.name} is in memory: "
                "set data.loader=workers, or data.randaugment=false"
            )
        loader: Loader = MemoryLoader(source.train, pictures, train, settled, device)
        height, width = loader.image_shape[1:]
        images = Settled(size=f"{width}x{height}, as they are", resized=False)
        loading = "in memory"
    else:
        if settled.flip == "alternating":
            raise ConfigError(
                f"data.flip=alternating is for pictures in memory, and {source.name} goes through "
                "workers: set data.flip=true"
            )
        assert isinstance(source.train, WorkerPictures)
        assert isinstance(source.test, WorkerPictures)
        parts = {"val": (source.train, val), "test": (source.test, test)}
        loader = WorkerLoader(source.train, parts, train, settled, device, share)
        images, loading = loader.settled, f"through {loader.num_workers} workers a rank"
    return Data(
        name=source.name,
        classes=source.classes,
        notice=source.notice,
        remarks=source.remarks + images.remarks,
        augmentation=described(settled, in_memory=in_memory, resized=images.resized),
        image_size=images.size,
        loading=loading,
        num_train=len(train),
        num_val=len(val),
        num_test=len(test),
        loader=loader,
        content=content_of(source.train, source.test),
    )


def _to_stderr(line: str) -> None:
    with contextlib.suppress(OSError, ValueError):
        put(sys.stderr, f"dist_train: {line}\n")
