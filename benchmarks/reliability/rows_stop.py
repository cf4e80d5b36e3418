"""Rows P: runs that are asked to stop, and runs that continue on another number of ranks."""

import json
import signal
import time
from pathlib import Path

from benchmarks.reliability.clean import lines_of, status_of, summary_of
from benchmarks.reliability.faults_inside import NoteSamples, SignalAt
from benchmarks.reliability.in_ranks import (
    how_it_ended,
    last_step,
    pids,
    trained,
    training,
    wait_until,
)
from benchmarks.reliability.in_torchrun import launched, send
from benchmarks.reliability.row import Row, Trial, check
from benchmarks.reliability.rows_crash import HARD
from dist_train.checkpoint_folder import BadCheckpointError, list_checkpoints, read_verified
from tests.settings import small
from tests.test_fixed_order import FIXED

EXIT_SEC = 10.0
STOPS = (  # who gets which signal, under which launcher
    "SIGTERM to torchrun",
    "SIGTERM to one rank",
    "SIGTERM to all ranks",
    "SIGTERM to dist-train",
    "SIGINT to one rank",
    "SIGUSR1 to one rank",
    "SIGUSR1 to dist-train",
    "SIGUSR2 to all ranks",
)
MOMENTS = ("twice", "in a save", "in an evaluation", "in step 0", "before init", "while starting")
ELASTIC = (
    "model.factory=tests.nets:double_net",
    "train.steps=48",
    "checkpoint.every_steps=6",
    "eval.every_steps=12",
    "data.mixup=0.4",
    "log_every=1",
)
TOLERANCE = 1e-6  # relative, of the loss at another number of ranks


def p1(trial: Trial) -> float | None:
    """A signal to the launcher or to ranks: agreed, saved, nothing lost, the same bits after."""
    name, whom = trial.one_of(STOPS).split(" to ")
    number = getattr(signal, name)
    words = (*HARD, "train.steps=1000000", "eval.every_epochs=null", "optim.schedule=constant")
    words += ("checkpoint.every_steps=100000",)
    launcher = "dist-train" if whom == "dist-train" else "torchrun"
    with launched(trial, words, nproc=2, launcher=launcher) as tree:
        ranks = tree.wait_for_ranks(2)
        tree.wait_for_step(trial.dice.randrange(3, 120))
        time.sleep(trial.dice.uniform(0.0, 0.02))
        before, begin, now = last_step(tree.run_dir), time.monotonic(), time.time()
        victims = [tree.process.pid]
        if whom == "one rank":
            victims = [ranks[trial.dice.randrange(2)]]
        elif whom == "all ranks":
            victims = list(ranks.values())
        trial.fired = all([send(pid, number) for pid in victims])
        code = tree.wait(60.0)
        sec = time.monotonic() - begin
        orphans = tree.orphans()
        check(not orphans, f"processes are left: {orphans}")
    status = status_of(tree.run_dir)
    ended = f"ended with {code} after {sec:.1f} s, status {status}"
    check(status.get("state") == "preempted" and status.get("exit_code") == 0, ended)
    check(code == 0 or whom == "torchrun", ended)  # torchrun's own code after a signal is 1
    check(sec <= EXIT_SEC, ended)
    step = status["step"]
    trial.notes["saved_after_sec"] = round(status["time"] - now, 2)
    newest = list_checkpoints(tree.run_dir / "checkpoints")
    check(newest and newest[0].name == f"step_{step:08d}", f"steps were lost: {newest}, {ended}")
    check(step >= before, f"stopped at step {step}, but {before} were logged")
    _continue_and_compare(trial, words, step + 10, world_size=2)
    return sec


def p2(trial: Trial) -> float | None:
    """A signal at a bad moment, or two of them."""
    kind = trial.one_of(MOMENTS)
    mark, run_dir = trial.folder / "fired", trial.folder / "run"
    words = (*HARD, "train.steps=60", "checkpoint.every_steps=4")
    config = small(run_dir, *words)
    rank = None if trial.dice.random() < 0.5 else 0
    places = {"in a save": "save", "in an evaluation": "evaluation", "before init": "before init"}
    step = 0 if kind in ("in step 0", "before init") else trial.dice.randrange(1, 40)
    fault = SignalAt(
        rank=0 if kind == "in a save" else rank,
        step=step,
        place=places.get(kind, "step"),
        number=signal.SIGTERM,
        mark=str(mark),
        times=2 if kind == "twice" else 1,
    )
    trial.notes["step"] = step
    faults = () if kind == "while starting" else (fault,)
    with training(trial.folder, config, *faults, world_size=2) as future:
        if kind == "while starting":
            victims = pids(trial.folder, 2)
            time.sleep(trial.dice.uniform(0.0, 0.4))
            begin = time.monotonic()
            trial.fired = all([send(pid, signal.SIGTERM) for pid in victims])
        else:
            wait_until(lambda: mark.exists() or future.done(), "no fault", 60.0)
            begin = time.monotonic()
            trial.fired = mark.exists()
        outcomes = future.result()
    sec = time.monotonic() - begin
    check(sec <= EXIT_SEC, f"took {sec:.1f} s: {how_it_ended(outcomes, trial.folder)}")
    saved = {o.value["state"] for o in outcomes if isinstance(o.value, dict)}
    killed = all(o.exit_code == -signal.SIGTERM for o in outcomes)  # before it listened
    check(
        saved == {"preempted"} or (kind == "while starting" and killed),
        f"not agreed on: {how_it_ended(outcomes, trial.folder)}",
    )
    for path in list_checkpoints(run_dir / "checkpoints"):
        try:
            read_verified(path)
        except BadCheckpointError as bad:
            check(False, f"a checkpoint is not whole: {bad}")
    outcomes = trained(trial.folder, config, world_size=2)
    check(outcomes[0].error is None, how_it_ended(outcomes, trial.folder))
    difference = trial.clean.difference(run_dir, 2, words)
    check(difference is None, str(difference))
    return sec


def _continue_and_compare(
    trial: Trial, words: tuple[str, ...], steps: int, *, world_size: int
) -> None:
    """Continue to `steps` on forked ranks and compare with a run that was never stopped."""
    words = (*words, f"train.steps={steps}")
    outcomes = trained(trial.folder, small(trial.folder / "run", *words), world_size=world_size)
    check(outcomes[0].error is None, how_it_ended(outcomes, trial.folder))
    difference = trial.clean.difference(trial.folder / "run", world_size, words)
    check(difference is None, str(difference))


def p4(trial: Trial) -> float | None:
    """Killed and continued on 4, 2, 1 and 4 ranks: the same samples, the same losses."""
    config = small(trial.folder / "run", *ELASTIC)
    sizes = (4, 2, 1, 4)
    stops = sorted(trial.dice.sample(range(4, 44), 3))
    trial.notes["kills"] = stops
    begin = time.monotonic()
    for part, world_size in enumerate(sizes):
        notes = [
            NoteSamples(rank=r, path=str(trial.folder / f"samples.{part}.{r}"))
            for r in range(world_size)
        ]
        mark = trial.folder / f"fired.{part}"
        kills = []
        if part < len(stops):
            kills = [
                SignalAt(
                    rank=trial.dice.randrange(world_size),
                    step=stops[part],
                    place="step",
                    number=signal.SIGKILL,
                    mark=str(mark),
                )
            ]
        # The notes wrap the step first: a killed step is not noted.
        outcomes = trained(trial.folder, config, *notes, *kills, world_size=world_size)
        if kills:
            check(mark.exists(), "a kill never fired")
        else:
            check(outcomes[0].error is None, how_it_ended(outcomes, trial.folder))
    trial.fired = True
    seen = _samples(trial.folder, len(sizes))
    clean_folder = trial.folder / "one"
    clean_folder.mkdir()
    notes = NoteSamples(rank=0, path=str(clean_folder / "samples.0.0"))
    one = trained(clean_folder, small(clean_folder / "run", *ELASTIC), notes, world_size=1)
    check(one[0].error is None, how_it_ended(one, clean_folder))
    wanted = _samples(clean_folder, 1)
    check(sorted(seen) == sorted(wanted), f"steps {sorted(set(wanted) ^ set(seen))} are missing")
    for step, rows in wanted.items():
        check(seen[step] == rows, f"step {step} trained on other samples, or in another order")
    _compare_losses(trial.folder / "run", clean_folder / "run")
    _fixed_order(trial, sizes)
    return time.monotonic() - begin


def _fixed_order(trial: Trial, sizes: tuple[int, ...]) -> None:
    """The same with train.order=fixed: the weights of one undisturbed rank, to the bit."""
    folder = trial.folder / "fixed"
    folder.mkdir()
    stops = sorted(trial.dice.sample(range(2, 12), 3))
    trial.notes["kills, fixed order"] = stops
    config = small(folder / "run", *FIXED)
    for part, world_size in enumerate(sizes):
        mark = folder / f"fired.{part}"
        kills = [
            SignalAt(
                rank=trial.dice.randrange(world_size),
                step=step,
                place="step",
                number=signal.SIGKILL,
                mark=str(mark),
            )
            for step in stops[part : part + 1]
        ]
        ends = trained(folder, config, *kills, world_size=world_size)
        if kills:
            check(mark.exists(), "a kill never fired")
        else:
            check(ends[0].error is None, how_it_ended(ends, folder))
    same = summary_of(folder / "run")["weights_sha256"]
    check(same == trial.clean.of(1, FIXED).weights_sha256, "fixed order: other weights")


def _samples(folder: Path, parts: int) -> dict[int, list[str]]:
    """Return the digests of every step's samples in order; the last attempt at a step counts."""
    found: dict[int, list[str]] = {}
    for part in range(parts):
        steps: dict[int, list[tuple[int, list[str]]]] = {}
        for path in folder.glob(f"samples.{part}.*"):
            for record in map(json.loads, path.read_text().splitlines()):
                steps.setdefault(record["step"], []).append((record["first"], record["rows"]))
        for step, shares in steps.items():
            rows = [row for _, share in sorted(shares) for row in share]
            if step not in found or len(rows) >= len(found[step]):
                found[step] = rows
    return found


def _compare_losses(here: Path, there: Path) -> None:
    for mine, theirs in zip(lines_of(here), lines_of(there), strict=True):
        for key in ("train/loss", "eval/loss"):
            if key in theirs:
                apart = abs(mine[key] - theirs[key]) / abs(theirs[key])
                check(apart <= TOLERANCE, f"{key} at step {theirs['step']} is off by {apart:.1e}")


ROWS = (
    Row(
        id="P1",
        promise="a signal to one rank, some, or the launcher: agreed, saved, no step lost, "
        "bitwise the same afterwards",
        injection=", ".join(STOPS),
        num_trials=32,
        measures="from the signal to the end",
        work=p1,
    ),
    Row(
        id="P2",
        promise="a signal at the worst moment, or twice, corrupts nothing and costs nothing",
        injection=f"SIGTERM {', '.join(MOMENTS)}",
        num_trials=30,
        measures="from the signal to the end",
        work=p2,
        small=2,
    ),
    Row(
        id="P4",
        promise="continued on 4, 2, 1 and 4 ranks: the same samples in the same order, losses "
        "within 1e-6; in fixed order the same weights, bitwise",
        injection="kill -9 at three random steps, each start on another number of ranks",
        num_trials=20,
        measures="the four parts",
        work=p4,
    ),
)
