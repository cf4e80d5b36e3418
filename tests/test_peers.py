"""The loop against the same job written by hand: the same bits, so that their speeds compare."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks.peers import loops
from benchmarks.peers.__main__ import check_same, make_table
from benchmarks.peers.job import CASES, Case, Job, measured
from tests.ranks import run_ranks

SHORT = Case("benchmarks.peers.job:tiny_net", 16, 0, 2)


def end_of(peer: str, world_size: int, folder: Path) -> str:
    """Return the digest of the weights that a peer ends with."""
    import os

    from benchmarks.peers import ours

    torch.set_num_threads(1)
    rank = int(os.environ.get("RANK", "0"))
    job = Job(
        case=SHORT, rank=rank, world_size=world_size, precision="fp32", lean=True, folder=folder
    )
    train = {"fast": loops.fast, "plain": loops.plain, "ours": ours.ours}[peer]
    result = measured(job, train(job), begun=0.0)
    assert result["steps"] == SHORT.epochs * 97
    return str(result["weights_sha256"])


@pytest.mark.parametrize("world_size", [1, 2])
def test_the_loop_has_the_bits_of_one_written_by_hand(world_size: int, tmp_path: Path) -> None:
    ours = run_ranks(end_of, world_size, "ours", world_size, tmp_path)
    fast = run_ranks(end_of, world_size, "fast", world_size, tmp_path)
    assert len({*ours, *fast}) == 1


def digest_of(weights: dict[str, torch.Tensor], job: Job) -> tuple[object, object]:
    result = measured(job, weights, begun=0.0)
    return result["weights_sha256"], result["norm"]


def test_a_rank_s_own_running_statistics_are_not_compared(tmp_path: Path) -> None:
    job = Job(CASES["resnet9"], 0, 1, precision="fp32", lean=True, folder=tmp_path)
    job.cpu_sec = job.wall_sec = [float(n) for n in range(job.total_steps)]
    job.children_sec = [0.0]
    model = job.model()
    here = digest_of(model.state_dict(), job)
    for buffer in model.buffers():
        buffer.add_(1)
    assert digest_of(model.state_dict(), job) == here
    with torch.no_grad():
        next(model.parameters()).add_(1e-3)
    assert digest_of(model.state_dict(), job) != here


class OlderWrapper(nn.Module):
    """DistributedDataParallel by the arguments of torch 2.11."""

    def __init__(
        self, module: nn.Module, *, broadcast_buffers: bool, gradient_as_bucket_view: bool
    ) -> None:
        super().__init__()
        self.module = module
        assert not broadcast_buffers

    def forward(self, images: torch.Tensor) -> Any:
        return self.module(images)


def test_the_fast_loop_runs_on_an_older_torch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loops, "DistributedDataParallel", OlderWrapper)
    monkeypatch.setattr(Job, "start_group", lambda job: None)
    job = Job(SHORT, 0, 2, precision="fp32", lean=True, folder=tmp_path)
    assert loops.fast(job)
    assert job.asked == job.total_steps


def record_of(peer: str, number: int, cpu_us: float, digest: str = "a") -> dict[str, object]:
    cell = {"round": number, "ranks": 1, "precision": "fp32", "style": "lean", "peer": peer}
    rates = {"images_per_sec": 5.0, "first_step_sec": 2.0, "peak_rss_mib": 700.0}
    return {**cell, **rates, "cpu_us": cpu_us, "weights_sha256": digest, "norm": 1.0}


def test_differences_are_paired_by_round() -> None:
    runs = [record_of("fast", n, 1000.0 + 300 * n) for n in range(3)]
    runs += [record_of("ours", n, 1010.0 + 300 * n + n) for n in range(3)]
    about = {"case": "tiny", "date": "2026-01-01", "machine": {}, "versions": {}}
    [line] = [x for x in make_table({"runs": runs, **about}).splitlines() if "| ours |" in x]
    assert "| 1,311 |" in line
    assert "| +11 +- 2 |" in line


def test_peers_that_did_another_job_are_refused() -> None:
    with pytest.raises(SystemExit, match="different weights"):
        check_same({"fast": record_of("fast", 0, 1.0), "ours": record_of("ours", 0, 1.0, "b")})
