"""Try one network: two steps on two ranks, two more by a resume, and the weights of four at once.

Every start has processes of its own: one that crashes is a row, and not the end.
"""

import contextlib
import os
import shutil
import signal
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.intervals import machine
from benchmarks.zoo.networks import LARGEST, NUM_CLASSES, Fit, Network, fit, size_gib, version_of
from dist_train.config import Config
from dist_train.config.compose import compose
from dist_train.train import train
from tests.ranks import Outcome, start_ranks_of

NUM_RANKS, BATCH = 2, 4  # images a step, of all ranks
LIMIT_SEC = 1200.0  # of one start: minutes where others use the cores, too

SAME, DIFFERENT, REFUSED, FAILED = "same bits", "DIFFERENT", "refused", "FAILED"
CRASHED, LATE, LARGE = "CRASHED", "TOO SLOW", "not run: large"


def attempt(network: Network) -> dict[str, Any]:
    """Return the record of a network."""
    begun = time.monotonic()
    record = {
        "name": network.name,
        "source": network.source,
        "version": version_of(network.source),
        "machine": machine(),
        "date": time.strftime("%Y-%m-%d"),
    }
    # A process of a network that crashed may still write there.
    with tempfile.TemporaryDirectory(prefix="zoo-", ignore_cleanup_errors=True) as work:
        record |= _attempt(network, Path(work))
    return record | {"seconds": round(time.monotonic() - begun, 1)}


def settings(network: Network, found: Fit, folder: Path, steps: int) -> Config:
    """Return the settings of a run in `folder`."""
    arguments = ",".join(f"{key}: {value}" for key, value in found.args.items())
    words = [
        "experiment=cifar10_tutorial",
        f"run_dir={folder}",
        f"model.factory={network.factory}",
        f"model.args={{{arguments}}}",
        "data.name=synthetic",
        f"data.args={{num_train: 16, num_test: 4, num_classes: {NUM_CLASSES}, "
        f"image_size: {found.side}}}",
        "data.val_fraction=0",
        "data.eval_batch_size=4",
        f"train.global_batch_size={BATCH}",
        f"train.steps={steps}",
        "optim.lr=0.001",
        "optim.schedule=constant",
        "optim.warmup_epochs=0",
        "eval.every_epochs=null",
        "checkpoint.keep_best=false",
        "log_every=1",
        "threads=1",
        "device=cpu",
        "precision=fp32",
        f"guards.hang_sec={LIMIT_SEC / 2:g}",
        f"parallel.start_timeout_sec={LIMIT_SEC:g}",
        f"parallel.step_timeout_sec={LIMIT_SEC:g}",
    ]
    return compose(words).config


def _attempt(network: Network, work: Path) -> dict[str, Any]:
    [seen] = start_ranks_of(_fit, 0, network, str(work / "fit"), timeout_sec=LIMIT_SEC)
    if seen.value is None:
        return _verdict([seen], work / "fit")
    found: Fit = seen.value
    record: dict[str, Any] = asdict(found) | {"gib": size_gib(found.parameters, found.buffers)}
    if found.parameters >= LARGEST:
        return record | {"outcome": LARGE}
    sums = []
    for folder, steps in (("run", 2), ("run", 4), ("unbroken", 4)):
        if folder == "unbroken":
            shutil.rmtree(work / "run")
        config = settings(network, found, work / folder, steps)
        said = work / f"{folder}_{steps}"
        outcomes = start_ranks_of(_train, NUM_RANKS, config, str(said), timeout_sec=LIMIT_SEC)
        bad = [o for o in outcomes if o.exit_code != 0 or o.error is not None]
        if bad:
            when = {"run_2": "", "run_4": "in the resume: "}.get(said.name, "unbroken: ")
            verdict = _verdict(bad, said)
            return record | verdict | {"told": when + verdict["told"]}
        summary = outcomes[0].value
        record["memory_format"] = summary["memory_format"]
        sums.append((summary["steps"], summary["weights_sha256"]))
    if sums[1] == sums[2] and sums[0][1] != sums[1][1] and sums[1][0] == 4:
        return record | {"outcome": SAME}
    return record | {"outcome": DIFFERENT, "told": f"weights after 2, 2 + 2 and 4 steps: {sums}"}


def _verdict(outcomes: list[Outcome], said: Path) -> dict[str, str]:
    """Return what came of ranks that did not end well: a crash counts before what it led to."""
    late = [o for o in outcomes if o.exit_code == -signal.SIGKILL]
    killed = [o for o in outcomes if (o.exit_code or 0) < 0 and o not in late]
    failed = sorted((o for o in outcomes if o.error is not None), key=lambda o: o.at)
    if killed:
        name = signal.Signals(-(killed[0].exit_code or 0)).name
        return {"outcome": CRASHED, "told": f"{name} {_last_line(said)}".strip()}
    if failed:
        error = failed[0].error
        refused = getattr(error, "exit_code", None) == 2
        told = " ".join(str(error).split()) if refused else f"{type(error).__name__}: {error}"
        return {"outcome": REFUSED if refused else FAILED, "told": told[:600]}
    return {"outcome": LATE, "told": f"no end after {LIMIT_SEC:g} s"}


def _fit(network: Network, said: str) -> Fit:
    with _said_into(said):
        return fit(network)


def _train(config: Config, said: str) -> dict[str, Any]:
    with _said_into(said):
        return train(config)


@contextlib.contextmanager
def _said_into(path: str) -> Any:
    """Let this process write what it says, C libraries included, to a file."""
    target = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(target, 1)
    os.dup2(target, 2)
    os.close(target)
    yield


def _last_line(path: Path) -> str:
    lines = path.read_text(errors="replace").splitlines() if path.exists() else []
    return lines[-1][:200] if lines else ""
