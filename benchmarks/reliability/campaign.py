"""Run trials: choose the seeds, give each a folder of its own, and write down how it ended."""

import contextlib
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

from benchmarks.reliability import results
from benchmarks.reliability.clean import CleanRuns
from benchmarks.reliability.in_torchrun import kill_all
from benchmarks.reliability.row import BrokenPromiseError, Options, Row, Trial
from tests.ranks import run_ranks

SMALL_MEAN_SEC = 15.0  # between two kills of the small form's storm


def run_rows(
    rows: list[Row],
    *,
    num_trials: int | None,
    seeds: list[int] | None,
    small: bool,
    again: bool,
    options: Options,
    folder: Path,
    keep: Path | None,
) -> bool:
    """Run the rows one trial at a time; returns whether all did as expected.

    Args:
        rows: what to run.
        num_trials: seeds 0..N-1; None: each row's own N.
        seeds: these seeds instead.
        small: each row's small form.
        again: also seeds that were tried with this code before.
        options: for long trials.
        folder: where the results are appended.
        keep: copy the folders of failed trials here.
    """
    good = True
    with tempfile.TemporaryDirectory(prefix="reliability-") as work:
        clean = CleanRuns(Path(work) / "clean")
        for row in rows:
            survived = True
            wanted = seeds
            if wanted is None:
                default = row.small if small else row.num_trials
                wanted = list(range(num_trials if num_trials is not None else default))
            if row.work is None or not wanted:
                if row.work is not None:
                    _tell(
                        f"{row.id:<4} not in the small form: it takes minutes, or a quiet machine"
                    )
                continue
            why_not = row.cannot_run()
            if why_not is not None:
                _tell(f"{row.id:<4} NOT RUN: {why_not}")
                continue
            stamp = results.surroundings(row.work)
            done = (
                set() if again else results.seeds_done(results.read(folder, row.id), stamp["code"])
            )
            minutes = row.small_minutes if small else None
            asked = Options(minutes=options.minutes or minutes, mean_sec=options.mean_sec)
            if small and row.small_minutes is not None:
                asked = Options(minutes=asked.minutes, mean_sec=SMALL_MEAN_SEC)
            to_do = [seed for seed in wanted if seed not in done]
            if to_do:
                run_ranks(os.getpid, 1)  # no trial's time holds the start of the ranks' server
            for seed in to_do:
                trial = Trial(
                    seed=seed,
                    folder=Path(tempfile.mkdtemp(prefix=f"{row.id}-{seed}-", dir=work)),
                    clean=clean,
                    options=asked,
                    faults=row.faults,
                )
                record = run_trial(row, trial)
                results.append(folder, row.id, record | stamp)
                survived = survived and record["passed"]
                _tell(_line(row, record))
                if not record["passed"] and keep is not None:
                    shutil.copytree(trial.folder, keep / trial.folder.name, symlinks=True)
                shutil.rmtree(trial.folder, ignore_errors=True)
            if row.known:
                _tell(f"{row.id:<4} known to fail: {row.known}")
            good = good and (survived or bool(row.known))
    return good


def run_trial(row: Row, trial: Trial) -> dict[str, Any]:
    """Run one trial to whatever end; returns what its line says of it."""
    assert row.work is not None
    sec, reason, begin = None, "", time.monotonic()
    try:
        with _limit(row.limit_sec):
            sec = row.work(trial)
    except BrokenPromiseError as failure:
        reason = str(failure)
    except Exception as error:  # whatever went wrong, the trial did not pass
        reason = f"{type(error).__name__}: {error}"
        traceback.print_exc()
    finally:
        _clean_up(trial.folder)
    if not reason and not trial.fired:
        reason = "the fault never fired"
    for path in (f"{trial.folder}/", f"{results.ROOT}/"):  # results are read on other machines
        reason = reason.replace(path, "")
    return {
        "seed": trial.seed,
        "passed": not reason,
        "sec": None if sec is None else round(sec, 3),
        "fired": trial.fired,
        "reason": " ".join(reason.split())[:500],
        "faults": trial.faults,
        "notes": trial.notes,
        "wall_sec": round(time.monotonic() - begin, 1),
    }


@contextlib.contextmanager
def _limit(seconds: float) -> Iterator[None]:
    def over(_number: int, _frame: FrameType | None) -> None:
        raise TimeoutError(f"the trial was not over within {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, over)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _clean_up(folder: Path) -> None:
    """End what the trial started and did not end."""
    kill_all(folder / "run")
    for process in multiprocessing.active_children():
        process.kill()
        process.join()


def _line(row: Row, record: dict[str, Any]) -> str:
    seconds = "" if record["sec"] is None else f"{record['sec']:.2f} s {row.measures}"
    notes = ", ".join(f"{key} {value}" for key, value in record["notes"].items())
    end = "passed" if record["passed"] else f"FAILED: {record['reason']}"
    told = f"{row.id:<4} seed {record['seed']:<4} {end}  {seconds}  ({notes})"
    return f"{told} [{record['wall_sec']:.0f} s]"


def _tell(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()
