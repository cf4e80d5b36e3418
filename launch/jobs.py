"""`dist-train jobs`: how the submitted jobs stand, and which element of a sweep is best."""

import argparse
import dataclasses
import json
import math
import sys
from pathlib import Path

from dist_train.config import ConfigError
from dist_train.config.arguments import Parser, print_error
from launch import scontrol
from launch.job_record import JOBS_DIR, JobRecord, find_records, read_records
from launch.job_states import JobState, at_work, state_of

NEWEST = 30  # jobs, or elements of arrays, that are shown unless one is named


def main(argv: list[str]) -> int:
    """Run `dist-train jobs`; returns 0, or 2 for the user's mistake."""
    parser = Parser(
        prog="dist-train jobs",
        description="Show how jobs stand, by SLURM and by their run folders.",
    )
    parser.add_argument("job", nargs="?", metavar="JOB", help="77, 77_3, or a run folder")
    parser.add_argument("--compare", action="store_true", help="the results of a sweep, best first")
    parser.add_argument("--all", action="store_true", help=f"not only the newest {NEWEST}")
    parser.add_argument("--json", action="store_true", help="for programs")
    add_jobs_dir(parser)
    try:
        options = parser.parse_intermixed_args(argv)
        states, note = _states(options)
    except ConfigError as mistake:
        print_error(str(mistake))
        return 2
    if options.json:
        sys.stdout.write(json.dumps([_plain(state) for state in states], indent=1) + "\n")
        return 0
    table = _comparison(states) if options.compare else _overview(states)
    sys.stdout.write(f"{table}{note}")
    return 0


def add_jobs_dir(parser: argparse.ArgumentParser) -> None:
    """Add the option that all verbs about jobs have."""
    parser.add_argument(
        "--jobs-dir", type=Path, default=JOBS_DIR, help="where the records of jobs are"
    )


def records_of(jobs_dir: Path, job: str | None) -> list[JobRecord]:
    """Return the records that are meant; all, if no job is named.

    Raises:
        ConfigError: there is none.
    """
    records = read_records(jobs_dir)
    if job is None:
        return records
    found = find_records(records, job)
    if not found:
        newest = f"the newest there is {records[-1].job_id}" if records else "it holds none"
        raise ConfigError(
            f"{jobs_dir} has no record of {job!r}, {newest}: give a job's number or a run folder, "
            "from the folder where you submitted, or --jobs-dir"
        )
    return found


def _states(options: argparse.Namespace) -> tuple[list[JobState], str]:
    records = records_of(options.jobs_dir, options.job)
    if options.compare:
        records = _newest_sweep(records)
    everything = options.all or options.compare or options.job
    left_out = 0 if everything else max(0, len(records) - NEWEST)
    notes = [f"{left_out} older: --all"] if left_out else []
    records, problem = records[left_out:], ""
    if not scontrol.is_available():
        problem = "no SLURM here"
    try:
        known = {} if problem else scontrol.states_of([record.job_id for record in records])
    except scontrol.SlurmError as error:
        known, problem = {}, str(error)
    if problem:
        notes.append(f"{problem}; this is what the run folders say")
    holding = at_work(records)
    states = [
        state_of(r, known.get(r.job_id), asked=not problem, holds=r.job_id in holding)
        for r in records
    ]
    return states, "".join(f"({note})\n" for note in notes)


def _newest_sweep(records: list[JobRecord]) -> list[JobRecord]:
    arrays = [r.job_id.partition("_")[0] for r in records if r.overrides]
    if not arrays:
        raise ConfigError("--compare needs a sweep: name one, dist-train jobs JOB --compare")
    return [r for r in records if r.overrides and r.job_id.partition("_")[0] == arrays[-1]]


def _overview(states: list[JobState]) -> str:
    if not states:
        return "no jobs\n"
    rows = [("job", "name", "SLURM", "run", "step", "last", "restarts", "run folder")]
    below: list[str] = [""]
    for state in states:
        record = state.record
        slurm = (state.slurm or "-") + (f" ({state.waits_for})" if state.waits_for else "")
        run = "taken over" if state.taken_over else state.run or "-"
        name = " ".join((record.name, *record.overrides))
        last = _metric(state)
        row = (record.job_id, name, slurm, run, _step(state), last, str(state.restarts))
        rows.append((*row, record.run_dir))
        below.append(f"    {state.reason}\n" if state.reason else "")
    return "".join(f"{line}\n{more}" for line, more in zip(_aligned(rows), below, strict=True))


def _comparison(states: list[JobState]) -> str:
    """Return the elements of a sweep, the best finished one first and marked."""
    ranked = sorted(states, key=_merit, reverse=True)
    keys = list(dict.fromkeys(_key(o) for state in states for o in state.record.overrides))
    rows = [("", "job", *keys, "validation", "test", "loss", "step", "run", "run folder")]
    for place, state in enumerate(ranked):
        values = {_key(o): o.partition("=")[2] for o in state.record.overrides}
        test = state.accuracy if state.run == "finished" else None
        rows.append(
            (
                "*" if place == 0 and _merit(state)[0] else "",
                state.record.job_id,
                *(values.get(key, "") for key in keys),
                _percent(state.best_val_accuracy),
                _percent(test),
                "-" if state.loss is None else f"{state.loss:.4g}",
                _step(state),
                state.run or (state.slurm or "-"),
                state.record.run_dir,
            )
        )
    by = "validation accuracy" if any(s.best_val_accuracy for s in states) else "test accuracy"
    return "".join(f"{line}\n" for line in _aligned(rows)) + f"(* the best by {by})\n"


def _merit(state: JobState) -> tuple[bool, float]:
    """Return what elements are ordered by: finished ones first, by validation where there is one.

    Chosen by the test split, the best one's accuracy would flatter.
    """
    value = state.accuracy if state.best_val_accuracy is None else state.best_val_accuracy
    return state.run == "finished", -1.0 if value is None else value


def _key(override: str) -> str:
    return override.partition("=")[0].lstrip("+")


def _step(state: JobState) -> str:
    if state.step is None:
        return "-"
    return f"{state.step}" if state.total_steps is None else f"{state.step}/{state.total_steps}"


def _metric(state: JobState) -> str:
    if state.accuracy is not None and (state.run == "finished" or state.loss is None):
        return f"accuracy {state.accuracy:.2%}"
    return "-" if state.loss is None else f"loss {state.loss:.4g}"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.2%}"


def _aligned(rows: list[tuple[str, ...]]) -> list[str]:
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    lines = ("  ".join(f"{c:<{w}}" for c, w in zip(row, widths, strict=True)) for row in rows)
    return [line.rstrip() for line in lines]


def _plain(state: JobState) -> dict[str, object]:
    """Return a job as JSON has it: its record's fields beside those of its state."""
    values = dataclasses.asdict(state)
    told = values.pop("record") | values
    wild = (k for k, v in told.items() if isinstance(v, float) and not math.isfinite(v))
    return told | {name: str(told[name]) for name in wild}
