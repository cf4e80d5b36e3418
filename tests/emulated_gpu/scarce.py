"""What a run does where the host has no more memory to pin. Run by test_emulated_gpu.py."""

import json
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from dist_train.config import Config
from dist_train.pinned import pinned
from tests.emulated_gpu.kernels import allow_pinned, counted
from tests.ranks import run_ranks
from tests.settings import small

SETTINGS = (
    "model.factory=tests.nets:noisy_net",
    "optim.schedule=constant",
    "checkpoint.every_steps=5",
    "train.steps=12",
)


def trained(config: Config, scarce: bool) -> str:
    """Train; with `scarce`, no more memory can be pinned for a save than a step has pinned."""
    from dist_train import checkpoint
    from dist_train.train import train

    make_room = checkpoint.HostBuffers._room

    def without_pinned(self: Any, tensor: Any) -> Any:
        allow_pinned(counted("pinned_bytes"))
        try:
            return make_room(self, tensor)
        finally:
            allow_pinned(1 << 40)

    with mock.patch.object(
        checkpoint.HostBuffers, "_room", without_pinned if scarce else make_room
    ):
        return train(config)["weights_sha256"]


def counted_copies(config: Config, scarce: bool) -> tuple[str, int]:
    """Train; with `scarce`, no memory can be pinned for a batch; returns pageable copies, too."""
    from dist_train.train import train

    pin_memory = torch.Tensor.pin_memory

    def without_more(self: torch.Tensor, *args: Any) -> torch.Tensor:
        allow_pinned(counted("pinned_bytes"))
        try:
            return pin_memory(self, *args)
        finally:
            allow_pinned(1 << 40)

    with mock.patch.object(torch.Tensor, "pin_memory", without_more if scarce else pin_memory):
        return train(config)["weights_sha256"], counted("pageable")


@pytest.mark.parametrize(
    "options",
    [
        ("data.mixup=0.4",),
        ("guards.lag=1",),
        ("data.loader=workers", "data.image_size=12", "data.num_workers=0"),
        ("data.loader=workers", "data.image_size=12", "data.num_workers=1"),
    ],
)
def test_a_step_is_taken_without_pinned_memory(options: tuple[str, ...], tmp_path: Path) -> None:
    clean, scarce = (
        run_ranks(counted_copies, 1, small(tmp_path / str(scarce), *SETTINGS, *options), scarce)[0]
        for scarce in (False, True)
    )
    assert scarce[0] == clean[0]
    assert scarce[1] >= clean[1] + 12, "every step copies through other memory"
    lines = (tmp_path / "True" / "events.jsonl").read_text().splitlines()
    assert "out_of_memory" not in [json.loads(line)["event"] for line in lines]


def test_whoever_cannot_pin_memory_is_told() -> None:
    tensor = torch.zeros(1 << 22)
    allow_pinned(counted("pinned_bytes"))
    try:
        with pytest.warns(RuntimeWarning, match="no more host memory can be pinned"):
            assert pinned(tensor) is tensor
    finally:
        allow_pinned(1 << 40)
    assert pinned(tensor).is_pinned()


def told(run: Path) -> list[str]:
    lines = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    return [line["reason"] for line in lines if line["event"] == "save_failed"]


def test_a_save_is_made_without_pinned_memory(tmp_path: Path) -> None:
    [clean] = run_ranks(trained, 1, small(tmp_path / "a", *SETTINGS), False)
    assert told(tmp_path / "a") == []
    run_ranks(trained, 1, small(tmp_path / "b", *SETTINGS, "train.steps=7"), True)
    assert ["can be pinned" in reason for reason in told(tmp_path / "b")] == [True]
    [resumed] = run_ranks(trained, 1, small(tmp_path / "b", *SETTINGS), True)
    assert resumed == clean
