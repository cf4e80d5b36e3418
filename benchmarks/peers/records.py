"""What was measured: one JSON line a run, appended as it comes, and which lines count together."""

import dataclasses
import hashlib
import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.intervals import ROOT, machine
from benchmarks.peers.worker import PEERS

FOLDER = ROOT / "benchmarks" / "results"
PACKAGES = {
    "fabric": "lightning",
    "lightning": "lightning",
    "accelerate": "accelerate",
    "ignite": "pytorch-ignite",
    "hf_trainer": "transformers",
}
ABSENT = "not installed"
STYLES = ("lean", "default")
# All that decides what is measured; what only shows the results may change.
MEASURE = ("one_round.py", "worker.py", "job.py", "loops.py", "frameworks.py", "ours.py")
CODE = ("dist_train", "configs", *(f"benchmarks/peers/{name}" for name in MEASURE))
SAME_TO = 1e-3  # relative, of the weights' norm with an optimizer that is not fused


@dataclass(frozen=True, order=True, slots=True)
class Cell:
    """What all runs that are compared have in common."""

    case: str
    style: str  # of STYLES
    ranks: int
    precision: str  # fp32 | bf16


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """What came of one run: means over its ranks, or why there are none."""

    values: dict[str, float] = field(default_factory=dict)
    weights_sha256: str = ""
    failed: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Record:
    """One run of one peer."""

    series: str  # when it began; all its runs had the same surroundings
    surroundings: dict[str, str]
    date: str
    cell: Cell
    round: int
    peer: str
    outcome: Outcome


def file_of(case: str) -> Path:
    """Return where a case's results are kept."""
    return FOLDER / f"peers_{case}.jsonl"


def append(path: Path, record: Record) -> None:
    """Append one line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(json.dumps(dataclasses.asdict(record)) + "\n")


def read(path: Path) -> list[Record]:
    """Return all lines, oldest first."""
    if not path.is_file():
        return []
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [
        Record(**{**line, "cell": Cell(**line["cell"]), "outcome": Outcome(**line["outcome"])})
        for line in lines
    ]


def series_to_continue(records: Sequence[Record], surroundings: dict[str, str]) -> str | None:
    """Return the newest series that was measured in the same surroundings; None: there is none."""
    return next((r.series for r in reversed(records) if r.surroundings == surroundings), None)


def newest_series(records: Sequence[Record]) -> list[Record]:
    """Return the records of the series that was measured last: others are never mixed with it."""
    return [r for r in records if r.series == records[-1].series]


def judged(records: Sequence[Record]) -> list[Record]:
    """Return the records, those that did another job than the rest of their round as failed.

    The reference is the fastest loop's run, or the next's in the order of PEERS: weights must have
    its bits. The plain loop's optimizer is not fused and rounds otherwise: its norm is compared.
    """
    order = list(PEERS)
    references: dict[tuple[Cell, int], Outcome] = {}
    for record in sorted(records, key=lambda r: order.index(r.peer)):
        if record.peer != "plain" and record.outcome.failed is None:
            references.setdefault((record.cell, record.round), record.outcome)
    return [_judge(record, references.get((record.cell, record.round))) for record in records]


def surroundings(python: str) -> dict[str, str]:
    """Return what results must share to be put together: machine, versions, code.

    They are those of `python`, which runs the peers; it ends this process if that has another torch
    than this process.
    """
    program = (
        "import importlib.metadata as m, json, sys\n"
        "from benchmarks.intervals import machine\n"
        "there = {d.name for d in m.distributions()}\n"
        f"of = lambda name: m.version(name) if name in there else {ABSENT!r}\n"
        "print(json.dumps(machine() | {name: of(name) for name in sys.argv[1:]}))"
    )
    names = sorted(set(PACKAGES.values()))
    done = subprocess.run([python, "-c", program, *names], cwd=ROOT, capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(f"peers: error: {python} cannot run them: run `make bench-peers`\n{done.stderr}")
    found = json.loads(done.stdout)
    here = machine()["torch"]
    if found["torch"] != here:
        sys.exit(
            f"peers: error: {python} has torch {found['torch']}, {sys.executable} has {here}: "
            "remove .venv-peers and run `make bench-peers`"
        )
    return found | {"code": code_digest()}


def code_digest() -> str:
    """Return a digest of all that decides what is measured, as it is on the disk."""
    digest = hashlib.sha256()
    for top in CODE:
        for path in sorted([ROOT / top, *(ROOT / top).rglob("*")]):
            if path.is_file() and path.suffix in (".py", ".yaml"):
                digest.update(str(path.relative_to(ROOT)).encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def _judge(record: Record, reference: Outcome | None) -> Record:
    outcome, failed = record.outcome, None
    if reference is None or outcome.failed is not None:
        return record
    if record.peer == "plain":
        norms = outcome.values["norm"], reference.values["norm"]
        if max(norms) > min(norms) * (1 + SAME_TO):
            failed = f"another job: the weights' norm is {norms[0]:.6g}, not {norms[1]:.6g}"
    elif outcome.weights_sha256 != reference.weights_sha256:
        failed = (
            f"another job: its weights are {outcome.weights_sha256[:8]}, "
            f"not {reference.weights_sha256[:8]}"
        )
    return dataclasses.replace(record, outcome=dataclasses.replace(outcome, failed=failed))
