"""The processes behind the DataLoader path."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dist_train.config.schema import DataConfig
from dist_train.data.worker_loader import WorkerLoader
from tests.data.test_num_workers import SHARE
from tests.data.test_worker_dataset import Items, dataset

REPOSITORY = Path(__file__).parents[2]
NUM_ITEMS, BATCH = 8, 2


def one_worker() -> tuple[BaseProcess, Iterator[Any]]:
    """Start an evaluation with one worker; return it, and the batches after the first."""
    pictures, all_of_them = dataset(Items()), np.arange(NUM_ITEMS)
    config = DataConfig(loader="workers", num_workers=1, eval_batch_size=BATCH)
    splits = {"test": (pictures, all_of_them)}
    loader = WorkerLoader(pictures, splits, all_of_them, config, torch.device("cpu"), SHARE)
    before = set(multiprocessing.active_children())
    batches = loader.eval_batches("test", 0, 1)
    next(batches)
    [worker] = set(multiprocessing.active_children()) - before
    return worker, batches


def end_by_signals() -> None:
    """End a worker by a signal of another process, and one by a signal of this process."""
    worker, batches = one_worker()
    subprocess.run(["kill", "-TERM", str(worker.pid)], check=True)
    assert [number for number, _ in batches] == [1, 2, 3]
    worker.join()
    assert worker.exitcode == 0, "it was not to heed a stranger"

    worker, batches = one_worker()
    worker.terminate()  # as multiprocessing does when a rank ends, and then waits without end
    worker.join(60)
    ended = worker.exitcode
    worker.kill()
    del batches
    assert ended == 0


def die_with_a_worker() -> None:
    """Start a worker, tell which process it is, and be killed."""
    worker, _batches = one_worker()
    sys.stdout.write(f"{worker.pid}\n")
    sys.stdout.flush()
    os.kill(os.getpid(), signal.SIGKILL)


def find_torch_imported() -> None:
    """Let the server of the workers start a process that imports nothing itself."""
    _worker, batches = one_worker()
    assert len(list(batches)) == NUM_ITEMS // BATCH - 1
    look = "import sys; sys.exit(7 if 'torchvision.transforms.v2' in sys.modules else 8)"
    process = multiprocessing.get_context("forkserver").Process(target=exec, args=(look,))
    process.start()
    process.join(60)
    assert process.exitcode == 7


def in_a_process(function: str) -> "subprocess.CompletedProcess[str]":
    # Of its own: one server forks all workers, and they inherit the mask of its signals.
    code = f"from tests.data.test_worker_loader import {function}; {function}()"
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.mark.slow
def test_a_worker_is_ended_by_its_own_rank_and_by_nobody_else() -> None:
    assert in_a_process("end_by_signals").returncode == 0


@pytest.mark.slow
def test_a_worker_need_not_import_torch_for_each_evaluation() -> None:
    assert in_a_process("find_torch_imported").returncode == 0


@pytest.mark.slow
def test_no_worker_outlives_a_rank_that_is_killed() -> None:
    done = in_a_process("die_with_a_worker")
    assert done.returncode == -signal.SIGKILL
    worker = Path("/proc", done.stdout.strip())
    end = time.monotonic() + 60
    while worker.exists() and time.monotonic() < end:
        time.sleep(0.1)
    assert not worker.exists()
