"""Rows X3 to X5: settings of unknown origin, secrets, folders that others can write to."""

import os
import resource
import stat
import time
from pathlib import Path
from typing import Any

from benchmarks.reliability.in_ranks import (
    keep_output,
    trained,
    training,
)
from benchmarks.reliability.row import Row, Trial, check
from dist_train.checkpoint_folder import list_checkpoints
from tests.ranks import run_ranks
from tests.settings import SMALL, small

YAML_FAULTS = ("python tag", "anchors", "target", "environment")
SECRETS = ("environment", "argument", "configuration file", "exception", "URL")
MEMORY_BYTES = 3 * 2**30  # of address space above what a rank starts with
OWNERS = ("group-writable", "world-writable", "another owner")


def x3(trial: Trial) -> float | None:
    """Start from a settings file that somebody else wrote."""
    kind, mark = trial.one_of(YAML_FAULTS), trial.folder / "executed"
    secret = f"canary-{trial.dice.randrange(10**12)}"
    text = {
        "python tag": f"seed: !!python/object/apply:os.system ['touch {mark}']\n",
        "anchors": _anchors(trial.dice.randrange(6, 10)),
        "target": f"model:\n  args:\n    _target_: os.system\n    command: touch {mark}\n",
        "environment": "data:\n  root: ${oc.env:CANARY}\n",
    }[kind]
    path = trial.folder / "settings.yaml"
    path.write_text(text)
    trial.fired = True
    words = [*SMALL, "train.steps=2", f"run_dir={trial.folder / 'run'}"]
    # The file's arguments are for its own factory.
    words = [w for w in words if not w.startswith(("experiment=", "model.factory="))]
    begin = time.monotonic()
    arguments = (trial.folder, ["--config", str(path), *words])
    code, told = run_ranks(told_in_rank, 1, *arguments, {"CANARY": secret}, timeout_sec=12.0)[0]
    sec = time.monotonic() - begin
    check(not mark.exists(), "CODE WAS EXECUTED")
    trial.notes["told"] = told.strip()[-160:].replace(str(trial.folder), "")
    check(code == 2, f"exit code {code}: {told[-300:]}")
    check(told.count("\n") == 1, f"not one line: {told[-300:]!r}")
    check(secret not in told and not _found(trial.folder, secret), "the secret was resolved")
    check(sec <= 5.0, f"took {sec:.1f} s")
    return sec


def _anchors(levels: int) -> str:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    for level in range(1, levels):
        inner = ", ".join([f"*a{level - 1}"] * 9)
        lines.append(f"a{level}: &a{level} [{inner}]")
    return "\n".join(lines) + "\n"


def told_in_rank(folder: Path, words: list[str], env: dict[str, str]) -> tuple[int, str]:
    """Call main() with words and variables; returns its code and what it wrote."""
    from tests.mistakes import told

    os.environ.update(env)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY_BYTES, used + MEMORY_BYTES))
    os.chdir(folder)
    keep_output(folder / "out.0")
    return told(folder, words)


def x4(trial: Trial) -> float | None:
    """Put a secret where secrets come from and look for it in every file of the run."""
    kind, canary = trial.one_of(SECRETS), f"canary{trial.dice.randrange(10**12)}"
    words = [*SMALL, "train.steps=2", f"run_dir={trial.folder / 'run'}"]
    env: dict[str, str] = {}
    if kind == "environment":
        names = ("WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY", "HF_TOKEN", "DB_PASSWORD", "X_TOKEN")
        env = dict.fromkeys(names, canary)
    elif kind == "argument":
        factory = "model.factory=benchmarks.reliability.rows_safety:net_with_key"
        words += [factory, f"model.args.api_key={canary}"]
    elif kind == "configuration file":
        path = trial.folder.parent / f"{trial.folder.name}.yaml"
        factory = "benchmarks.reliability.rows_safety:net_with_key"
        path.write_text(f"model:\n  factory: {factory}\n  args:\n    password: {canary}\n")
        words = [w for w in words if not w.startswith(("experiment=", "model.factory="))]
        words = ["--config", str(path), *words]
    elif kind == "exception":
        factory = "model.factory=benchmarks.reliability.rows_safety:net_that_tells"
        words += [factory]
        env = {"X_TOKEN": canary}
    else:
        words += [f"tracking.wandb.project=https://user:{canary}@host/data"]
    begin = time.monotonic()
    code, told = run_ranks(told_in_rank, 1, trial.folder, words, env)[0]
    sec = time.monotonic() - begin
    trial.fired = (trial.folder / "run").is_dir()
    check(code == (2 if kind == "exception" else 0), f"exit code {code}: {told[-300:]}")
    found = _found(trial.folder / "run", canary)
    check(not found, f"the secret of {kind} is in {', '.join(found)}")
    return sec


def net_with_key(num_classes: int, *, api_key: str = "", password: str = "") -> Any:
    """Return a network; takes a secret like a user's own factory may."""
    from tests.nets import plain_net

    return plain_net(num_classes)


def net_that_tells(num_classes: int) -> Any:
    """Fail with a secret in the message."""
    raise RuntimeError(f"cannot open https://user:{os.environ['X_TOKEN']}@host/weights")


def _found(folder: Path, text: str) -> list[str]:
    files = [f for f in folder.rglob("*") if f.is_file() and f.name != "settings.yaml"]
    return [str(f.relative_to(folder)) for f in files if text.encode() in f.read_bytes()]


def x5(trial: Trial) -> float | None:
    """Resume from a folder into which others can write, or that belongs to somebody else."""
    kind = trial.one_of(OWNERS)
    words = ("train.steps=4", "checkpoint.every_steps=2")
    run = trial.folder / "run"
    trained(trial.folder, small(run, *words), world_size=0)
    folder = run / "checkpoints"
    targets = [folder, *list_checkpoints(folder)]
    for path in targets if trial.dice.random() < 0.5 else targets[:1]:
        if kind == "another owner":
            os.chown(path, 12345, 12345)
        else:
            bit = stat.S_IWGRP if kind == "group-writable" else stat.S_IWOTH
            path.chmod(path.stat().st_mode | bit)
    trial.fired = True
    begin = time.monotonic()
    words = ("train.steps=6", "checkpoint.every_steps=2")
    with training(trial.folder, small(run, *words), world_size=0) as future:
        ends = future.result()
    sec = time.monotonic() - begin
    told = str(ends[0].error or "") + (run / "log" / "rank0.txt").read_text()
    wanted = "belongs to user 12345" if kind == "another owner" else "can be changed by"
    check(wanted in told, f"neither refused nor warned of: {kind}")
    return sec


def not_root() -> str | None:
    """Say why owners cannot be changed here."""
    return None if os.geteuid() == 0 else "changing a file's owner needs root"


ROWS = (
    Row(
        id="X3",
        promise="a settings file of unknown origin runs no code, reads no secret, and does not "
        "hang",
        injection=f"YAML: {', '.join(YAML_FAULTS)}",
        num_trials=20,
        measures="to the refusal",
        work=x3,
        small=4,
    ),
    Row(
        id="X4",
        promise="no secret is in any file of a run",
        injection=f"a canary in: {', '.join(SECRETS)}",
        num_trials=30,
        measures="the run",
        work=x4,
        small=2,
    ),
    Row(
        id="X5",
        promise="a checkpoint folder that others can write to is warned of or refused",
        injection=", ".join(OWNERS),
        num_trials=12,
        measures="the resumed run",
        work=x5,
        needs="root",
        cannot_run=not_root,
    ),
)
