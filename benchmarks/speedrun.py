"""The shortest time to a good accuracy on CIFAR-10: `python -m benchmarks.speedrun --data DIR`.

Trains `experiment=cifar10_speed` once for each seed and prints accuracy and time with their spread.
Three clocks: the training steps alone; the records' (KellerJordan/cifar10-airbench), which leaves
out start-up, loading and warm-up: here from the moment that model and data stand to the end, so
that a trial step, the evaluations with their views and the last save count as well; and the
user's, from pressing return to the last line. The first start on a folder of pictures decodes it:
only the first seed pays for that.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.intervals import ROOT, machine, mean_and_half_width, said

SHOWN = {
    "eval_accuracy": "accuracy",
    "eval_views_accuracy": "accuracy over six views",
    "train_sec": "training steps alone, s",
    "record_sec": "the records' clock, with the last save, s",
    "whole_sec": "from the command to its end, s (the user's clock)",
}
OUT = ROOT / "benchmarks" / "results" / "speedrun.json"
KEPT = ("config.yaml", "summary.json", "metrics.jsonl", "events.jsonl", "log/rank0.txt")
FACTS = ("world_size", "device", "steps", "torch", "dataset", "eval_samples", "weights_sha256")


def run(seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """Train once; returns what it came to, by name of SHOWN and FACTS."""
    with tempfile.TemporaryDirectory() as folder:
        run_dir = Path(folder) / "run"
        words = ["experiment=cifar10_speed", f"seed={seed}", f"run_dir={run_dir}"]
        if (Path(options.data) / "train").is_dir():
            words += ["data.name=image_folder", "data.augment=standard"]
        words += [f"data.root={options.data}", *options.words]
        command = [sys.executable, "-m", "launch.cli", "run", f"--nproc={options.nproc}"]
        begun = time.time()
        subprocess.run([*command, *words], check=True, stdout=sys.stderr)
        whole = time.time() - begun
        summary = json.loads((run_dir / "summary.json").read_text())
        lines = [json.loads(text) for text in (run_dir / "events.jsonl").read_text().splitlines()]
        times = {line["event"]: line["time"] for line in lines}
        if options.keep is not None:
            keep(run_dir, options.keep / f"seed_{seed}")
    found = {"seed": seed, "whole_sec": whole, "record_sec": times["finished"] - times["started"]}
    return found | {key: summary[key] for key in (*SHOWN, *FACTS) if key not in found}


def keep(run_dir: Path, target: Path) -> None:
    """Copy a run's records, without its weights."""
    for name in KEPT:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(run_dir / name, target / name)


def result_of(runs: list[dict[str, Any]], words: list[str]) -> dict[str, Any]:
    """Return the mean of each figure with its 95 % interval, and all runs."""
    means = {}
    for key in SHOWN:
        values = [float(found[key]) for found in runs if found[key] is not None]
        if values:  # eval.views=1 has none over views
            means[key] = mean_and_half_width(values)
    date = time.strftime("%Y-%m-%d")
    return {"machine": machine(), "date": date, "words": words, "means": means, "runs": runs}


def table(result: dict[str, Any]) -> str:
    """Return the results as Markdown."""
    command = "python -m benchmarks.speedrun --data DIR"
    runs, means = result["runs"], result["means"]
    lines = [
        f"{said(result)}; {runs[0]['world_size']} ranks.",
        "",
        f"`{' '.join([command, *result['words']])}`: {runs[0]['steps']} steps, "
        f"{runs[0]['eval_samples']:,} test pictures ({runs[0]['dataset']}).",
        "",
        f"| | {' | '.join('seed ' + str(run['seed']) for run in runs)} | mean |",
        f"|---|{'---|' * (len(runs) + 1)}",
    ]
    for key, name in SHOWN.items():
        if key in means:
            digits = 4 if "accuracy" in key else 0
            cells = [f"{run[key]:,.{digits}f}" for run in runs]
            lines.append(f"| {name} | {' | '.join(cells)} | {means[key][0]:,.{digits}f} |")
    return "\n".join(lines)


def main() -> int:
    """Run the command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.speedrun", description=__doc__)
    parser.add_argument("--data", required=True, help="CIFAR-10, or a folder of pictures")
    parser.add_argument("--nproc", default="auto")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--keep", type=Path, help="copy each run's records into this folder")
    parser.add_argument("--out", type=Path, default=OUT, help="written after every seed")
    parser.add_argument("words", nargs="*", help="settings, as on the command line of a run")
    options = parser.parse_intermixed_args()
    runs: list[dict[str, Any]] = []
    result: dict[str, Any] = {}
    for seed in options.seeds:
        runs.append(run(seed, options))
        result = result_of(runs, options.words)
        options.out.write_text(json.dumps(result, indent=1) + "\n")
    for key, (mean, half) in result["means"].items():
        print(f"{SHOWN[key]}: {mean:.4f} +- {half:.4f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
