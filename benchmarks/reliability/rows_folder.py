"""Rows C7, C8, W2: two jobs in one folder, wrong clocks, records that survive a kill."""

import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from benchmarks.reliability.clean import events_of, status_of, summary_of
from benchmarks.reliability.in_ranks import (
    last_step,
    pids,
    train_in_rank,
    trained,
    wait_until,
)
from benchmarks.reliability.in_torchrun import REPOSITORY, kill_all, send
from benchmarks.reliability.row import Row, Trial, check
from benchmarks.reliability.rows_crash import SHORT
from dist_train.checkpoint_folder import list_checkpoints
from dist_train.config import ConfigError
from tests.ranks import free_port, start_ranks_of
from tests.settings import SMALL, metrics, small

RECORDS = 400
WRONG_CLOCK = Path(__file__).parent / "wrong_clock"
DAY = 86_400
CLOCKS = ("one day ahead", "one day back", "jumping", "another on each rank")


def w2(trial: Trial) -> float | None:
    """Kill a process that has logged 400 records."""
    path = trial.folder / "metrics.jsonl"
    begin = time.monotonic()
    ready = trial.folder / "logged"
    with ThreadPoolExecutor(1) as thread:
        job = thread.submit(start_ranks_of, log_records, 0, trial.folder)
        wait_until(lambda: ready.exists() and ready.stat().st_size >= RECORDS, "nothing is logged")
        time.sleep(trial.dice.uniform(0.0, 0.01))
        trial.fired = send(pids(trial.folder, 1)[0], signal.SIGKILL)
        job.result()
    acknowledged = ready.stat().st_size
    lines = path.read_text().splitlines()
    steps = [json.loads(line)["step"] for line in lines]
    trial.notes |= {"acknowledged": acknowledged, "kept": len(steps)}
    check(len(steps) >= acknowledged, f"{len(steps)} of {acknowledged} records are there")
    check(steps == list(range(1, len(steps) + 1)), "a record is missing, repeated or torn")
    return time.monotonic() - begin


def log_records(folder: Path) -> None:
    """Log for ever; one byte in folder/logged for each record that log() has returned from."""
    from dist_train.tracking import JsonlTracker

    tracker = JsonlTracker(folder / "metrics.jsonl", restored_step=0)
    (folder / "pid.0").write_text(str(os.getpid()))
    acknowledged = os.open(folder / "logged", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    step = 0
    while True:
        step += 1
        tracker.log({"step": step, "train/loss": 2.3, "perf/images_per_sec": 1000.0 / step})
        os.write(acknowledged, b".")


def c7(trial: Trial) -> float | None:
    """Two jobs start in the same folder within 10 ms."""
    world_size = 1 + trial.seed % 2
    words = (*SHORT, f"train.steps={60}")
    names = ("first", "second")
    for name in names:
        (trial.folder / name).mkdir()
    config = small(trial.folder / "run", *words)
    apart = trial.dice.uniform(0.0, 0.01)
    begin = time.monotonic()
    with ThreadPoolExecutor(2) as threads:
        jobs = []
        for name in names:
            jobs.append(
                threads.submit(
                    start_ranks_of, train_in_rank, world_size, trial.folder / name, config, ()
                )
            )
            time.sleep(apart)
        outcomes = [job.result() for job in jobs]
    trial.fired = True
    trial.notes |= {"ranks": world_size, "apart_ms": round(1000 * apart, 1)}
    won = [i for i, ranks in enumerate(outcomes) if all(o.error is None for o in ranks)]
    check(len(won) == 1, f"{len(won)} of two jobs trained: {[o[0].error for o in outcomes]}")
    winner = int((trial.folder / names[won[0]] / "pid.0").read_text())
    for outcome in outcomes[1 - won[0]]:
        told = str(outcome.error)
        check(isinstance(outcome.error, ConfigError), f"no clear refusal: {outcome.error!r}")
        check(f"in use by process {winner} " in told, f"does not name {winner}: {told}")
    difference = trial.clean.difference(trial.folder / "run", world_size, words)
    check(difference is None, str(difference))
    # The lock of a process that was killed is no obstacle.
    sec = time.monotonic() - begin
    again = trained(trial.folder, small(trial.folder / "run", *words), world_size=world_size)
    check(again[0].error is None, f"the folder stays locked: {again[0].error}")
    return sec


def c8(trial: Trial) -> float | None:
    """Clocks that are wrong, jump, or differ; a kill and a resume under yet another clock."""
    kind = trial.one_of(CLOCKS)
    first, second = _clocks(trial, kind), _clocks(trial, kind)
    stop = trial.dice.randrange(10, 40)
    trial.notes["step"] = stop
    begin = time.monotonic()
    ranks = started = _start_under(trial, first)
    try:
        wait_until(lambda: last_step(trial.folder / "run") >= stop, "did not start", 90.0)
        _jump(trial, kind)
        time.sleep(0.02)
        trial.fired = all([send(p.pid, signal.SIGKILL) for p in ranks])
        [p.wait() for p in ranks]
        folder = trial.folder / "run" / "checkpoints"
        saved = list_checkpoints(folder)
        for age, path in enumerate(saved):  # the newest step looks oldest
            os.utime(path, (1e9 - age, 1e9 + 1000.0 * age))
        ranks = _start_under(trial, second)
        started = [*started, *ranks]
        while any(p.poll() is None for p in ranks):
            _jump(trial, kind)
            time.sleep(0.05)
            check(time.monotonic() - begin < 180.0, "no end in 180 s")
    finally:
        kill_all(trial.folder / "run")
        for process in started:
            process.wait()
    ends = [p.returncode for p in ranks]
    check(ends == [0, 0], f"exit codes {ends}: {status_of(trial.folder / 'run')}")
    taken = [event["step"] for event in events_of(trial.folder / "run", "resumed")]
    wanted = [int(saved[0].name[5:])] if saved else []
    check(taken == wanted, f"resumed at {taken}, the newest checkpoint was {wanted}")
    difference = trial.clean.difference(trial.folder / "run", 2, SHORT)
    check(difference is None, str(difference))
    sec = time.monotonic() - begin
    wall = summary_of(trial.folder / "run")["wall_sec"]
    check(0 <= wall <= sec, f"wall_sec is {wall:.1f}, the run took at most {sec:.1f} s")
    off = max(abs(m["time"] - time.time()) for m in metrics(trial.folder / "run"))
    check(off > 600, f"the clock was right to {off:.0f} s: nothing was tested")
    rates = [m["perf/step_sec"] for m in metrics(trial.folder / "run") if "perf/step_sec" in m]
    check(all(0 < rate < 60 for rate in rates), "a step took no time, or an age")
    return sec


def _clocks(trial: Trial, kind: str) -> list[dict[str, str]]:
    """Return each rank's variables for its wrong clock."""
    if kind == "jumping":
        _jump(trial, kind)
        return [{"WRONG_CLOCK_FILE": str(trial.folder / "clock")}] * 2
    shifts = {"one day ahead": [DAY, DAY], "one day back": [-DAY, -DAY]}
    shifts["another on each rank"] = [3600 * trial.dice.choice((-7, -2, 3, 8)) for _ in range(2)]
    return [{"WRONG_CLOCK_SEC": str(shift)} for shift in shifts[kind]]


def _jump(trial: Trial, kind: str) -> None:
    if kind == "jumping":
        (trial.folder / "clock.new").write_text(str(trial.dice.randrange(-90_000, 90_000)))
        (trial.folder / "clock.new").rename(trial.folder / "clock")


def _start_under(trial: Trial, clocks: list[dict[str, str]]) -> list["subprocess.Popen[bytes]"]:
    port = free_port()
    ranks = []
    for rank, clock in enumerate(clocks):
        env = os.environ | clock | {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
        env |= {"LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        env["PYTHONPATH"] = f"{WRONG_CLOCK}:{REPOSITORY}"
        command = [sys.executable, "-m", "dist_train", *SMALL, *SHORT]
        with (trial.folder / f"clocked.{rank}").open("ab") as output:
            ranks.append(
                subprocess.Popen(
                    [*command, f"run_dir={trial.folder / 'run'}"],
                    cwd=REPOSITORY,
                    env=env,
                    stdout=output,
                    stderr=output,
                )
            )
    return ranks


ROWS = (
    Row(
        id="W2",
        promise="kill -9 loses no record that was logged",
        injection=f"kill -9 after {RECORDS} records",
        num_trials=20,
        measures="the whole trial",
        work=w2,
    ),
    Row(
        id="C7",
        promise="of two jobs in one folder exactly one trains, and the other names it",
        injection="two jobs started at most 10 ms apart",
        num_trials=30,
        measures="both jobs",
        work=c7,
    ),
    Row(
        id="C8",
        promise="wrong, jumping or differing clocks change neither the order of checkpoints nor "
        "any duration",
        injection=f"time of day {', '.join(CLOCKS)}; a kill; times of files turned round",
        num_trials=20,
        measures="both attempts",
        work=c8,
    ),
)
