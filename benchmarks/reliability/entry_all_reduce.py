"""Ranks that only add numbers up; VICTIM (rank) kills itself in its first RESTARTS attempts."""

import os
import signal
import sys
import time
from pathlib import Path

import torch

from dist_train.config.arguments import parse
from dist_train.distributed import start_ranks

if __name__ == "__main__":
    config = parse(sys.argv[1:]).config
    victim, restarts = int(os.environ["VICTIM"]), int(os.environ["RESTARTS"])
    marks = Path(os.environ["MARKS"])
    with start_ranks(config) as ranks:
        for number in range(20):
            total = ranks.all_reduce(torch.tensor([float(ranks.rank + 1), number * 1.0]))
            count = ranks.world_size
            expected = [count * (count + 1) / 2, count * number * 1.0]
            assert total.tolist() == expected, f"{total} is not {expected}"
            if number == 0 and ranks.rank == victim:
                (marks / f"summed.{ranks.attempt}").write_text(str(time.time()))
            if number == 10 and ranks.rank == victim and ranks.attempt < restarts:
                (marks / f"killed.{ranks.attempt}").write_text(str(time.time()))
                os.kill(os.getpid(), signal.SIGKILL)
