"""The gradient of a global batch is the same however it is cut."""

from pathlib import Path
from unittest import mock

import pytest
import torch

from dist_train.config import Config
from dist_train.parallel import Replica
from tests.ranks import run_ranks
from tests.settings import small

CUTS = {
    "whole shares": (),
    "accumulation": ("train.micro_batch_size=4",),
    "uneven shares": ("train.global_batch_size=23",),
    "uneven and accumulated": ("train.global_batch_size=23", "train.micro_batch_size=3"),
}


def gradients(config: Config) -> dict[str, torch.Tensor]:
    """Return the reduced gradients of the first step."""
    from dist_train.train import train

    kept: dict[str, torch.Tensor] = {}
    real = Replica.clip

    def keep(replica: Replica, max_norm: float | None) -> torch.Tensor:
        for name, param in replica.module.named_parameters():
            assert param.grad is not None
            kept[name] = param.grad.detach().clone()
        return real(replica, max_norm)

    with mock.patch.object(Replica, "clip", keep):
        train(config)
    return kept


@pytest.mark.slow
@pytest.mark.parametrize("sync", ["flat", "ddp"])
@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize(("net", "tolerance"), [("double_net", 1e-12), ("plain_net", 5e-5)])
def test_gradients_of_2_and_3_ranks_equal_those_of_one(
    sync: str, cut: str, net: str, tolerance: float, tmp_path: Path
) -> None:
    base = (f"model.factory=tests.nets:{net}", "train.steps=1", f"parallel.sync={sync}")
    size = [o for o in CUTS[cut] if "global" in o]
    reference = run_ranks(gradients, 1, small(tmp_path / "1", *base, *size))[0]
    for world_size in (2, 3):
        config = small(tmp_path / str(world_size), *base, *CUTS[cut])
        for found in run_ranks(gradients, world_size, config):
            for name, expected in reference.items():
                difference = (found[name] - expected).norm() / expected.norm()
                assert difference <= tolerance, f"{name} on {world_size} ranks"


def test_ranks_hold_the_same_gradients_to_the_bit(tmp_path: Path) -> None:
    config = small(tmp_path, "train.steps=1", "train.micro_batch_size=3")
    first, *others = run_ranks(gradients, 3, config)
    for other in others:
        assert all(torch.equal(first[name], other[name]) for name in first)


def test_one_process_without_a_launcher_has_the_gradients_of_one_rank(tmp_path: Path) -> None:
    alone = run_ranks(gradients, 0, small(tmp_path / "a", "train.steps=1"))[0]
    launched = run_ranks(gradients, 1, small(tmp_path / "b", "train.steps=1"))[0]
    assert all(torch.equal(alone[name], launched[name]) for name in alone)
