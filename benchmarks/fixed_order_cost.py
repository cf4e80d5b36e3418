"""What train.order=fixed costs a step: `python -m benchmarks run fixed_order`.

The same batches in fast and in fixed order, in turns, in the same processes; one thread a rank in
both, as fixed order has it. Each ratio is of one pair of blocks of steps.
"""

import statistics
from typing import Any

from benchmarks.in_turns import in_turns
from benchmarks.intervals import mean_and_half_width
from benchmarks.on_two_ranks import NUM_RANKS, be_a_rank, measured
from dist_train.config.compose import compose

CASES = {  # the words; steps a block, pairs
    "tutorial CNN, batch 256": (("model=tutorial_cnn", "train.global_batch_size=256"), 20, 20),
    "ResNet-9, batch 256": (("model=resnet9", "train.global_batch_size=256"), 2, 20),
}
WORDS = ("experiment=cifar10_tutorial", "data=synthetic", "device=cpu", "threads=1")


def measure() -> dict[str, Any]:
    """Start two ranks for each case; return what they found."""
    return measured("benchmarks.fixed_order_cost", CASES)


def table(found: dict[str, Any]) -> str:
    """Return the results as Markdown."""
    lines = [
        f"`train.order=fixed` with 8 shards against `fast`, {NUM_RANKS} ranks of one thread, the "
        "same batches, pairs of blocks.",
        "",
        "| net | precision | step in fast order, ms | fixed order takes | pairs |",
        "|---|---|---|---|---|",
    ]
    for case in found["cases"]:
        mean, half = case["times"]
        lines.append(
            f"| {case['case']} | {case['precision']} | {case['fast_ms']:.1f} | {mean:.2f} +- "
            f"{half:.2f} times | {case['pairs']} |"
        )
    return "\n".join(lines)


def measure_case(name: str, folder: str) -> dict[str, Any] | None:
    """Return rank 0's figures for one case; `folder` is the same on all ranks."""
    case, steps, pairs = CASES[name]
    configs = {
        order: compose([*WORDS, *case, f"train.order={order}", f"run_dir={folder}/{order}"]).config
        for order in ("fixed", "fast")
    }
    turns = in_turns(configs, steps=steps, rounds=pairs)
    if turns.rank != 0:
        return None
    fast, fixed = turns.step_sec["fast"], turns.step_sec["fixed"]
    return {
        "case": name,
        "precision": turns.precision,
        "fast_ms": 1000 * statistics.median(fast),
        "times": mean_and_half_width([b / a for a, b in zip(fast, fixed, strict=True)]),
        "pairs": pairs,
    }


if __name__ == "__main__":
    be_a_rank(measure_case)
