"""What the guards cost a healthy step: the same loop with and without them, paired in one process.

    python -m benchmarks run guards

Without means: buffers not remembered, the norm not read, no heartbeats, replicas not compared; the
watchdog's process (0.2 % of a core) runs in both. Blocks of steps with and without alternate, the
order drawn anew for each pair; a ratio is of one pair, so that what else the machine does meets
both alike. What is a thousandth of a step no pair of blocks can show: so each guard is also timed
by itself, and their sum set against the step.
"""

import contextlib
import random
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch

from benchmarks.intervals import mean_and_half_width
from benchmarks.on_two_ranks import NUM_RANKS, be_a_rank, measured
from benchmarks.opened import opened
from dist_train.config.compose import compose
from dist_train.data.feed import Feed
from dist_train.distributed import start_ranks
from dist_train.heartbeat import Pulse
from dist_train.step import train_step
from dist_train.watchdog import watch

BLOCKS, CALLS = 15, 50  # of each guard by itself
CASES = {
    "tutorial CNN, batch 64": ("model=tutorial_cnn", "train.global_batch_size=64", 60, 40),
    "ResNet-9, batch 64": ("model=resnet9", "train.global_batch_size=64", 4, 30),
    "ResNet-9, batch 512": ("model=resnet9", "train.global_batch_size=512", 2, 15),
}


class Silent(Pulse):
    """Writes nothing."""

    def _write(self, waits: int, number: int | None = None, step: int = 0) -> None:
        pass


@contextlib.contextmanager
def without_guards(parts: Any) -> Iterator[None]:
    """Take the guards out of a step."""
    buffers, recovery = parts.replica.buffers, parts.recovery
    remember, decide = buffers.remember, recovery.decide
    buffers.remember = lambda: None
    recovery.decide = lambda norm, failure, step: "apply"
    try:
        yield
    finally:
        buffers.remember, recovery.decide = remember, decide


def measure() -> dict[str, Any]:
    """Start two ranks for each case; return what they found."""
    return measured("benchmarks.guard_overhead", CASES)


def table(found: dict[str, Any]) -> str:
    """Return the results as Markdown."""
    lines = [
        f"All guards on against all off, {NUM_RANKS} ranks, pairs of blocks.",
        "",
        "| net | step without, ms | the guards add | pairs | timed one by one | of the step |",
        "|---|---|---|---|---|---|",
    ]
    for case in found["cases"]:
        mean, half = (100 * value for value in case["overhead"])
        micro_sec = sum(case["one_by_one_us"].values())
        lines.append(
            f"| {case['case']} | {case['step_ms_without']:.1f} | {mean:+.2f} +- {half:.2f} % | "
            f"{case['pairs']} | {micro_sec:.0f} us | "
            f"{micro_sec / (10 * case['step_ms_without']):.2f} % |"
        )
    each = "; ".join(
        f"{case['case']}: " + ", ".join(f"{k} {v:.1f} us" for k, v in case["one_by_one_us"].items())
        for case in found["cases"]
    )
    return "\n".join([*lines, "", f"One by one, on rank 0: {each}."])


def measure_case(name: str, folder: str) -> dict[str, Any] | None:
    """Return rank 0's figures for one case; `folder` is the same on all ranks."""
    model, batch, steps, pairs = CASES[name]
    words = ["experiment=cifar10_tutorial", "data=synthetic", *model.split(), batch]
    config = compose([*words, f"run_dir={folder}/run", "optim.clip_norm=1", "device=cpu"]).config
    with (
        start_ranks(config) as ranks,
        opened(config, ranks) as it,
        watch(config, ranks, it.run.path, it.run.warn),
    ):
        ratios, sec = _pairs(it.parts, it.feed, steps, pairs)
        each = _one_by_one(it.parts, it.feed)
    if ranks.rank != 0:
        return None
    mean, half = mean_and_half_width(ratios)
    return {
        "case": name,
        "ranks": ranks.world_size,
        "pairs": pairs,
        "steps_a_block": steps,
        "step_ms_without": 1e3 * sec,
        "overhead": [mean - 1, half],
        "one_by_one_us": each,
    }


def _pairs(parts: Any, feed: Feed, steps: int, pairs: int) -> tuple[list[float], float]:
    """Return the ratios with/without of each pair of blocks, and the seconds of a step without."""
    order = random.Random(0)  # the same on all ranks: they step together
    ranks, every = parts.replica.ranks, parts.config.guards.drift_every
    silent = Silent()
    real = ranks.pulse
    step, ratios, bare = 0, [], []

    def block(guarded: bool) -> float:
        """Return the seconds of a block of steps."""
        nonlocal step
        object.__setattr__(ranks, "pulse", real if guarded else silent)
        ranks.barrier()
        start, check = time.perf_counter(), 0.0
        with contextlib.nullcontext() if guarded else without_guards(parts):
            for _ in range(steps):
                train_step(parts, feed, step=step)
                step += 1
            if guarded:  # its share of a comparison every `drift_every` steps
                begun = time.perf_counter()
                parts.drift.check(step)
                check = time.perf_counter() - begun
        spent = time.perf_counter() - start
        return spent - check * (1 - steps / every)

    for guarded in (True, False, True, False):  # warm
        block(guarded)
    for _ in range(pairs):
        first = order.random() < 0.5
        one, two = block(first), block(not first)
        guarded, without = (one, two) if first else (two, one)
        ratios.append(guarded / without)
        bare.append(without / steps)
    object.__setattr__(ranks, "pulse", real)
    return ratios, statistics.median(bare)


def _one_by_one(parts: Any, feed: Feed) -> dict[str, float]:
    """Return the microseconds a step of each guard by itself: the median of blocks of calls."""
    ranks, norm = parts.replica.ranks, torch.ones(())
    with mock.patch.object(Pulse, "_write", autospec=True, side_effect=Pulse._write) as write:
        train_step(parts, feed, step=0)
        beats = write.call_count

    def beat() -> None:
        for _ in range(beats):
            ranks.pulse.at("forward", 0)

    def compare() -> None:
        parts.drift.forget()
        parts.drift.check(1)

    works: dict[str, tuple[Callable[[], object], float]] = {  # and how often a step does it
        f"{beats} heartbeats": (beat, 1.0),
        "buffers remembered": (parts.replica.buffers.remember, 1.0),
        "the norm": (parts.replica.gradients.norm, 1.0),
        "read and judged": (lambda: parts.recovery.decide(norm, None, 0), 1.0),
        "replicas compared": (compare, 1.0 / parts.config.guards.drift_every),
    }
    found = {}
    for name, (work, share) in works.items():
        blocks = []
        for _ in range(BLOCKS):
            ranks.barrier()
            start = time.perf_counter()
            for _ in range(CALLS):
                work()
            blocks.append((time.perf_counter() - start) / CALLS)
        found[name] = 1e6 * share * statistics.median(blocks)
    return found


if __name__ == "__main__":
    be_a_rank(measure_case)
