"""What a step on GPUs costs: the guards, their lag, and the ways in which gradients are summed.

    torchrun --standalone --nproc-per-node=8 -m benchmarks.gpu_steps OUT.json [KEY=VALUE ...]

Blocks of steps of each way alternate in one process, in an order drawn anew each time; a ratio is
of two blocks of one round, so that clocks and neighbours meet both alike.
"""

import contextlib
import json
import random
import statistics
import sys
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.guard_overhead import Silent, without_guards
from benchmarks.intervals import mean_and_half_width
from benchmarks.opened import Opened, opened
from dist_train.config.compose import compose
from dist_train.distributed import Ranks, start_ranks
from dist_train.step import train_step

NET = ("experiment=cifar10_resnet18", "precision=bf16")
IMAGES_A_GPU = 512
BLOCK_SEC, MEASURE_SEC = 0.25, 25.0
FEWEST_ROUNDS, MOST_ROUNDS = 5, 40
ENDLESS = "train.steps=1000000000"
WARM_STEPS, WAIT_STEPS = 5, 5
REFERENCE = "as it is"


@dataclass
class Way:
    """One way to take steps."""

    opened: Opened
    guarded: bool = True
    step: int = 0


def main() -> None:
    """Be a rank; rank 0 writes what was found."""
    out, *words = sys.argv[1:]
    with contextlib.ExitStack() as stack:
        folder = Path(out).absolute().parent  # the same for all ranks
        first = compose([*_words(folder, "first"), *words]).config
        ranks = stack.enter_context(start_ranks(first))
        batch = f"train.global_batch_size={IMAGES_A_GPU * ranks.world_size}"

        def open_way(name: str, *own: str) -> Opened:
            config = compose([*_words(folder, name), *words, batch, ENDLESS, *own]).config
            return stack.enter_context(opened(config, ranks))

        ways = {REFERENCE: Way(open_way("as_it_is"))}
        ways["without guards"] = Way(ways[REFERENCE].opened, guarded=False)
        ways["guards.lag=1"] = Way(open_way("lag", "guards.lag=1"))
        if ranks.world_size > 1:
            for sync in ("flat", "ddp"):
                ways[sync] = Way(open_way(sync, f"parallel.sync={sync}"))
        found = measured(ways, ranks)
        replica = ways["ddp" if "ddp" in ways else REFERENCE].opened.parts.replica
        found |= {
            "net": " ".join(NET),
            "images_a_gpu": IMAGES_A_GPU,
            "world_size": ranks.world_size,
            "form": ways[REFERENCE].opened.parts.replica.form,
            "ddp_recovers": replica.recoverable if "ddp" in ways else None,
            "waits": {name: waits_of(ways[name]) for name in (REFERENCE, "guards.lag=1")},
        }
        if ranks.rank == 0:
            Path(out).write_text(json.dumps(found, indent=1) + "\n")
        ranks.barrier()


def measured(ways: dict[str, Way], ranks: Ranks) -> dict[str, Any]:
    """Return the milliseconds of a step of each way, and its ratio to the reference. Collective."""
    for way in ways.values():
        block(way, WARM_STEPS)
    each = ranks.gather(block(ways[REFERENCE], WARM_STEPS) / WARM_STEPS)[0]  # rank 0's, for all
    steps = max(1, round(BLOCK_SEC / each))
    fitting = int(MEASURE_SEC / (steps * each * len(ways)))
    order, names = random.Random(0), list(ways)  # the same on all ranks: they step together
    times: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(max(FEWEST_ROUNDS, min(MOST_ROUNDS, fitting))):
        order.shuffle(names)
        for name in names:
            times[name].append(block(ways[name], steps) / steps)
    ratios = {
        name: [mine / other for mine, other in zip(times[name], times[REFERENCE], strict=True)]
        for name in ways
    }
    return {
        "step_ms": {name: 1e3 * statistics.median(times[name]) for name in ways},
        "ratio": {name: mean_and_half_width(ratios[name]) for name in ways if name != REFERENCE},
        "rounds": len(times[REFERENCE]),
        "steps_a_block": steps,
    }


def block(way: Way, count: int) -> float:
    """Take `count` steps; returns the seconds until the device has done them. Collective."""
    parts, feed = way.opened.parts, way.opened.feed
    ranks = parts.replica.ranks
    pulse = ranks.pulse
    if not way.guarded:
        object.__setattr__(ranks, "pulse", Silent())
    ranks.barrier()
    begun = time.perf_counter()
    with contextlib.nullcontext() if way.guarded else without_guards(parts):
        for _ in range(count):
            train_step(parts, feed, step=way.step)
            way.step += 1
    torch.cuda.synchronize()
    spent = time.perf_counter() - begun
    object.__setattr__(ranks, "pulse", pulse)
    parts.recovery.settle()
    return spent


def waits_of(way: Way) -> int:
    """Return how often the host waits for the device in a step, as torch counts. Collective."""
    counts = []
    for _ in range(WAIT_STEPS):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                train_step(way.opened.parts, way.opened.feed, step=way.step)
            finally:
                torch.cuda.set_sync_debug_mode("default")
        way.step += 1
        counts.append(sum("called a synchronizing" in str(w.message) for w in caught))
    return max(counts)


def _words(folder: Path, name: str) -> list[str]:
    return [*NET, "data=synthetic", "device=cuda", "optim.clip_norm=1", f"run_dir={folder}/{name}"]


if __name__ == "__main__":
    main()
