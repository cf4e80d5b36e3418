"""`make gpu-check`: every test marked `gpu`, then the presets' throughput; writes one JSON.

Usage: python benchmarks/gpu_check.py [--out FILE] [--steps N]
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from xml.etree import ElementTree

import torch

PRESETS = {
    "cifar10_tutorial": 4096,
    "cifar10_resnet9": 512,
    "cifar10_resnet18": 512,
}
PRECISIONS = ("fp32", "bf16", "fp16")


def main() -> int:
    """Run the check; returns 0 if every test passed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/gpu_check.json"))
    parser.add_argument("--steps", type=int, default=200)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.stderr.write("gpu-check: error: torch sees no GPU on this machine\n")
        return 2
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        passed, failed = run_tests(Path(folder) / "tests.xml")
        rates = [
            measure(preset, batch, precision, options.steps, Path(folder))
            for preset, batch in PRESETS.items()
            for precision in PRECISIONS
        ]
    result = {
        "gpu": torch.cuda.get_device_name(),
        "torch": str(torch.__version__),
        "cuda": torch.version.cuda,
        "date": time.strftime("%Y-%m-%d"),
        "tests": {"passed": passed, "failed": failed},
        "throughput": rates,
        "wall_sec": round(time.monotonic() - start, 1),
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    print(f"{passed} gpu tests passed, {len(failed)} failed; wrote {options.out}")
    return 0 if passed > 0 and not failed else 1


def run_tests(report: Path) -> tuple[int, list[str]]:
    """Run the tests marked gpu; returns how many passed, and the names of those that failed."""
    subprocess.run([sys.executable, "-m", "pytest", "-q", "-m", "gpu", f"--junitxml={report}"])
    cases = list(ElementTree.parse(report).iter("testcase"))
    failed = [
        c.get("name", "")
        for c in cases
        if c.find("failure") is not None or c.find("error") is not None
    ]
    return len(cases) - len(failed), failed


def measure(preset: str, batch: int, precision: str, steps: int, folder: Path) -> dict[str, object]:
    """Train `steps` steps on one rank; returns images/s of the lines after the first two."""
    run_dir = folder / f"{preset}-{precision}"
    command = [sys.executable, "-m", "dist_train", f"experiment={preset}", "data=synthetic"]
    command += [f"precision={precision}", f"train.global_batch_size={batch}", f"run_dir={run_dir}"]
    command += [f"train.steps={steps}", "log_every=10", "eval.every_epochs=null", "guards.lag=1"]
    command += [f"checkpoint.every_steps={steps}", "data.val_fraction=0"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        return {"preset": preset, "precision": precision, "error": done.stderr.strip()[-300:]}
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    rates = [m["perf/images_per_sec"] for m in lines if "perf/images_per_sec" in m][2:]
    return {
        "preset": preset,
        "precision": precision,
        "global_batch_size": batch,
        "images_per_sec": {
            "median": round(statistics.median(rates)),
            "min": round(min(rates)),
            "max": round(max(rates)),
            "n": len(rates),
        },
    }


if __name__ == "__main__":
    sys.exit(main())
