"""The processes behind the DataLoader path."""

import multiprocessing
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from dist_train.config.schema import DataConfig
from dist_train.data.worker_loader import WorkerLoader
from tests.data.test_worker_dataset import Items, dataset

REPOSITORY = Path(__file__).parents[2]
NUM_ITEMS, BATCH = 8, 2


def check_one_worker() -> None:
    """End a worker by a signal of another process, and by one of this process."""
    pictures, all_of_them = dataset(Items()), np.arange(NUM_ITEMS)
    config = DataConfig(loader="workers", num_workers=1, eval_batch_size=BATCH)
    splits = {"test": (pictures, all_of_them)}
    loader = WorkerLoader(pictures, splits, all_of_them, config, torch.device("cpu"))
    before = set(multiprocessing.active_children())
    batches = loader.eval_batches("test", 0, 1)
    next(batches)
    [worker] = set(multiprocessing.active_children()) - before
    subprocess.run(["kill", "-TERM", str(worker.pid)], check=True)
    assert [number for number, _ in batches] == [1, 2, 3]
    worker.join()
    assert worker.exitcode == 0, "it was not to heed a stranger"

    batches = loader.eval_batches("test", 0, 1)
    next(batches)
    [worker] = set(multiprocessing.active_children()) - before
    worker.terminate()  # as multiprocessing does when a rank ends, and then waits without end
    worker.join(60)
    ended = worker.exitcode
    worker.kill()
    assert ended == 0


@pytest.mark.slow
def test_a_worker_is_ended_by_its_own_rank_and_by_nobody_else() -> None:
    # In a process of its own: one server forks all workers, and they inherit its signal mask.
    code = "from tests.data.test_worker_loader import check_one_worker; check_one_worker()"
    subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, check=True, timeout=300)
