"""Results: one JSON line a trial, appended; what counts of them; the bound that they prove."""

import hashlib
import inspect
import json
import math
import platform
import subprocess
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.reliability import faults_inside

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "benchmarks" / "results" / "reliability"
CODE = ("dist_train", "launch", "configs")
CHANGED = ("status", "--porcelain", "--", *CODE)  # then the commit is not quite the code
CONFIDENCE = 0.95


@dataclass(frozen=True, kw_only=True, slots=True)
class Standing:
    """What the results of a row say together."""

    num_seeds: int
    num_passed: int
    faults: int
    faults_survived: int
    sec: list[float]  # of the trials that passed, sorted
    commits: list[str]  # oldest first
    reasons: list[str]  # of the failed ones: "seed 3: why"
    notes: list[dict[str, Any]]

    @property
    def bound(self) -> float:
        """Return the one-sided lower bound of the share that survives, at 95 %."""
        return lower_bound(self.faults_survived, self.faults)


def surroundings(work: object) -> dict[str, str]:
    """Return what the results of a row, made by the function `work`, are stamped with here."""
    import torch

    from dist_train.run_folder import cpu_name

    return {
        "commit": _git("rev-parse", "--short=8", "HEAD") + ("+" if _git(*CHANGED) else ""),
        "code": code_digest(work),
        "torch": str(torch.__version__),
        "python": platform.python_version(),
        "cpu": cpu_name(),
    }


def code_digest(work: object) -> str:
    """Return a digest of the toolkit and of the trial's own file as they are on the disk.

    A commit that adds results makes no other code, and an uncommitted change does.
    """
    digest = hashlib.sha256()
    for top in CODE:
        for path in sorted((ROOT / top).rglob("*")):
            if path.suffix in (".py", ".yaml"):
                digest.update(str(path.relative_to(ROOT)).encode() + path.read_bytes())
    for path in (inspect.getsourcefile(work), inspect.getsourcefile(faults_inside)):  # type: ignore[arg-type] # a function
        digest.update(Path(path or "").read_bytes())
    return digest.hexdigest()[:12]


def append(folder: Path, row_id: str, record: dict[str, Any]) -> None:
    """Append one trial's line."""
    folder.mkdir(parents=True, exist_ok=True)
    stamped = {"id": row_id, **record, "date": time.strftime("%Y-%m-%d")}
    with (folder / f"{row_id}.jsonl").open("a") as file:
        file.write(json.dumps(stamped) + "\n")


def read(folder: Path, row_id: str) -> list[dict[str, Any]]:
    """Return all lines of a row."""
    path = folder / f"{row_id}.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def seeds_done(records: Iterable[dict[str, Any]], code: str) -> set[int]:
    """Return the seeds that were tried with this code."""
    return {record["seed"] for record in records if record["code"] == code}


def standing(records: list[dict[str, Any]]) -> Standing:
    """Sum a row up: of every seed the trials with the newest code that it was tried with.

    A seed that both passed and failed there counts as failed: nobody repeats one until it passes.
    """
    newest: dict[int, list[dict[str, Any]]] = {}
    for record in records:
        kept = newest.setdefault(record["seed"], [])
        if kept and kept[-1]["code"] != record["code"]:
            kept.clear()
        kept.append(record)
    passed = [seed for seed, tries in newest.items() if all(t["passed"] for t in tries)]
    counted = [record for tries in newest.values() for record in tries]
    faults = {seed: tries[-1]["faults"] for seed, tries in newest.items()}
    return Standing(
        num_seeds=len(newest),
        num_passed=len(passed),
        faults=sum(faults.values()),
        faults_survived=sum(faults[seed] for seed in passed),
        sec=sorted(r["sec"] for r in counted if r["passed"] and r["sec"] is not None),
        commits=list(dict.fromkeys(r["commit"] for r in counted)),
        reasons=[f"seed {r['seed']}: {r['reason']}" for r in counted if not r["passed"]],
        notes=[r["notes"] for r in counted],
    )


def lower_bound(passed: int, total: int, confidence: float = CONFIDENCE) -> float:
    """Return the lower Clopper-Pearson bound of a probability, one-sided.

    The p at which `passed` or more of `total` would be seen with probability 1 - confidence
    (Clopper and Pearson 1934, Biometrika 26:404), found by bisection.
    """
    if passed == 0:
        return 0.0
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        if _at_least(passed, total, middle) > 1 - confidence:
            high = middle
        else:
            low = middle
    return low


def quantile(ordered: list[float], share: float) -> float:
    """Return the smallest value that at least `share` of the values do not exceed."""
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


def _at_least(passed: int, total: int, p: float) -> float:
    """Return the probability of `passed` or more successes of `total`, each with p in (0, 1)."""
    logs = [
        math.lgamma(total + 1)
        - math.lgamma(k + 1)
        - math.lgamma(total - k + 1)
        + k * math.log(p)
        + (total - k) * math.log1p(-p)
        for k in range(passed, total + 1)
    ]
    return math.fsum(map(math.exp, logs))


def _git(*words: str) -> str:
    try:
        done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.strip()
