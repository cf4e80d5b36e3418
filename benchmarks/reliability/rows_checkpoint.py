"""Rows C2 to C4: checkpoints that were changed on the disk."""

import json
import os
import shutil
import signal
import time
from pathlib import Path

from benchmarks.reliability.clean import events_of, status_of
from benchmarks.reliability.faults_inside import SignalAt
from benchmarks.reliability.in_ranks import how_it_ended, trained
from benchmarks.reliability.row import Row, Trial, check
from benchmarks.reliability.rows_crash import HARD
from dist_train.checkpoint_folder import list_checkpoints, newest_good
from tests.settings import small

FLIPS, CUTS = 50, 5
HALF, WHOLE = 15, 25
BASE = (*HARD, "checkpoint.every_steps=5", "checkpoint.keep_last=3", "optim.schedule=constant")
BASE += ("eval.every_epochs=null",)
DAMAGES = (
    "one file deleted",
    "two swapped",
    "an older one under a newer name",
    "an empty file",
    "a future version",
    "another model's",
)


def c2(trial: Trial) -> float | None:
    """Cut the newest checkpoint's files at random places."""
    folder = _half_a_run(trial)
    newest, older = list_checkpoints(folder)[:2]
    missed = []
    for number in range(CUTS):
        path = newest / ("manifest.json" if number == 0 else "state.pt")
        whole = path.read_bytes()
        size = trial.dice.randrange(len(whole))
        os.truncate(path, size)
        if not _refused(folder, newest, older):
            missed.append(f"{path.name} cut to {size} of {len(whole)} bytes")
        if number < CUTS - 1:
            path.write_bytes(whole)
    return _finish(trial, missed, older)


def c3(trial: Trial) -> float | None:
    """Flip single bits anywhere in the newest checkpoint."""
    folder = _half_a_run(trial)
    newest, older = list_checkpoints(folder)[:2]
    files = sorted(path for path in newest.rglob("*") if path.is_file())
    missed = []
    for number in range(FLIPS):
        # Half of the flips hit the small files: by bytes alone nearly all would hit the tensors.
        path = trial.dice.choice(files)
        whole = bytearray(path.read_bytes())
        place, bit = trial.dice.randrange(len(whole)), trial.dice.randrange(8)
        whole[place] ^= 1 << bit
        path.write_bytes(whole)
        if not _refused(folder, newest, older):
            missed.append(f"{path.name} byte {place} bit {bit}")
        if number < FLIPS - 1:
            whole[place] ^= 1 << bit
            path.write_bytes(whole)
    return _finish(trial, missed, older)


def c4(trial: Trial) -> float | None:
    """Delete, swap, rename, empty, or exchange checkpoints."""
    kind = trial.one_of(DAMAGES)
    folder = _half_a_run(trial)
    newest, older, oldest = list_checkpoints(folder)[:3]
    manifest = newest / "manifest.json"
    expected = older
    if kind == "one file deleted":
        trial.dice.choice([newest / "state.pt", manifest]).unlink()
    elif kind == "two swapped":
        newest.rename(folder / "x")
        older.rename(newest)
        (folder / "x").rename(older)
        expected = oldest
    elif kind == "an older one under a newer name":
        shutil.copytree(oldest, folder / f"step_{WHOLE - 2:08d}")
        expected = newest
    elif kind == "an empty file":
        os.truncate(trial.dice.choice([newest / "state.pt", manifest]), 0)
    elif kind == "a future version":
        record = json.loads(manifest.read_text())
        manifest.write_text(json.dumps(record | {"format_version": record["format_version"] + 1}))
    else:
        return _another_model(trial, newest)
    trial.fired = True
    return _finish(trial, [], expected)


def _another_model(trial: Trial, newest: Path) -> float:
    """A whole, good checkpoint of another network: a mistake, told in one line."""
    other = trial.folder / "other"
    other.mkdir()
    words = (*BASE, "model.factory=tests.nets:plain_net", f"train.steps={int(newest.name[5:])}")
    trained(other, small(other / "run", *words), world_size=2)
    shutil.rmtree(newest)
    shutil.copytree(other / "run" / "checkpoints" / newest.name, newest)
    trial.fired = True
    begin = time.monotonic()
    config = small(trial.folder / "run", *BASE, f"train.steps={WHOLE}")
    outcomes = trained(trial.folder, config, world_size=2)
    told = how_it_ended(outcomes, trial.folder)
    check(all("is of another model" in str(o.error) for o in outcomes), told)
    check("\n" not in str(outcomes[0].error), "the message has several lines")
    check(status_of(trial.folder / "run")["exit_code"] == 2, "the exit code is not 2")
    return time.monotonic() - begin


def _half_a_run(trial: Trial) -> Path:
    """Stop a run near its middle; returns the checkpoints' folder."""
    config = small(trial.folder / "run", *BASE, f"train.steps={WHOLE}")
    mark = trial.folder / "stopped"
    stop = SignalAt(rank=0, step=HALF, place="step", number=signal.SIGTERM, mark=str(mark))
    outcomes = trained(trial.folder, config, stop, world_size=2)
    check(outcomes[0].error is None and mark.exists(), how_it_ended(outcomes, trial.folder))
    folder = trial.folder / "run" / "checkpoints"
    check(len(list_checkpoints(folder)) == 3, "there are not three checkpoints to damage")
    return folder


def _refused(folder: Path, newest: Path, older: Path) -> bool:
    told: list[str] = []
    found = newest_good(folder, told.append)
    return found is not None and found[0] == older and any(str(newest) in t for t in told)


def _finish(trial: Trial, missed: list[str], expected: Path) -> float:
    """Let the same run continue over the damage; it must take `expected` and end with the bits."""
    trial.fired = True
    words = (*BASE, f"train.steps={WHOLE}")
    begin = time.monotonic()
    outcomes = trained(trial.folder, small(trial.folder / "run", *words), world_size=2)
    sec = time.monotonic() - begin
    check(not missed, f"{len(missed)} not refused: {missed[:3]}")
    check(outcomes[0].error is None, how_it_ended(outcomes, trial.folder))
    taken = [event["checkpoint"] for event in events_of(trial.folder / "run", "resumed")]
    check(taken[-1:] == [str(expected)], f"resumed from {taken[-1:]} instead of {expected}")
    told = (trial.folder / "run" / "log" / "rank0.txt").read_text()
    check("checkpoint refused" in told, "the refusal was not told")
    difference = trial.clean.difference(trial.folder / "run", 2, words)
    check(difference is None, str(difference))
    return sec


ROWS = (
    Row(
        id="C2",
        promise="a truncated checkpoint is refused, said so, and the one before it continues "
        "bitwise",
        injection="the newest checkpoint's files cut at random places",
        num_trials=20,
        faults=CUTS,
        measures="the resumed run",
        work=c2,
    ),
    Row(
        id="C3",
        promise="any single flipped bit in a checkpoint is found, and the one before it continues "
        "bitwise",
        injection="random bits flipped in the newest checkpoint's files, one at a time",
        num_trials=20,
        faults=FLIPS,
        measures="the resumed run",
        work=c3,
    ),
    Row(
        id="C4",
        promise="a checkpoint that is half deleted, swapped, stale, empty, of the future or of "
        "another model is refused in one line",
        injection="; ".join(DAMAGES),
        num_trials=24,
        measures="the resumed run",
        work=c4,
        small=3,
    ),
)
