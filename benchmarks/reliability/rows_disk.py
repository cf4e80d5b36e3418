"""Rows C1, C5, C6 and C10: disks that are full, fail, lose their power, or are slow."""

import errno
import shutil
import statistics
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from benchmarks.reliability.clean import events_of, lines_of
from benchmarks.reliability.faults_inside import around_step
from benchmarks.reliability.in_ranks import called, how_it_ended, trained
from benchmarks.reliability.row import Row, Trial, check
from dist_train.checkpoint import write_checkpoint
from dist_train.checkpoint_folder import (
    BadCheckpointError,
    list_checkpoints,
    newest_good,
    read_verified,
)
from dist_train.checkpoint_writer import CheckpointWriter
from tests.power_cuts import cut_power
from tests.settings import small
from tests.storage_faults import SmallDisk, refusing_writes, train_on_disk

STEPS, EVERY = 30, 2
WORDS = ("optim.schedule=constant", f"checkpoint.every_steps={EVERY}", "log_every=1")
WORDS += (f"train.steps={STEPS}",)
CODES = {"EIO": errno.EIO, "EDQUOT": errno.EDQUOT, "EROFS": errno.EROFS}
FAILURES = (*CODES, "vanished")
CUTS = 50
STATE_MIB, SAVES, STALL = 64, 3, 0.05


def c1(trial: Trial) -> float | None:
    """The disk is full for some steps of the run, or from a step on until it is over."""
    stays = trial.one_of(("gets room again", "stays full")) == "stays full"
    first = trial.dice.randrange(5, 15)
    last = None if stays else first + trial.dice.randrange(5, 12)
    trial.notes |= {"full_from": first, "to": last}
    begin = time.monotonic()
    with SmallDisk(trial.folder / "disk", 20) as disk:
        trial.notes["tmpfs"] = disk.is_real
        run = disk.path / "run"
        config = small(run, *WORDS)
        ends = called(trial.folder, 2, train_on_disk, config, disk.path, first, last)
        trial.fired = bool(events_of(run, "save_failed"))
        check(trial.fired, f"no save failed: {how_it_ended(ends, trial.folder)}")
        check(not list((run / "checkpoints").glob(".*")), "litter is left")
        found = newest_good(run / "checkpoints", lambda text: None)
        check(found is not None, "no checkpoint is left")
        if stays:
            check("give the same command again" in str(ends[0].error), str(ends[0].error))
            disk.empty()
            ends = called(trial.folder, 2, train_on_disk, config, disk.path, -1, None)
        else:
            check(events_of(run, "save_recovered"), "the saves never came back")
        steps = [line["step"] for line in lines_of(run) if "train/loss" in line]
        check(steps == list(range(1, STEPS + 1)), f"lines of steps {steps}")
        check(all(o.error is None for o in ends), how_it_ended(ends, trial.folder))
        difference = trial.clean.difference(run, 2, WORDS)
        check(difference is None, str(difference))
        sec = time.monotonic() - begin
    return sec


@dataclass(frozen=True, kw_only=True, slots=True)
class Failing:
    """Rank 0's checkpoints folder fails from one step to another: refuses, or is gone."""

    rank: int
    first: int
    last: int
    kind: str
    folder: str
    mark: str

    def arm(self, stack: ExitStack) -> None:
        """Patch the loop and the pauses between tries."""
        now = {"bad": False}
        folder = Path(self.folder)

        def work(_parts: Any, step: int, take: Any) -> Any:
            if self.kind == "vanished":
                if step == self.first:
                    shutil.rmtree(folder, ignore_errors=True)
                    Path(self.mark).touch()
            else:
                now["bad"] = self.first <= step < self.last
            if counted.injected:
                Path(self.mark).touch()
            return take()

        around_step(stack, work)
        code = CODES.get(self.kind, errno.EIO)
        refusal = refusing_writes(folder, code, when=lambda _size: now["bad"])
        counted = stack.enter_context(refusal)
        stack.enter_context(mock.patch("dist_train.checkpoint_writer.FIRST_RETRY_SEC", 0.01))


def c5(trial: Trial) -> float | None:
    """The folder of checkpoints fails in the middle of the run."""
    kind, first = trial.one_of(FAILURES), trial.dice.randrange(5, 15)
    last = first + trial.dice.randrange(5, 12)
    trial.notes |= {"first": first, "last": last}
    run, mark = trial.folder / "run", trial.folder / "fired"
    fault = Failing(
        rank=0, first=first, last=last, kind=kind, folder=str(run / "checkpoints"), mark=str(mark)
    )
    begin = time.monotonic()
    ends = trained(trial.folder, small(run, *WORDS), fault, world_size=2)
    sec = time.monotonic() - begin
    trial.fired = mark.exists()
    check(all(o.error is None for o in ends), how_it_ended(ends, trial.folder))
    if kind in CODES:
        check(events_of(run, "save_failed"), "no word of the failure")
        check(events_of(run, "save_recovered"), "the saves never came back")
    found = newest_good(run / "checkpoints", lambda text: None)
    newest = found[0].name if found else "none"
    check(newest == f"step_{STEPS:08d}", f"the end is not saved: {newest} is the newest")
    check(not list((run / "checkpoints").glob(".*")), "litter is left")
    difference = trial.clean.difference(run, 2, WORDS)
    check(difference is None, str(difference))
    return sec


def c6(trial: Trial) -> float | None:
    """Cut the power at CUTS places of five saves."""
    begin = time.monotonic()
    count = cut_power(trial.folder, CUTS, seed=trial.seed)
    trial.fired = count.injected == CUTS
    check(not count.missed, f"{len(count.missed)} lost: {count.missed[:3]}")
    return time.monotonic() - begin


def c10(trial: Trial) -> float | None:
    """Time what the caller waits for, the copy of the state included; the disk is idle before."""
    trial.fired = True  # nothing is injected: the time is the trial
    state = {"w": torch.randn(STATE_MIB << 18)}
    sync, waits = [], []
    (trial.folder / "sync").mkdir()
    for number in range(SAVES):
        begin = time.monotonic()
        write_checkpoint(trial.folder / "sync", state, step=number + 1)
        sync.append(time.monotonic() - begin)
    errors: list[str] = []
    writer = CheckpointWriter(
        trial.folder / "async", keep_last=2, on_saved=lambda step: None, on_error=errors.append
    )
    for number in range(SAVES):
        writer.wait()
        begin = time.monotonic()
        writer.save(state, step=number + 1, best_step=None)
        waits.append(time.monotonic() - begin)
    writer.close()
    check(not errors, str(errors))
    for path in list_checkpoints(trial.folder / "async"):
        try:
            read_verified(path)
        except BadCheckpointError as bad:
            check(False, f"a checkpoint is not whole: {bad}")
    stall = statistics.median(waits) / statistics.median(sync)
    trial.notes |= {"stall": round(stall, 4), "sync_sec": round(statistics.median(sync), 3)}
    check(stall <= STALL, f"the caller waits {stall:.1%} of a synchronous save")
    return statistics.median(waits)


ROWS = (
    Row(
        id="C1",
        promise="a disk that is full during a save: training goes on, the old checkpoint stays, no "
        "litter, an alert; saves come back with the space",
        injection="a small tmpfs that fills up, and gets room again or not",
        num_trials=20,
        measures="the whole run",
        work=c1,
    ),
    Row(
        id="C5",
        promise="a folder that becomes read-only, vanishes, or fails to write: retries, alerts, "
        "goes on; the end is saved",
        injection=f"{', '.join(FAILURES)}, for some steps, in the middle of a write",
        num_trials=20,
        measures="the whole run",
        work=c5,
    ),
    Row(
        id="C6",
        promise="after a power cut the last acknowledged checkpoint loads",
        injection="writes that were not synced are dropped, at each place of five saves",
        num_trials=20,
        faults=CUTS,
        measures=f"{CUTS} cuts",
        work=c6,
    ),
    Row(
        id="C10",
        promise="an asynchronous save stalls the step by no more than 5 % of a synchronous one",
        injection=f"none: saves of {STATE_MIB} MiB are timed",
        num_trials=20,
        measures="of stall",
        work=c10,
        small=0,  # it compares times: for a machine that does nothing else
        known="a disk that takes 64 MiB in 0.15 s leaves 7 ms for the one copy of the state",
    ),
)
