"""Which launches a benchmark makes, and how one is started and read. Imports no torch."""

import argparse
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from dist_train.config import Config, ConfigError
from dist_train.config.arguments import stop_with_parent, words_of
from dist_train.config.overrides import quoted
from dist_train.torchrun_here import ALONE, without_leftovers

Scaling = Literal["strong", "weak"]
WORKER = "dist_train.bench.worker"
LIMIT_SEC = 900.0  # beyond the time asked for
SHOWN_LINES = 25
MEASURED, REFUSAL, FAILURE = "measured.json", "refusal.txt", "failure.txt"  # written by a rank
# What would only disturb: a run that never ends, and touches its folder as little as it can.
FIXED = (
    "train.epochs=null",
    "train.steps=1000000000",
    "train.max_minutes=null",
    "train.early_stop_patience=null",
    "optim.rest_lr=null",
    "optim.lr=1e-6",  # the speed is not a matter of the weights, unless they become NaN
    "optim.warmup_steps=0",
    "eval.every_epochs=null",
    "eval.every_steps=null",
    "checkpoint.every_steps=1000000000",
    "profile.steps=null",
    "tracking.wandb.mode=disabled",
    "tracking.tensorboard=false",
    "resume=never",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Setup:
    """A number of ranks and a batch; `scalings` says in which curves it is a point."""

    num_ranks: int
    num_nodes: int
    global_batch_size: int
    scalings: tuple[Scaling, ...]


def setups_of(
    counts: list[tuple[int, int]], global_batch_size: int, scalings: tuple[Scaling, ...]
) -> list[Setup]:
    """Return what is measured: every count in both curves, which meet at the largest.

    Strong scaling keeps the global batch; weak scaling the batch of a rank, that of the global
    batch on the largest count.

    Args:
        counts: (ranks, nodes), ascending.
        global_batch_size: the experiment's own.
        scalings: the curves wanted.

    Raises:
        ConfigError: more ranks than samples in a batch.
    """
    most = counts[-1][0]
    each = global_batch_size // most
    if each < 1:
        raise ConfigError(
            f"{most} ranks cannot share train.global_batch_size={global_batch_size}: give a "
            "larger one"
        )
    batches: dict[tuple[int, int, int], list[Scaling]] = {}
    for ranks, nodes in counts:
        if "strong" in scalings:
            batches.setdefault((ranks, nodes, global_batch_size), []).append("strong")
        if "weak" in scalings:
            size = global_batch_size if ranks == most else each * ranks
            batches.setdefault((ranks, nodes, size), []).append("weak")
    return [
        Setup(num_ranks=ranks, num_nodes=nodes, global_batch_size=size, scalings=tuple(names))
        for (ranks, nodes, size), names in batches.items()
    ]


def settings_of(
    setup: Setup, options: argparse.Namespace, config: Config, *, threads: int
) -> list[str]:
    """Return the words that every rank of a setup composes its configuration from.

    Args:
        setup: what is measured.
        options: of the command line.
        config: what they compose.
        threads: of a rank, unless the configuration says how many. It is a setting, as ranks do
            not take an OMP_NUM_THREADS=1 under torchrun for a wish.
    """
    words = [*words_of(options), *FIXED, f"train.global_batch_size={setup.global_batch_size}"]
    if config.threads is None and config.train.order != "fixed":  # which needs one thread
        words.append(f"threads={threads}")
    return words


def launch(
    setup: Setup, options: argparse.Namespace, config: Config, *, threads: int, number: int
) -> dict[str, Any]:
    """Start the ranks of one setup, wait for them, and return what they measured.

    Args:
        setup: what is measured.
        options: of the command line.
        config: what they compose.
        threads: of a rank, unless the configuration says how many.
        number: of the launch among those of its setup.

    Raises:
        ConfigError: a rank refuses the configuration, which cannot be known without its device;
            or there is no place for the run's folder.
        LaunchFailedError: with the end of what they said.
    """
    folder = _make_folder(options.work_dir)
    try:
        spec = {
            "folder": str(folder),
            "seconds": options.seconds,
            "number": number,
            "begun": time.time(),
        }
        words = settings_of(setup, options, config, threads=threads)
        words.append(f"run_dir={quoted(str(folder / 'run'))}")
        command = [*_starter(setup), "-m", WORKER, "--spec", json.dumps(spec)]
        environment = without_leftovers(os.environ, num_nodes=1)
        environment |= {"OMP_NUM_THREADS": str(threads)}
        with (folder / "output.txt").open("w+") as output:
            try:
                code = _run([*command, *words], environment, output, options.seconds + LIMIT_SEC)
            except subprocess.TimeoutExpired:
                code = None
            output.seek(0)
            said = output.read().splitlines()
        if (folder / REFUSAL).is_file():
            raise ConfigError((folder / REFUSAL).read_text())
        if code != 0 or not (folder / MEASURED).is_file():
            if (folder / FAILURE).is_file():  # torchrun's own words would hide it
                said = (folder / FAILURE).read_text().splitlines()
            raise LaunchFailedError(
                f"the launch of {setup.num_ranks} x {setup.global_batch_size // setup.num_ranks} "
                + ("did not come to an end" if code is None else f"failed (exit code {code})")
                + "; they said last:\n"
                + "\n".join(said[-SHOWN_LINES:])
            )
        return json.loads((folder / MEASURED).read_text())
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _make_folder(work_dir: Path | None) -> Path:
    try:
        if work_dir is not None:
            work_dir = work_dir.absolute()
            work_dir.mkdir(parents=True, exist_ok=True)
        return Path(tempfile.mkdtemp(prefix="dist-train-bench-", dir=work_dir))
    except OSError as error:
        where = work_dir or tempfile.gettempdir()
        raise ConfigError(
            f"{where} cannot hold the folder of a run: {error.strerror}; give --work-dir=DIR"
        ) from error


class LaunchFailedError(RuntimeError):
    """A launch ended without a measurement."""


def _starter(setup: Setup) -> list[str]:
    if "SLURM_JOB_ID" in os.environ and setup.num_nodes > 0:
        each = setup.num_ranks // setup.num_nodes
        # --ntasks too: that of the allocation is in the environment
        steps = ["srun", f"--nodes={setup.num_nodes}", f"--ntasks={setup.num_ranks}"]
        steps += [f"--ntasks-per-node={each}"]
        return [*steps, "--kill-on-bad-exit=1", sys.executable]
    if setup.num_ranks == 1:
        return [sys.executable]
    torchrun = [sys.executable, "-m", "torch.distributed.run", *ALONE]
    return [*torchrun, f"--nproc-per-node={setup.num_ranks}"]


def _run(command: list[str], environment: dict[str, str], output: Any, limit_sec: float) -> int:
    process = subprocess.Popen(
        command,
        env=environment,
        stdout=output,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        preexec_fn=stop_with_parent,
    )
    try:
        return process.wait(timeout=limit_sec)
    except BaseException:
        try:
            _signal(process, signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=10)
        finally:  # also if the user is impatient
            _signal(process, signal.SIGKILL)
        raise


def _signal(process: "subprocess.Popen[bytes]", number: signal.Signals) -> None:
    """Send it to all processes of the launch."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, number)
