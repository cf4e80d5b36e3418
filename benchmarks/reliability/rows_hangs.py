"""Rows H and S: ranks that hang, differ or are slow."""

import json
import os
import signal
import socket
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest import mock

from benchmarks.reliability.clean import events_of
from benchmarks.reliability.faults_inside import around_step
from benchmarks.reliability.in_ranks import (
    called,
    how_it_ended,
    last_step,
    pids,
    trained,
    training,
    wait_until,
)
from benchmarks.reliability.row import Row, Trial, check
from benchmarks.reliability.rows_crash import HARD
from dist_train.monitor.limits import SLOW_DISK
from tests.faults import Fault, train_with
from tests.settings import small
from tests.test_watchdog import QUICK, stacks, with_wrong_collective

LIMIT_SEC = 10.0
H2_HANG_SEC = 1.0
# A save is given more than a step, as a disk may be slow: README.md has the table of limits.
SAVE_LIMIT_SEC = SLOW_DISK * H2_HANG_SEC + 3.0
H1 = (*HARD, "train.steps=300", "checkpoint.every_steps=20", "optim.schedule=constant")
PHASES = {  # place: the phase that must be told
    "in the forward": "forward",
    "in the backward": "backward",
    "in the optimizer": "optimizer",
    "in the data": "data",
    "after the backward": "all-reduce",
    "in the evaluation": "evaluation",
    "in the log": "logging",
    "in the save": "checkpoint",
}
HOWS = ("c call", "c loop", "python loop", "deadlock", "blocked write", "stop")
FACTORS = ("1.5", "2", "5")
# The rest of a step takes some ms, equal on all ranks: beside a short forward it would count.
WORK_SEC, SLOW_FROM, SLOW_STEPS = 0.1, 30, 100  # the monitor looks at five windows of 10 steps


def h1(trial: Trial) -> float | None:
    """SIGSTOP one of three ranks from outside at a random moment, at the default limit."""
    rank, step = trial.dice.randrange(3), trial.dice.randrange(20, 120)
    trial.notes |= {"rank": rank, "step": step}
    run = trial.folder / "run"
    config = small(run, *H1)
    with training(trial.folder, config, world_size=3) as future:
        processes = pids(trial.folder, 3)
        wait_until(lambda: future.done() or last_step(run) >= step, f"no step {step}")
        time.sleep(trial.dice.uniform(0.0, 0.03))
        os.kill(processes[rank], signal.SIGSTOP)
        stopped = time.time()
        ends = future.result()
    trial.fired = last_step(run) < 300
    check(trial.fired, "the run was over before it was stopped")
    sec = _the_hang(trial, rank, stopped)
    check(ends[rank].exit_code == -signal.SIGKILL, how_it_ended(ends, trial.folder))
    again = trained(trial.folder, config, world_size=3)
    check(all(o.error is None for o in again), how_it_ended(again, trial.folder))
    difference = trial.clean.difference(run, 3, H1)
    check(difference is None, str(difference))
    return sec


def h2(trial: Trial) -> float | None:
    """One rank hangs by itself, in one of the ways and places, with a limit of a second."""
    how = trial.one_of(HOWS)
    place = trial.dice.choice(sorted(PHASES))
    if place == "in the save" and how not in ("blocked write", "deadlock"):
        place = "in the backward"  # in the writer's thread a rank hangs only by what blocks it
    rank = 0 if place in ("in the log", "in the save") else trial.dice.randrange(3)
    step = trial.dice.randrange(30, 100)
    trial.notes |= {"place": place, "rank": rank, "step": step}
    mark = trial.folder / "fired"
    fault = Fault(rank=rank, step=step, place=place, kind=how, mark=str(mark))
    words = (f"guards.hang_sec={H2_HANG_SEC}", "eval.every_epochs=1")
    config = small(trial.folder / "run", *QUICK, *words)
    ends = called(trial.folder, 3, train_with, config, fault)
    trial.fired = mark.exists()
    check(trial.fired, how_it_ended(ends, trial.folder))
    limit_sec = SAVE_LIMIT_SEC if place == "in the save" else LIMIT_SEC
    sec = _the_hang(trial, rank, mark.stat().st_mtime, PHASES[place], limit_sec)
    again = called(trial.folder, 3, train_with, config, None)
    check(all(o.error is None for o in again), how_it_ended(again, trial.folder))
    return sec


def _the_hang(
    trial: Trial, rank: int, since: float, phase: str = "", limit_sec: float = LIMIT_SEC
) -> float:
    run = trial.folder / "run"
    found = events_of(run, "hang")
    check(len(found) == 1, f"{len(found)} events of a hang")
    reason, sec = found[0]["reason"], found[0]["time"] - since
    check(found[0]["rank"] == rank, f"blamed another: {reason}")
    check(f"hangs: {phase}" in reason, f"another phase than {phase}: {reason}")
    num = len(stacks(Path(found[0]["report"]).read_text()))
    check(num == 3, f"stacks of {num} ranks instead of 3")
    check(sec <= limit_sec, f"found after {sec:.1f} s")
    return sec


def h3(trial: Trial) -> float | None:
    """A rank leaves out a collective, or calls one with another shape."""
    kind = trial.one_of(("skip", "shape"))
    rank, step = trial.dice.randrange(2), trial.dice.randrange(30, 100)
    trial.notes |= {"rank": rank, "step": step}
    run, mark = trial.folder / "run", trial.folder / "fired"
    config = small(run, *QUICK, "eval.every_steps=9")
    ends = called(trial.folder, 2, with_wrong_collective, config, kind, str(mark), rank, step)
    trial.fired = mark.exists()
    check(trial.fired, f"no collective was wrong: {how_it_ended(ends, trial.folder)}")
    check(all(o.exit_code != 0 or o.error for o in ends), how_it_ended(ends, trial.folder))
    if kind == "shape":  # gloo ends a process by itself; its stacks must be kept
        wait_until(lambda: events_of(run, "died"), "no word of the dead rank", 20.0)
        (event,) = events_of(run, "died")
        # The monitor may come too late for a report; what the process itself has left is kept.
        kept = [Path(event["report"])] if event["report"] else []
        kept += (run / "log").glob(f"failure-*-rank{event['rank']}.crash")
        told = any("in all_reduce" in path.read_text(errors="replace") for path in kept)
        check(told, f"no stack of the dead rank in {[path.name for path in kept]}")
        trial.notes["report"] = bool(event["report"])
        trial.notes["dead"] = event["rank"]
    else:
        (event,) = events_of(run, "hang")
        check("they call different ones" in event["reason"], event["reason"])
        report = Path(event["report"]).read_text()
        for number in (0, 1):
            check(f"rank {number}: waits" in report.replace(_host(), ""), f"rank {number}: no call")
    sec = event["time"] - mark.stat().st_mtime
    check(sec <= LIMIT_SEC, f"noticed after {sec:.1f} s")
    return sec


def _host() -> str:
    return f" on {socket.gethostname()}"


class Slowed:
    """Every rank's forward takes WORK_SEC; one rank's `factor` times that from a step on."""

    rank = None

    def __init__(self, slow: int, factor: float) -> None:
        self.slow, self.factor = slow, factor

    def arm(self, stack: ExitStack) -> None:
        """Patch the forward."""
        from dist_train.parallel import Replica

        now, real = {"step": 0}, Replica.__call__
        mine = int(os.environ["RANK"]) == self.slow

        def work(_parts: Any, step: int, take: Any) -> Any:
            now["step"] = step
            return take()

        def forward(*args: Any, **kwargs: Any) -> Any:
            time.sleep(WORK_SEC * (self.factor if mine and now["step"] >= SLOW_FROM else 1.0))
            return real(*args, **kwargs)

        around_step(stack, work)
        stack.enter_context(mock.patch.object(Replica, "__call__", forward))


def s1(trial: Trial) -> float | None:
    """One rank of three becomes slow; it and nobody else is named."""
    factor, rank = float(trial.one_of(FACTORS)), trial.dice.randrange(3)
    trial.notes["rank"] = rank
    steps = f"train.steps={SLOW_FROM + SLOW_STEPS}"
    config = small(trial.folder / "run", *QUICK, "guards.hang_sec=5", steps)
    ends = trained(trial.folder, config, Slowed(rank, factor), world_size=3)
    check(all(o.error is None for o in ends), how_it_ended(ends, trial.folder))
    trial.fired = True
    named = events_of(trial.folder / "run", "straggler")
    trial.notes["named"] = [(event["rank"], event["step"]) for event in named]
    check(any(event["rank"] == rank for event in named), "not named")
    check(all(event["rank"] == rank for event in named), "a rank that is not slow was named")
    (first, *_) = named
    trial.notes["after_steps"] = first["step"] - SLOW_FROM
    lines = (trial.folder / "run" / "metrics.jsonl").read_text().splitlines()
    began = next(r["time"] for r in map(json.loads, lines) if r["step"] > SLOW_FROM)
    return first["time"] - began


ROWS = (
    Row(
        id="H1",
        promise="a stopped rank is found and named within 10 s at the default limit, with all "
        "stacks, and the run started again ends bitwise",
        injection="SIGSTOP of a random rank of three at a random moment",
        num_trials=30,
        measures="from the stop to the verdict",
        work=h1,
    ),
    Row(
        id="H2",
        promise="a rank that spins, holds the interpreter lock or cannot write is found and named "
        "with its phase, within 10 s at a limit of 1 s; in a save, as a disk may be slow, within "
        f"{SAVE_LIMIT_SEC:.0f} s",
        injection=f"{', '.join(HOWS)}, in {len(PHASES)} places of a step, limit of 1 s",
        num_trials=60,
        measures="from the fault to the verdict",
        work=h2,
    ),
    Row(
        id="H3",
        promise="ranks that call different collectives are named with their calls within 10 s",
        injection="a rank skips a collective, or its shape differs; limit of 1 s",
        num_trials=10,
        measures="from the fault to the verdict",
        work=h3,
        small=2,
    ),
    Row(
        id="S1",
        promise="a rank that is slower by 1.5 or more is named, and no other rank is",
        injection="one rank of three takes 1.5, 2, 5 times as long in its forward (of 100 ms)",
        num_trials=12,
        measures="from the first slow step to the event",
        work=s1,
    ),
)
