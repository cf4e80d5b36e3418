"""NCCL takes memory of its own at its first sum, and finds it. Run by test_emulated_gpu.py."""

import json
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor

from dist_train.config import Config
from tests import test_gpu
from tests.emulated_gpu.kernels import allow_on_device, take_on_device
from tests.ranks import run_ranks
from tests.settings import small

OWN = 32 << 20


def trained(config: Config, most: int | None) -> int:
    """Train on a GPU of so much memory; returns the most that torch has held of it."""
    all_reduce, taken = dist.all_reduce, []

    def as_nccl(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        if tensor.is_cuda and not taken:
            if not take_on_device(OWN):
                raise dist.DistBackendError(
                    "NCCL: unhandled cuda error: Cuda failure 'out of memory'"
                )
            taken.append(OWN)
        return all_reduce(tensor, *args, **kwargs)

    if most is not None:
        allow_on_device(most)
    with mock.patch.object(dist, "all_reduce", as_nccl):
        test_gpu.trained(config)
    assert taken, "nothing was summed"
    return torch.cuda.max_memory_reserved()


def test_auto_leaves_nccl_its_memory(tmp_path: Path) -> None:
    options = (*test_gpu.LARGE, "train.global_batch_size=128")
    [whole] = run_ranks(trained, 1, small(tmp_path / "free", *options), None)
    config = small(tmp_path / "auto", *options, "train.micro_batch_size=auto")
    run_ranks(trained, 1, config, whole + OWN // 8)
    lines = [json.loads(x) for x in (tmp_path / "auto" / "events.jsonl").read_text().splitlines()]
    [found] = [line for line in lines if line["event"] == "micro_batch_size"]
    assert 0 < found["sizes"][0] < 128, "there was memory for both"
    assert not [line for line in lines if line["event"] == "out_of_memory"], "it did not fit"
