"""What becomes of ranks on GPUs whose peer is gone. Run by test_emulated_gpu.py.

NCCL's kernel waits for the peer's data for ever, and the host in it runs no handler of a signal.
"""

import ctypes
import json
import os
import signal
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from dist_train.config import Config
from dist_train.distributed import start_ranks
from tests.emulated_gpu import nccl
from tests.faults import Fault, train_with
from tests.ranks import start_ranks_of
from tests.settings import small

SETTINGS = ("model.factory=tests.nets:noisy_net", "log_every=1", "guards.hang_sec=600")


def for_ever() -> None:
    """Wait in C for a lock that this thread holds."""
    libc, lock = ctypes.CDLL(None), ctypes.create_string_buffer(64)
    libc.pthread_mutex_lock(lock)
    libc.pthread_mutex_lock(lock)


def as_on_nccl(config: Config, fault: Fault) -> Any:
    """Train; who waits for the sum of a rank that is gone never comes back."""
    real = nccl.Collectives._finish

    def finish(self: nccl.Collectives, place: int) -> None:
        try:
            real(self, place)
        except RuntimeError:
            for_ever()

    with mock.patch.object(nccl.Collectives, "_finish", finish):
        return train_with(config, fault)


@pytest.mark.parametrize("kind", ["kill", "broken device"])
def test_ranks_that_wait_in_cuda_for_one_that_is_gone_are_ended(kind: str, tmp_path: Path) -> None:
    fault = Fault(rank=1, step=5, place="before the step", kind=kind, mark=str(tmp_path / "fired"))
    config = small(tmp_path / "run", *SETTINGS)
    waiting, gone = start_ranks_of(as_on_nccl, 2, config, fault)
    assert (tmp_path / "fired").exists()
    assert waiting.exit_code == -signal.SIGKILL, waiting
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert (status["state"], status["step"]) == ("failed", 5)
    events = [json.loads(x) for x in (tmp_path / "run" / "events.jsonl").read_text().splitlines()]
    [ended] = [event["reason"] for event in events if event["event"] == "hang"]
    assert f"they wait for rank 1 on {os.uname().nodename}, which has ended" in ended
    if kind == "kill":
        assert status["reason"] == ended
        assert "died" in [event["event"] for event in events]
    else:
        assert isinstance(gone.error, torch.AcceleratorError), "it tells the cause itself"
        assert "misaligned address" in status["reason"]


def setting_of_nccl(config: Config) -> str | None:
    """Return what NCCL's own thread is told of errors."""
    with start_ranks(config):
        return os.environ.get("TORCH_NCCL_RETHROW_CUDA_ERRORS")


@pytest.mark.parametrize(
    ("watchdog", "own", "expected"), [(True, None, "0"), (True, "1", "1"), (False, None, None)]
)
def test_a_broken_gpu_is_told_by_python_where_the_monitor_ends_what_hangs(
    watchdog: bool, own: str | None, expected: str | None, tmp_path: Path
) -> None:
    config = small(tmp_path, f"guards.watchdog={str(watchdog).lower()}")
    env = {} if own is None else {"TORCH_NCCL_RETHROW_CUDA_ERRORS": own}
    [outcome] = start_ranks_of(setting_of_nccl, 1, config, env=env)
    assert outcome.value == expected, outcome.trace


def on_two_nodes(config: Config, fault: Fault) -> Any:
    """Train; each rank has a monitor of its own, as on another machine."""
    os.environ |= {"GROUP_RANK": os.environ["RANK"], "LOCAL_WORLD_SIZE": "1"}
    return as_on_nccl(config, fault)


@pytest.mark.parametrize("rank", [0, 1])
def test_monitors_of_other_nodes_hear_of_a_node_whose_ranks_are_all_dead(
    rank: int, tmp_path: Path
) -> None:
    fault = Fault(rank=rank, step=5, place="before the step", kind="kill", mark=str(tmp_path / "f"))
    start_ranks_of(on_two_nodes, 2, small(tmp_path / "run", *SETTINGS), fault)
    events = [json.loads(x) for x in (tmp_path / "run" / "events.jsonl").read_text().splitlines()]
    ended = [event["reason"] for event in events if event["event"] == "hang"]
    assert any(f"they wait for rank {rank} on" in reason for reason in ended), events
