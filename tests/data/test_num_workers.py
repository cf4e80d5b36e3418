"""data.num_workers=auto: a core for each worker, and memory for what each of them holds."""

import os
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

from dist_train.config.compose import compose
from dist_train.data import num_workers
from dist_train.data.loaders import open_data
from dist_train.data.num_workers import BATCHES, MOST, OWN_BYTES, NodeShare, share_of_node
from dist_train.data.worker_loader import WorkerLoader
from dist_train.distributed import single_process
from tests.ranks import run_ranks
from tests.settings import small

GIB = 1 << 30
SHARE = NodeShare(cores=1, memory_bytes=GIB, batch_size=2)


@pytest.mark.parametrize(
    ("cores", "gib", "batch_size", "data_set_bytes", "expected"),
    [
        (12.0, 100, 64, 0, 12),
        (1.5, 100, 64, 0, 1),
        (0.25, 100, 64, 0, 1),
        (128.0, 900, 64, 0, MOST),
        (12.0, 4, 256, 0, 4 * GIB // (OWN_BYTES + BATCHES * 256 * 600_000)),
        (12.0, 8, 64, 3 * GIB, 2),
        (12.0, 8, 64, 30 * GIB, 1),
    ],
)
def test_cores_and_memory_decide(
    cores: float, gib: int, batch_size: int, data_set_bytes: int, expected: int
) -> None:
    share = NodeShare(cores=cores, memory_bytes=gib * GIB, batch_size=batch_size)
    assert share.num_workers(data_set_bytes=data_set_bytes, image_bytes=600_000) == expected


def cores_of(config: Any, dealt_out: list[set[int]], hosts: list[str], quota: Any) -> float:
    """Return a rank's share where SLURM or torchrun has dealt out cores like this."""
    from dist_train.distributed import start_ranks

    rank = int(os.environ["RANK"])
    with (
        start_ranks(config) as ranks,
        mock.patch.object(num_workers.os, "sched_getaffinity", return_value=dealt_out[rank]),
        mock.patch.object(num_workers.socket, "gethostname", return_value=hosts[rank]),
        mock.patch.object(num_workers, "quota_cores", return_value=quota),
    ):
        share = share_of_node(ranks, config)
        assert share.batch_size == 16, "of an evaluation: a step's are 12"
        return share.cores


@pytest.mark.parametrize(
    ("dealt_out", "hosts", "quota", "expected"),
    [
        ([set(range(8)), set(range(8))], ["a", "a"], None, [4, 4]),  # torchrun
        ([{0, 1, 2}, {3, 4, 5}], ["a", "a"], None, [3, 3]),  # srun --cpus-per-task=3
        ([set(range(8)), set(range(2))], ["a", "b"], None, [8, 2]),  # two nodes
        ([set(range(8)), set(range(8))], ["a", "a"], 3.0, [1.5, 1.5]),  # docker --cpus=3
    ],
)
def test_ranks_share_the_cores_of_their_node(
    dealt_out: list[set[int]],
    hosts: list[str],
    quota: float | None,
    expected: list[float],
    tmp_path: Path,
) -> None:
    config = small(tmp_path)
    assert run_ranks(cores_of, 2, config, dealt_out, hosts, quota) == expected


class Held:
    """A data set that each worker gets a copy of, in arrays and objects; a tensor is shared."""

    num_classes = 2

    def __init__(self, *, megabytes: int) -> None:
        self.array = np.zeros((megabytes, 1 << 20), dtype=np.uint8)
        self.shared = torch.zeros(64 << 20, dtype=torch.uint8)

    def __len__(self) -> int:
        return 40

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return torch.zeros(3, 8, 8, dtype=torch.uint8), index % 2


def held(*, train: bool, megabytes: int) -> Held:
    return Held(megabytes=megabytes)


@pytest.mark.parametrize(
    ("megabytes", "asked", "expected"), [(1, "auto", 7), (64, "auto", 3), (64, 5, 5)]
)
def test_a_large_data_set_has_fewer_workers_unless_a_number_is_given(
    megabytes: int, asked: Any, expected: int
) -> None:
    config = compose(
        [
            f"data.name={__name__}:held",
            f"data.args.megabytes={megabytes}",
            f"data.num_workers={asked}",
            "data.eval_batch_size=4",
            "train.global_batch_size=4",
        ]
    ).config
    left = 2 * 7 * (OWN_BYTES + (2 << 20))
    with (
        mock.patch.object(num_workers, "host_memory_left", return_value=left),
        mock.patch.object(num_workers.os, "sched_getaffinity", return_value=set(range(12))),
    ):
        data = open_data(config, single_process())
    assert isinstance(data.loader, WorkerLoader)
    assert data.loader.num_workers == expected
    assert data.loading == f"through {expected} workers a rank"
