"""The shortest time to a good accuracy on CIFAR-10: `python benchmarks/speedrun.py --data DIR`.

Trains `experiment=cifar10_speed` once for each seed and prints accuracy and time with their spread.
Two clocks: the training steps alone, and the user's, from pressing return to the last line. The
records' clock lies between them: it also counts the initialisation of the whitening and the last
evaluation with its views, but neither start-up nor loading (KellerJordan/cifar10-airbench).
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.intervals import machine, mean_and_half_width

SHOWN = {
    "eval_accuracy": "accuracy",
    "eval_views_accuracy": "accuracy over six views",
    "train_sec": "training steps alone, s (less than the records' clock counts)",
    "whole_sec": "from the command to its end, s (the user's clock)",
}


def run(seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """Train once; returns the summary with the user's clock."""
    with tempfile.TemporaryDirectory() as folder:
        words = ["experiment=cifar10_speed", f"seed={seed}", f"run_dir={folder}/run"]
        words += [f"data.root={options.data}", *options.words]
        if (Path(options.data) / "train").is_dir():
            words.append("data.name=image_folder")
        command = [sys.executable, "-m", "launch.cli", "run", f"--nproc={options.nproc}"]
        begun = time.time()
        subprocess.run([*command, *words], check=True, stdout=sys.stderr)
        whole = time.time() - begun
        summary = json.loads((Path(folder) / "run" / "summary.json").read_text())
    return summary | {"whole_sec": whole}


def main() -> int:
    """Run the command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", required=True, help="CIFAR-10, or a folder of pictures")
    parser.add_argument("--nproc", default="auto")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("words", nargs="*", help="settings, as on the command line of a run")
    options = parser.parse_intermixed_args()
    runs = [run(seed, options) for seed in options.seeds]
    result: dict[str, Any] = {"machine": machine(), "words": options.words, "seeds": options.seeds}
    for key in SHOWN:
        values = [float(r[key]) for r in runs if r[key] is not None]
        if not values:  # eval.views=1
            continue
        mean, half = mean_and_half_width(values)
        result[key] = {"mean": mean, "half_width": half, "each": values}
    result["runs"] = [{k: r[k] for k in ("world_size", "device", "steps", "torch")} for r in runs]
    print(json.dumps(result, indent=1))
    for key, name in SHOWN.items():
        found = result.get(key)
        if found is None:
            continue
        print(f"{name}: {found['mean']:.4f} +- {found['half_width']:.4f}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
