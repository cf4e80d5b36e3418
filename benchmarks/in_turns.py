"""Runs that take the same batches in turns, in the same processes: blocks of steps, timed."""

import random
import time
from contextlib import ExitStack
from dataclasses import dataclass

import torch

from benchmarks.opened import Opened, opened
from dist_train.config import Config
from dist_train.distributed import start_ranks
from dist_train.step import train_step


@dataclass(frozen=True, kw_only=True, slots=True)
class Turns:
    """What the runs took, on this rank; {run: one value a round}."""

    rank: int
    precision: str
    step_sec: dict[str, list[float]]
    losses: dict[str, list[float]]  # mean over the samples of the block's last step


def in_turns(configs: dict[str, Config], *, steps: int, rounds: int) -> Turns:
    """Take `rounds` blocks of `steps` steps of each run, in an order that is drawn. Collective."""
    with start_ranks(next(iter(configs.values()))) as ranks, ExitStack() as stack:
        runs = {
            name: stack.enter_context(opened(config, ranks)) for name, config in configs.items()
        }
        taken = dict.fromkeys(runs, 0)
        step_sec: dict[str, list[float]] = {name: [] for name in runs}
        losses: dict[str, list[float]] = {name: [] for name in runs}

        def block(name: str) -> tuple[float, float]:
            run: Opened = runs[name]
            outcomes = []
            ranks.barrier()
            start = time.perf_counter()
            for _ in range(steps):
                outcomes = train_step(run.parts, run.feed, step=taken[name])
                taken[name] += 1
            sec = (time.perf_counter() - start) / steps
            loss = torch.stack([loss for loss, _ in outcomes]).sum().double()
            return sec, float(ranks.control_sum(loss)) / run.parts.plan.global_batch_size

        for name in runs:
            block(name)  # warm
        dice = random.Random(0)  # the same on all ranks: they step together
        for _ in range(rounds):
            for name in dice.sample(list(runs), len(runs)):
                sec, loss = block(name)
                step_sec[name].append(sec)
                losses[name].append(loss)
        precision = next(iter(runs.values())).parts.precision
    return Turns(rank=ranks.rank, precision=precision, step_sec=step_sec, losses=losses)
