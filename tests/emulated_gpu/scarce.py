"""What a run does where the host has no more memory to pin. Run by test_emulated_gpu.py."""

import json
from pathlib import Path
from typing import Any
from unittest import mock

from dist_train.config import Config
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
