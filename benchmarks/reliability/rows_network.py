"""Row N2: ports that are taken, and strangers at the same port."""

import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import Future, ThreadPoolExecutor

from benchmarks.reliability.in_ranks import (
    how_it_ended,
    last_step,
    train_in_rank,
    wait_until,
)
from benchmarks.reliability.in_torchrun import REPOSITORY, send
from benchmarks.reliability.row import Row, Trial, check
from benchmarks.reliability.rows_crash import SHORT
from dist_train.config import Config
from tests.ranks import Outcome, free_port, start_ranks_of
from tests.settings import SMALL, small

KINDS = ("taken, dist-train", "taken, static ranks", "two jobs, one port", "port of a dead job")
ERROR_SEC = 5.0


def n2(trial: Trial) -> float | None:
    """One of four bad ports."""
    kind = trial.one_of(KINDS)
    if kind == "taken, dist-train":
        return _taken_for_dist_train(trial)
    if kind == "taken, static ranks":
        return _taken_for_ranks(trial)
    return _two_jobs(trial, dead=kind == "port of a dead job")


def _taken_for_dist_train(trial: Trial) -> float:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        trial.fired = True
        begin = time.monotonic()
        command = [sys.executable, "-m", "launch.cli", "run", "--nproc=2"]
        command += [f"--master-port={port}", *SMALL, f"run_dir={trial.folder / 'run'}"]
        done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    sec = time.monotonic() - begin
    check(done.returncode == 2, f"exit code {done.returncode}: {done.stderr[-300:]}")
    check(f"port {port} cannot be used" in done.stderr, f"said {done.stderr[-300:]!r}")
    check(done.stderr.count("\n") == 1, f"{len(done.stderr.splitlines())} lines instead of one")
    check(sec <= ERROR_SEC, f"took {sec:.1f} s")
    return sec


def _taken_for_ranks(trial: Trial) -> float:
    config = small(trial.folder / "run", *SHORT, "parallel.start_timeout_sec=3")
    with socket.create_server(("127.0.0.1", 0)) as server, ThreadPoolExecutor(2) as threads:
        port = server.getsockname()[1]
        trial.fired = True
        begin = time.monotonic()
        ranks = start_job(threads, trial, config, port)
        first = ranks[0].result()[0]
        sec = time.monotonic() - begin
        outcomes = [first, ranks[1].result()[0]]
    ends = how_it_ended(outcomes, trial.folder)
    check(f"port {port} is taken" in str(first.error), ends)
    check(sec <= ERROR_SEC, f"rank 0 took {sec:.1f} s")
    check("cannot reach rank 0's store" in str(outcomes[1].error), ends)
    check(not (trial.folder / "run").exists(), "a run folder was made")
    return sec


def _two_jobs(trial: Trial, *, dead: bool) -> float:
    """A second job comes to the port of one that lives, or that was just killed."""
    port = free_port()
    folders = [trial.folder / name for name in ("first", "second")]
    for folder in folders:
        folder.mkdir()
    steps = ("train.steps=100000", "eval.every_epochs=null", "checkpoint.every_steps=100000")
    first = small(folders[0] / "run", *SHORT, *steps, "optim.schedule=constant")
    second = small(folders[1] / "run", *SHORT, "seed=1", "parallel.start_timeout_sec=8")
    with ThreadPoolExecutor(4) as threads:
        ranks = start_job(threads, trial, first, port, folder_name="first")
        wait_until(lambda: last_step(folders[0] / "run") > 10, "the first job did not start")
        victims = [int((folders[0] / f"pid.{rank}").read_text()) for rank in range(2)]
        try:
            if dead:
                trial.fired = all([send(pid, signal.SIGKILL) for pid in victims])
                [rank.result() for rank in ranks]
            begin = time.monotonic()
            strangers = start_job(threads, trial, second, port, folder_name="second")
            trial.fired = True
            ends = [rank.result()[0] for rank in strangers]
            sec = time.monotonic() - begin
            told = how_it_ended(ends, folders[1])
            if dead:
                check(all(o.error is None and o.exit_code == 0 for o in ends), told)
                difference = trial.clean.difference(folders[1] / "run", 2, (*SHORT, "seed=1"))
                check(difference is None, str(difference))
                return sec
            check(all(o.error is not None for o in ends), f"the second job ran: {told}")
            check(f"port {port} is taken" in str(ends[0].error), told)
            check("ConfigError" in repr(ends[1].error), f"its rank 1 got no clear error: {told}")
            trial.notes["told"] = str(ends[1].error)[:160]
            step = last_step(folders[0] / "run")
            wait_until(
                lambda: last_step(folders[0] / "run") > step + 5 or ranks[0].done(),
                "the first job hangs since the second came",
                40.0,
            )
            check(not any(r.done() for r in ranks), "the second job brought the first one down")
            return sec
        finally:
            for pid in victims:
                send(pid, signal.SIGKILL)


def start_job(
    threads: ThreadPoolExecutor,
    trial: Trial,
    config: Config,
    port: int,
    *,
    folder_name: str = "",
    world_size: int = 2,
) -> list["Future[list[Outcome]]"]:
    """Start ranks as a scheduler without torchrun would: rank 0 serves the store at `port`."""
    futures = []
    for rank in range(world_size):
        env = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
        env |= {"LOCAL_WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1"}
        env |= {"MASTER_PORT": str(port)}
        folder = trial.folder / folder_name
        futures.append(
            threads.submit(
                start_ranks_of, train_in_rank, 0, folder, config, (), env=env, timeout_sec=35.0
            )
        )
    return futures


ROWS = (
    Row(
        id="N2",
        promise="a port that is taken is told within 5 s, and no rank ever joins a stranger's job",
        injection=f"MASTER_PORT: {'; '.join(KINDS)}",
        num_trials=12,
        measures="to the error, or the end of the run",
        work=n2,
        small=3,
    ),
)
