"""`make gpu-check`: one page of what these GPUs pass and reach, in at most eight minutes.

Usage: python -m benchmarks.gpu_check [--data DIR] [--out FILE] [--words KEY=VALUE ...]

Needs no network: images are generated unless --data names CIFAR-10's. Each part runs by itself; one
that fails or is not done in its time is said, and the next one goes on. Send the page, or the JSON
file, with whatever you report.
"""

import argparse
import importlib.util
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.gpu_page import page
from benchmarks.intervals import ROOT
from dist_train.doctor.speeds import Reduction

OUT = ROOT / "benchmarks" / "results" / "gpu_check.json"
NEEDED = ("torch", "torchvision", "hydra", "submitit", "pytest")
# At most, of each part: eight minutes in all.
TESTS_SEC, NCCL_SEC, STEPS_SEC, SPEED_SEC, RATES_SEC = 180.0, 70.0, 90.0, 60.0, 70.0
RESULT = re.compile(r"(?:(tests/.+?) (PASSED|FAILED|ERROR)\b)|(?:(PASSED|FAILED|ERROR) (tests/.+))")
ERROR = re.compile(r"^(?:\[?rank\d+\]?: ?)?[\w.]*(?:Error|Exception)\b|\berror: ")
LAUNCHERS_OWN = "ChildFailedError"  # torchrun's, below what a rank has said
# Trained on one GPU and on all of them: {preset: images a GPU and step}.
PRESETS = {"cifar10_resnet18": 512, "cifar10_resnet9": 512}
STEPS = 150
WARM_LINES = 2  # of the log, whose steps choose algorithms and fill caches


class NotDoneError(RuntimeError):
    """A part has not come to its end."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Check:
    """What the parts are told."""

    num_gpus: int
    data: Path | None
    words: list[str]  # settings of every run
    folder: Path  # for this check's own files


def main() -> int:
    """Run the check; returns 0 if every part came to its end and no test failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, help="a folder with CIFAR-10, for the speed run")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--words", nargs="*", default=[], help="settings of every run")
    options = parser.parse_args()
    lacking = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if lacking:
        return _refused(f"{sys.executable} has no {', '.join(lacking)}: pip install -e '.[dev]'")
    import torch

    if not torch.cuda.is_available():
        return _refused("torch sees no GPU on this machine")
    begun = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="gpu-check-") as folder:
        check = Check(
            num_gpus=torch.cuda.device_count(),
            data=options.data,
            words=options.words,
            folder=Path(folder),
        )
        found: dict[str, Any] = {"machine": _machine(), "date": time.strftime("%Y-%m-%d")}
        for name, part in PARTS.items():
            print(f"gpu-check: {name} ...", file=sys.stderr, flush=True)
            start = time.monotonic()
            try:
                found[name] = part(check)
            except (NotDoneError, OSError, ValueError, KeyError) as error:
                found[name] = {"error": f"{type(error).__name__}: {error}"}
            found[name]["wall_sec"] = round(time.monotonic() - start, 1)
    found["wall_sec"] = round(time.monotonic() - begun, 1)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(found, indent=1) + "\n")
    print(page(found))
    print(f"\nAll figures: {options.out}")
    bad = [name for name in PARTS if "error" in found[name]] + found["tests"].get("failed", [])
    return 1 if bad else 0


def tests(check: Check) -> dict[str, Any]:
    """Run the tests marked gpu, and multi_gpu where there are two."""
    marks = "gpu or multi_gpu" if check.num_gpus > 1 else "gpu"
    command = [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", "-m", marks, "tests"]
    if importlib.util.find_spec("xdist") is not None:
        # Each starts its ranks anew, which is most of its time.
        command += ["-n", str(max(1, min(4, len(os.sched_getaffinity(0)) // 3)))]
    log = check.folder / "tests.txt"
    error = None
    try:
        _run(command, log, TESTS_SEC, good=(0, 1))
    except NotDoneError as late:
        error = str(late)
    found = results_in(log.read_text())
    if not found:
        raise NotDoneError(error or f"no test was run: {_reason(log.read_text())}")
    told: dict[str, Any] = {
        "passed": sum(passed for passed in found.values()),
        "failed": sorted(name for name, passed in found.items() if not passed),
    }
    return told if error is None else told | {"error": error}


def results_in(log: str) -> dict[str, bool]:
    """Return {test: whether it passed} of what `pytest -v` prints, alone or with xdist."""
    found: dict[str, bool] = {}
    for before, result, again, after in RESULT.findall(log):
        name, word = before or after, result or again
        found[name] = found.get(name, True) and word == "PASSED"
    return found


def nccl(check: Check) -> dict[str, Any]:
    """Time NCCL's all-reduces between the GPUs of this machine."""
    if check.num_gpus < 2:
        return {"left_out": "needs two GPUs"}
    report = check.folder / "doctor.json"
    command = [sys.executable, "-m", "launch.cli", "doctor", f"--nproc={check.num_gpus}"]
    _run([*command, f"--json={report}"], check.folder / "doctor.txt", NCCL_SEC, good=(0, 1))
    traffic = json.loads(report.read_text())["facts"]["traffic"]["0"]
    if traffic["error"]:
        raise NotDoneError(traffic["error"])
    for row in traffic["reductions"]:
        row["bus_bytes_per_sec"] = Reduction(**row).bus_bytes_per_sec(check.num_gpus)
    return {key: traffic[key] for key in ("backend", "reductions", "transports")}


def steps(check: Check) -> dict[str, Any]:
    """Measure what a step waits for, what its guards cost, and both ways to sum gradients."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc-per-node={check.num_gpus}", "-m", "benchmarks.gpu_steps"]
    out = check.folder / "steps.json"
    _run([*command, str(out), *check.words], check.folder / "steps.txt", STEPS_SEC)
    return json.loads(out.read_text())


def speed(check: Check) -> dict[str, Any]:
    """Train experiment=cifar10_speed once, on all GPUs."""
    data = ["data=synthetic"] if check.data is None else [f"data.root={check.data}"]
    if check.data is not None and (check.data / "train").is_dir():
        data += ["data.name=image_folder", "data.augment=standard"]
    return _train(check, "cifar10_speed", check.num_gpus, data, SPEED_SEC)


def rates(check: Check) -> dict[str, Any]:
    """Return the images/s of presets on one GPU and on all, as many images a GPU on both."""
    found: dict[str, Any] = {}
    until = time.monotonic() + RATES_SEC
    for preset, each in PRESETS.items():
        for num_gpus in sorted({1, check.num_gpus}):
            words = ["data=synthetic", "eval.every_epochs=null", "data.val_fraction=0"]
            words += [f"train.steps={STEPS}", f"train.global_batch_size={each * num_gpus}"]
            words.append("log_every=10")
            summary = _train(check, preset, num_gpus, words, max(5.0, until - time.monotonic()))
            found.setdefault(preset, {})[str(num_gpus)] = summary
    return found


PARTS: dict[str, Callable[[Check], dict[str, Any]]] = {
    "tests": tests,
    "nccl": nccl,
    "steps": steps,
    "speed": speed,
    "rates": rates,
}


def _train(
    check: Check, preset: str, num_ranks: int, words: list[str], limit_sec: float
) -> dict[str, Any]:
    """Train once; returns what the page shows of the run's summary."""
    run_dir = check.folder / f"{preset}-{num_ranks}"
    command = [sys.executable, "-m", "launch.cli", "run", f"--nproc={num_ranks}"]
    command += [f"experiment={preset}", "device=cuda", f"run_dir={run_dir}", *words, *check.words]
    _run(command, check.folder / f"{run_dir.name}.txt", limit_sec)
    summary = json.loads((run_dir / "summary.json").read_text())
    kept = ("dataset", "precision", "steps", "train_sec", "eval_accuracy")
    lines = [json.loads(text) for text in (run_dir / "metrics.jsonl").read_text().splitlines()]
    per_sec = [line["perf/images_per_sec"] for line in lines if "perf/images_per_sec" in line]
    settled = per_sec[WARM_LINES:] or per_sec
    return {key: summary[key] for key in kept} | {"images_per_sec": statistics.median(settled)}


def _run(command: list[str], log: Path, limit_sec: float, *, good: tuple[int, ...] = (0,)) -> None:
    """Run a program and keep what it prints in `log`.

    Raises:
        NotDoneError: it is not done in time, or ends with an exit code that is not good.
    """
    with log.open("w") as file:
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            code = process.wait(limit_sec)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            raise NotDoneError(f"not done in {limit_sec:.0f} s") from None
    if code not in good:
        raise NotDoneError(f"exit code {code}: {_reason(log.read_text())}")


def _reason(log: str) -> str:
    """Return the line of a log that tells why a program ended: the last error, or its last line."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    errors = [line for line in lines if ERROR.search(line) and LAUNCHERS_OWN not in line]
    return (errors or lines or ["it printed nothing"])[-1][:300]


def _machine() -> dict[str, Any]:
    """Return what the figures must be read with."""
    import torch
    from torch.cuda import nccl as torch_nccl

    gpus = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    driver = re.search(r"Kernel Module\D*?([\d.]+)", _text("/proc/driver/nvidia/version"))
    nccl_version = torch_nccl.version() if torch.distributed.is_nccl_available() else ()
    return {
        "gpus": [f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GiB" for gpu in gpus],
        "driver": driver[1] if driver else "unknown",
        "torch": str(torch.__version__),
        "cuda": torch.version.cuda,
        "nccl": ".".join(map(str, nccl_version)),
        "cores": len(os.sched_getaffinity(0)),
    }


def _text(path: str) -> str:
    return Path(path).read_text() if Path(path).is_file() else ""


def _refused(why: str) -> int:
    print(f"gpu-check: error: {why}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
