"""How jobs stand: what SLURM says of each, and what its run's folder says of itself."""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dist_train.config.whole_file import read_json
from launch import scontrol
from launch.job_record import JobRecord

# Of what status.json holds.
KINDS = {"state": str, "step": int, "attempt": int, "chain": str, "time": int | float}
TAIL_BYTES = 1 << 16  # of a file of lines, from its end
# What the ranks write to the job's output.
PROGRESS = re.compile(r"^step (\d+)/(\d+)", re.MULTILINE)
ERROR = re.compile(r"^dist-train: error: (.+)", re.MULTILINE)


@dataclass(frozen=True, kw_only=True, slots=True)
class JobState:
    """One job, or one element of an array."""

    record: JobRecord
    slurm: str | None  # SLURM's word; None: it does not know the job any more, or is not here
    waits_for: str  # why it waits in the queue
    run: str | None  # running, finished, preempted, failed, or died; None: it has not begun
    reason: str  # in one line, why it failed
    step: int | None
    total_steps: int | None
    loss: float | None  # the newest that is known
    accuracy: float | None  # of the newest evaluation; of the test split, once finished
    best_val_accuracy: float | None
    restarts: int
    taken_over: bool  # another job has gone on with the run's folder since


def at_work(records: list[JobRecord]) -> set[str]:
    """Return the ids of jobs that their folder tells of: of a chain, the last one that has begun.

    A job has begun when it has written something.
    """
    holder = {record.chain: record.job_id for record in reversed(records)}
    begun = (r for r in records if r.chain and r.path(r.output).is_file())
    holder |= {record.chain: record.job_id for record in begun}
    return {r.job_id for r in records if not r.chain or holder[r.chain] == r.job_id}


def state_of(
    record: JobRecord, job: scontrol.Job | None, *, asked: bool, holds: bool = True
) -> JobState:
    """Return how a job stands.

    Args:
        record: what is remembered of it.
        job: what SLURM says of it; None: nothing.
        asked: whether SLURM was asked; if so, a job that it does not know is over.
        holds: whether it is the one of its chain that is at work on the folder.
    """
    folder = record.path(record.run_dir)
    status = _status_in(folder)
    mine = holds and status.get("chain") in (f"slurm-{record.job_id}", f"slurm-{record.chain}")
    begun, over = record.path(record.output).is_file(), job is None or job.is_over
    taken_over = not mine and begun and over and status.get("time", 0.0) > record.submitted
    if not mine:
        status = {}
    lines = _records_of(folder / "metrics.jsonl") if status else []
    summary = read_json(folder / "summary.json") if status.get("state") == "finished" else {}
    steps = [x["step"] for x in (status, *lines) if isinstance(x.get("step"), int)]
    written = tail(record.path(record.output)).decode(errors="replace") if begun else ""
    progress, errors = PROGRESS.findall(written), ERROR.findall(written)
    run = status.get("state")
    if run == "running" and asked and (over or (job is not None and job.is_waiting)):
        run = "died"
    failed = run in ("failed", "died") or (job is not None and job.state == "FAILED")
    reason = str(status.get("reason") or (errors[-1] if errors else ""))
    accuracy = _number(summary.get("eval_accuracy"))
    return JobState(
        record=record,
        slurm=None if job is None else job.state,
        waits_for=job.reason if job is not None and job.is_waiting else "",
        run=run,
        reason=" ".join(reason.split()) if failed else "",
        step=max(steps, default=None),
        total_steps=int(progress[-1][1]) if progress else None,
        loss=_last(lines, "train/loss"),
        accuracy=_last(lines, "eval/accuracy") if accuracy is None else accuracy,
        best_val_accuracy=_number(summary.get("best_val_accuracy")),
        restarts=max(
            int(status.get("attempt") or 0),
            _attempt_of_chain(folder, status),
            0 if job is None else job.restarts,
        ),
        taken_over=taken_over,
    )


def tail(path: Path, num_bytes: int = TAIL_BYTES) -> bytes:
    """Return the whole lines at the end of a file; nothing if there is none."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(max(0, size - num_bytes))
            data = file.read()
    except OSError:
        return b""
    return data if size <= num_bytes else data.partition(b"\n")[2]


def _status_in(folder: Path) -> dict[str, Any]:
    """Return what status.json holds, without what is of another kind than the ranks write."""
    told = read_json(folder / "status.json").items()
    return {name: value for name, value in told if isinstance(value, KINDS.get(name, object))}


def _attempt_of_chain(folder: Path, status: dict[str, Any]) -> int:
    chain = read_json(folder / "chain.json")
    attempt = chain.get("attempt")
    mine = bool(status) and chain.get("chain") == status["chain"]
    return attempt if mine and isinstance(attempt, int) else 0


def _records_of(path: Path) -> list[dict[str, Any]]:
    """Return the last records of metrics.jsonl, the newest first; torn lines are left out."""
    records = []
    for line in reversed(tail(path).splitlines()):
        try:
            records.append(json.loads(line))
        except ValueError:
            continue
    return [record for record in records if isinstance(record, dict)]


def _last(records: list[dict[str, Any]], name: str) -> float | None:
    found = (_number(record[name]) for record in records if name in record)
    return next(found, None)


def _number(value: Any) -> float | None:
    """Return a number; NaN is written as text."""
    try:
        return None if value is None else float(value)
    except (TypeError, ValueError):
        return None
