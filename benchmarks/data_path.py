"""The data path by itself and in training: `python -m benchmarks run data_path`.

Pictures a second and core, by the CPU's clock, of crop, flip, cutout and normalisation; then
ResNet-9 trained from the loader against the same loop on one batch that is always ready. All in
turns, each ratio of one round.
"""

import random
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms
from torchvision.transforms import v2

from benchmarks.intervals import mean_and_half_width, plus_minus
from benchmarks.opened import opened
from dist_train.config import DataConfig
from dist_train.config.compose import compose
from dist_train.data.memory_loader import MemoryLoader
from dist_train.data.pictures import Pictures
from dist_train.distributed import start_ranks
from dist_train.order import GlobalOrderSampler
from dist_train.step import train_step

NUM, BATCH, HOLE = 20_000, 512, 8
ROUNDS, BLOCK_SEC, PAIRS = 20, 1.5, 40
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
HOLE_SHARE = (HOLE / 32) ** 2


class OneByOne(Dataset[tuple[Any, int]]):
    """What most users write: a data set whose items go through torchvision's transforms."""

    def __init__(self, images: np.ndarray, transform: Any, *, as_tensor: bool) -> None:
        self._images = images
        self._tensors = torch.from_numpy(images).permute(0, 3, 1, 2) if as_tensor else None
        self._transform = transform

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        if self._tensors is not None:
            return self._transform(self._tensors[index]), 0
        return self._transform(Image.fromarray(self._images[index])), 0


def ways(images: np.ndarray) -> dict[str, Iterator[Tensor]]:
    """Return endless batches, (512, 3, 32, 32) float32, of each way to make them."""
    pil = transforms.Compose(
        [
            transforms.RandomCrop(32, padding=4, padding_mode="reflect"),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(MEAN, STD),
            transforms.RandomErasing(p=1.0, scale=(HOLE_SHARE, HOLE_SHARE), ratio=(1.0, 1.0)),
        ]
    )
    tensors = v2.Compose(
        [
            v2.RandomCrop(32, padding=4, padding_mode="reflect"),
            v2.RandomHorizontalFlip(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(MEAN, STD),
            v2.RandomErasing(p=1.0, scale=(HOLE_SHARE, HOLE_SHARE), ratio=(1.0, 1.0)),
        ]
    )
    config = DataConfig(cutout=HOLE, mean=MEAN, std=STD)
    pictures = Pictures(images=images, labels=np.zeros(NUM, dtype=np.int64))
    loader = MemoryLoader(pictures, {}, np.arange(NUM), config, torch.device("cpu"))
    sampler = GlobalOrderSampler(NUM, global_batch_size=BATCH, rank=0, world_size=1, seed=0)
    ready = torch.rand(BATCH, 3, 32, 32).contiguous(memory_format=torch.channels_last)

    def endless(dataset: Dataset[tuple[Any, int]]) -> Iterator[Tensor]:
        while True:
            for batch, _ in DataLoader(dataset, BATCH, shuffle=True, drop_last=True):
                yield batch

    def copies() -> Iterator[Tensor]:
        while True:
            yield ready.clone()

    return {
        "torchvision on PIL, DataLoader": endless(OneByOne(images, pil, as_tensor=False)),
        "torchvision v2 on tensors, DataLoader": endless(OneByOne(images, tensors, as_tensor=True)),
        "here": (batch.images for batch in loader.train_batches(sampler, 0, 1 << 40)),
        "copying a batch that is ready": copies(),
    }


def rate_of(batches: Iterator[Tensor]) -> float:
    """Return pictures a second of CPU time."""
    next(batches)
    count, start = 0, time.process_time()
    while time.process_time() - start < BLOCK_SEC:
        assert next(batches).shape == (BATCH, 3, 32, 32)
        count += BATCH
    return count / (time.process_time() - start)


def loading() -> dict[str, Any]:
    """Return pictures a second and core of each way, and how many times PIL's that is."""
    torch.set_num_threads(1)
    images = np.random.default_rng(0).integers(0, 256, (NUM, 32, 32, 3), dtype=np.uint8)
    made = ways(images)
    rates: dict[str, list[float]] = {name: [] for name in made}
    dice = random.Random(0)
    for _ in range(ROUNDS):
        for name in dice.sample(sorted(made), len(made)):
            rates[name].append(rate_of(made[name]))
    base = rates["torchvision on PIL, DataLoader"]
    return {
        name: {
            "images_per_sec_and_core": mean_and_half_width(found),
            "times_pil": mean_and_half_width([a / b for a, b in zip(found, base, strict=True)]),
        }
        for name, found in rates.items()
    }


def training() -> dict[str, Any]:
    """Return how fast ResNet-9 trains from the loader, as a share of that on one ready batch."""
    words = ["experiment=cifar10_resnet9", "data=synthetic", "train.global_batch_size=128"]
    words += ["device=cpu", "data.cutout=8"]
    with tempfile.TemporaryDirectory() as folder:
        config = compose([*words, f"run_dir={folder}/run"]).config
        with start_ranks(config) as ranks, opened(config, ranks) as it:
            parts, feed = it.parts, it.feed
            held = feed.take(0)
            step = 0

            def block(take: Callable[[int], Any]) -> float:
                nonlocal step
                start = time.perf_counter()
                for _ in range(6):
                    step += 1
                    train_step(parts, _Taking(take), step=step)  # type: ignore[arg-type] # as a Feed
                return time.perf_counter() - start

            kinds: list[Callable[[int], Any]] = [feed.take, lambda step: held]
            dice, shares = random.Random(0), []
            for take in kinds:
                block(take)  # warm
            for _ in range(PAIRS):
                sec = {}
                for number in dice.sample((0, 1), 2):
                    sec[number] = block(kinds[number])
                shares.append(sec[1] / sec[0])
    return {
        "share_of_ready_speed": mean_and_half_width(shares),
        "pairs": len(shares),
        "precision": parts.precision,
    }


class _Taking:
    """A feed of which only `take` is used."""

    def __init__(self, take: Callable[[int], Any]) -> None:
        self.take = take


def measure() -> dict[str, Any]:
    """Measure both."""
    return {"training": training(), "loading": loading()}


def table(found: dict[str, Any]) -> str:
    """Return the results as Markdown."""
    lines = [
        f"Crop, flip, cutout and normalisation, batches of {BATCH}, {ROUNDS} rounds in turns.",
        "",
        "| what makes the batches | pictures a second and core | times PIL |",
        "|---|---|---|",
    ]
    for name, values in found["loading"].items():
        rate = plus_minus(values["images_per_sec_and_core"], 0)
        lines.append(f"| {name} | {rate} | {plus_minus(values['times_pil'], 1)} |")
    mean, half = (100 * value for value in found["training"]["share_of_ready_speed"])
    return "\n".join(
        [
            *lines,
            "",
            f"ResNet-9 ({found['training']['precision']}, batches of 128) trained from it: "
            f"{mean:.1f} +- {half:.1f} % of the speed on one batch that is ready "
            f"({found['training']['pairs']} pairs).",
        ]
    )
