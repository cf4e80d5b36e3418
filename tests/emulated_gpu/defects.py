"""Planted defects: each must come to light on the emulated GPU. Run by test_emulated_gpu.py."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dist_train.config import Config
from dist_train.data import batch, memory_loader
from tests.nets import noisy_net
from tests.ranks import run_ranks, start_ranks_of
from tests.settings import small

SETTINGS = ("model.factory=tests.nets:noisy_net", "optim.schedule=constant", "train.steps=12")


def nothing(*_args: Any, **_kwargs: Any) -> None:
    pass


@contextmanager
def an_event_is_not_waited_for() -> Iterator[None]:
    with mock.patch.object(torch.cuda.Event, "synchronize", nothing):
        yield


@contextmanager
def a_copy_is_not_waited_for() -> Iterator[None]:
    with mock.patch.object(torch.cuda.Stream, "synchronize", nothing):
        yield


@contextmanager
def pinned_memory_is_used_again() -> Iterator[None]:
    """Let all arrays of a form go to the device through one pinned tensor."""
    kept: dict[Any, Tensor] = {}

    def copied_to(device: torch.device, array: np.ndarray) -> Tensor:
        tensor = torch.from_numpy(array)
        form = (tensor.shape, tensor.dtype)
        if form not in kept:
            kept[form] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        return kept[form].copy_(tensor).to(device, non_blocking=True)

    with (
        mock.patch.object(batch, "copied_to", copied_to),
        mock.patch.object(memory_loader, "copied_to", copied_to),
    ):
        yield


@contextmanager
def none() -> Iterator[None]:
    yield


def trained(config: Config, defect: Callable[[], Any]) -> str:
    """Train with a defect; returns the digest of the weights."""
    from dist_train.train import train

    with defect(), mock.patch("dist_train.metrics.AGREE_EVERY_SEC", 1e9):  # lines alone decide
        return train(config)["weights_sha256"]


def digest(run_dir: Path, defect: Callable[[], Any], *options: str) -> str:
    [found] = run_ranks(trained, 1, small(run_dir, *SETTINGS, *options), defect)
    return found


@pytest.mark.parametrize("defect", [none, an_event_is_not_waited_for])
def test_a_flag_that_is_read_before_it_arrives_skips_steps(
    defect: Callable[[], Any], tmp_path: Path
) -> None:
    options = ("guards.lag=1", "log_every=12", "data.val_fraction=0", "guards.max_consecutive=99")
    digest(tmp_path, defect, *options)
    events = [json.loads(x) for x in (tmp_path / "events.jsonl").read_text().splitlines()]
    skipped = [e for e in events if e["event"] == "skipped_step"]
    assert bool(skipped) == (defect is an_event_is_not_waited_for)


def test_a_state_that_is_saved_before_it_arrives_is_not_that_of_the_run(tmp_path: Path) -> None:
    options = ("checkpoint.every_steps=5",)
    clean = digest(tmp_path / "a", none, *options)
    for name, defect in (("b", none), ("c", a_copy_is_not_waited_for)):
        digest(tmp_path / name, defect, *options, "train.steps=7")
        [resumed] = start_ranks_of(trained, 1, small(tmp_path / name, *SETTINGS, *options), none)
        assert (resumed.value == clean) == (defect is none), resumed


def test_pinned_memory_that_is_used_too_early_ends_the_rank(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match=r"changed \d+ times before the device had read it"):
        digest(tmp_path, pinned_memory_is_used_again)


class OnTheCpu(nn.Module):
    """A net that scales by a tensor of the CPU, which no state holds."""

    def __init__(self, num_classes: int, scale: Tensor) -> None:
        super().__init__()
        self.net = noisy_net(num_classes)
        self.scale = scale

    def forward(self, images: Tensor) -> Tensor:
        return self.net(images) * self.scale


def net_with_a_tensor_of_the_cpu(num_classes: int) -> nn.Module:
    return OnTheCpu(num_classes, torch.ones(num_classes))


def net_with_a_number(num_classes: int) -> nn.Module:
    return OnTheCpu(num_classes, torch.tensor(1.0))


def test_a_tensor_of_the_cpu_in_a_step_ends_the_rank(tmp_path: Path) -> None:
    factory = f"model.factory={__name__}:net_with_"
    digest(tmp_path / "a", none, f"{factory}a_number")
    config = small(tmp_path / "b", *SETTINGS, f"{factory}a_tensor_of_the_cpu")
    [outcome] = start_ranks_of(trained, 1, config, none)
    assert "mul: tensors are on ['cuda:0', 'cpu']" in str(outcome.error), outcome.trace
