"""What each form of summing the gradients costs a step: `python -m benchmarks run sync_forms`.

The same batches with parallel.sync=ddp and flat and in fixed order, in turns, in the same
processes, one thread a rank. Each ratio is of two blocks of one round.
"""

import statistics
from typing import Any

from benchmarks.in_turns import in_turns
from benchmarks.intervals import mean_and_half_width, plus_minus
from benchmarks.on_two_ranks import NUM_RANKS, be_a_rank, measured
from dist_train.config.compose import compose

CASES = {  # the words; steps a block, rounds
    "tutorial CNN, batch 64": (("model=tutorial_cnn", "train.global_batch_size=64"), 20, 20),
    "ResNet-18, batch 64": (("model=resnet18_cifar", "train.global_batch_size=64"), 1, 15),
}
FORMS = {"flat": "parallel.sync=flat", "ddp": "parallel.sync=ddp", "fixed": "train.order=fixed"}
WORDS = ("experiment=cifar10_tutorial", "data=synthetic", "device=cpu", "threads=1")


def measure() -> dict[str, Any]:
    """Start two ranks for each case; return what they found."""
    return measured("benchmarks.sync_forms", CASES)


def table(found: dict[str, Any]) -> str:
    """Return the results as Markdown."""
    lines = [
        f"The three forms on {NUM_RANKS} ranks of one thread, the same batches, rounds of blocks; "
        "losses against those of flat, the largest difference. In fixed order BatchNorm belongs to "
        "the shard, and the losses of a net with it are those of another run.",
        "",
        "| net | precision | form | step, ms | times flat | losses | rounds |",
        "|---|---|---|---|---|---|---|",
    ]
    for case in found["cases"]:
        for form, of in case["forms"].items():
            apart = "the same" if of["apart"] == 0 else f"{of['apart']:.1e} apart"
            lines.append(
                f"| {case['case']} | {case['precision']} | {form} | {of['step_ms']:.1f} | "
                f"{plus_minus(of['times_flat'], 2)} | {apart} | {case['rounds']} |"
            )
    return "\n".join(lines)


def measure_case(name: str, folder: str) -> dict[str, Any] | None:
    """Return rank 0's figures for one case; `folder` is the same on all ranks."""
    case, steps, rounds = CASES[name]
    configs = {
        form: compose([*WORDS, *case, word, f"run_dir={folder}/{form}"]).config
        for form, word in FORMS.items()
    }
    turns = in_turns(configs, steps=steps, rounds=rounds)
    if turns.rank != 0:
        return None
    flat, losses = turns.step_sec["flat"], turns.losses["flat"]
    forms = {}
    for form in FORMS:
        times = [a / b for a, b in zip(turns.step_sec[form], flat, strict=True)]
        apart = [abs(a / b - 1) for a, b in zip(turns.losses[form], losses, strict=True)]
        forms[form] = {
            "step_ms": 1000 * statistics.median(turns.step_sec[form]),
            "times_flat": mean_and_half_width(times),
            "apart": max(apart),
        }
    return {"case": name, "precision": turns.precision, "forms": forms, "rounds": rounds}


if __name__ == "__main__":
    be_a_rank(measure_case)
