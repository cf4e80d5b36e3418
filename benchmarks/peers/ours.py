"""This toolkit's own loop: `train` as a user calls it, every guard on, its batches ready-made."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from benchmarks.peers.job import NUM_CLASSES, PEAK_LR, Batches, Job
from dist_train.checkpoint import load_state
from dist_train.config import Config
from dist_train.config.compose import compose
from dist_train.data.batch import Batch
from dist_train.data.loaders import Data
from dist_train.distributed import Ranks
from dist_train.order import GlobalOrderSampler
from dist_train.state import Parts
from dist_train.train import train
from dist_train.trial import throw_away_step

LIMIT_SEC = 60.0


class ReadyBatches:
    """The peers' batches, as the loop takes them."""

    image_shape = (3, 32, 32)

    def __init__(self, job: Job) -> None:
        self._job = job
        self._batches = Batches(job)

    def train_batches(
        self, sampler: GlobalOrderSampler, first_step: int, last_step: int
    ) -> Iterator[Batch]:
        """Yield this rank's batch of every step."""
        size = self._job.case.batch_size
        for _ in range(first_step, last_step):
            images, labels = self._batches.take()
            yield Batch(
                images=images,
                labels=labels,
                first_position=size * self._job.rank,
                global_size=size * self._job.world_size,
            )

    def some_pictures(self, count: int) -> Tensor:
        """Return pictures for a model that is initialised from some."""
        return self._batches.take()[0][:count]

    def num_eval_batches(self, split: str) -> int:
        """Return how many batches a split has: one on each rank."""
        return self._job.world_size

    def eval_batches(self, split: str, rank: int, world_size: int) -> Iterator[tuple[int, Batch]]:
        """Yield the one batch."""
        size = self._job.case.batch_size
        yield rank, Batch(images=torch.zeros(size, 3, 32, 32), labels=torch.zeros(size).long())


def ours(job: Job) -> dict[str, Tensor]:
    """Train through `train(config)`; lean writes a line and a checkpoint at the end only."""
    words = [
        "data=synthetic",
        "model=tutorial_cnn",
        f"model.factory={job.case.factory}",
        f"train.steps={job.total_steps}",
        f"train.global_batch_size={job.case.batch_size * job.world_size}",
        f"optim.lr={PEAK_LR}",
        "optim.schedule=linear",
        "optim.decay_norms_and_biases=true",
        f"precision={job.precision}",
        "model.memory_format=channels_last",  # as every peer's
        f"run_dir={job.folder}/run",
        "threads=1",
        "device=cpu",
        "eval.every_epochs=null",
        "optim.clip_norm=null",
        "optim.label_smoothing=0",
        "optim.warmup_epochs=0",
        "guards.hang_sec=600",  # while the other peers have their turns it is silent
    ]
    if job.lean:
        words += ["log_every=1000000", "checkpoint.every_steps=1000000"]

    def open_ready(
        config: Config, ranks: Ranks, *, say: Callable[[str], None] | None = None
    ) -> Data:
        size = config.train.global_batch_size
        return Data(
            name="ready-made",
            loading="ready-made",
            classes=tuple(str(label) for label in range(NUM_CLASSES)),
            notice=None,
            remarks=(),
            augmentation="none",
            image_size="",
            num_train=97 * size,
            num_val=0,
            num_test=size,
            loader=ReadyBatches(job),
        )

    def timed_step(parts: Parts, data: Data, *, step: int) -> dict[str, Any]:
        begun = time.perf_counter()
        weights = throw_away_step(parts, data, step=step)
        job.throw_away_sec += time.perf_counter() - begun
        return weights

    # While the others have their turns no time passes: else ranks would agree more often.
    turned = SimpleNamespace(monotonic=lambda: time.monotonic() - job.waited_sec)
    with (
        patch("dist_train.metrics.time", turned),
        patch("dist_train.train.open_data", open_ready),
        patch("dist_train.train.throw_away_step", timed_step),
    ):
        train(compose(words).config)
    _wait_for(job.folder / "run" / "summary.json")  # rank 0's last save comes before it
    [newest] = sorted((job.folder / "run" / "checkpoints").glob("step_*"))[-1:]
    return load_state((newest / "state.pt").read_bytes())["model"]


def _wait_for(path: Path) -> None:
    """Wait for a file of rank 0: the other ranks are done before it is."""
    end = time.monotonic() + LIMIT_SEC
    while not path.exists():
        if time.monotonic() > end:
            raise TimeoutError(f"{path} did not come within {LIMIT_SEC:.0f} s")
        time.sleep(0.05)
