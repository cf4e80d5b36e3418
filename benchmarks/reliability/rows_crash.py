"""Rows R: ranks that die, restarted by torchrun or by the same command."""

import os
import signal
import time
from pathlib import Path

from benchmarks.reliability.clean import events_of
from benchmarks.reliability.faults_inside import DeathInSave
from benchmarks.reliability.in_ranks import how_it_ended, last_step, trained, wait_until
from benchmarks.reliability.in_torchrun import (
    Tree,
    launched,
    processes_of,
    send,
    time_of_attempt,
)
from benchmarks.reliability.row import Row, Trial, check
from dist_train.checkpoint_folder import BadCheckpointError, list_checkpoints, read_verified
from tests.settings import small

HARD = (  # what makes an exact resume hard: BatchNorm, dropout, mixing, an average of the weights
    "model.factory=tests.nets:noisy_net",
    "train.micro_batch_size=7",
    "optim.ema_decay=0.9",
    "data.mixup=0.4",
    "data.cutmix=0.4",
    "log_every=1",
)
STEPS, EVERY = 150, 10
LONG = (*HARD, f"train.steps={STEPS}", f"checkpoint.every_steps={EVERY}")
SHORT = (*HARD, "train.steps=60", "checkpoint.every_steps=4")
DEATHS = ("segfault", "abort", "_exit", "exception", "KeyboardInterrupt")


def kill_once(trial: Trial, tree: Tree, num_ranks: int) -> float:
    """Kill a random rank with SIGKILL at a random moment; returns when.

    Three kills in ten come while the ranks start, the others at a random step.
    """
    ranks = tree.wait_for_ranks(num_ranks)
    if trial.dice.random() < 0.3:
        trial.notes["moment"] = "start"
        time.sleep(trial.dice.uniform(0.0, 6.0))
    else:
        step = trial.dice.randrange(1, STEPS - 30)
        trial.notes["moment"] = f"step {step}"
        tree.wait_for_step(step)
        time.sleep(trial.dice.uniform(0.0, 0.02))
    victim = trial.dice.randrange(num_ranks)
    trial.notes["rank"] = victim
    trial.notes["step_before"] = last_step(tree.run_dir)
    now = time.time()
    trial.fired = send(ranks[victim], signal.SIGKILL)
    return now


def check_end(trial: Trial, tree: Tree, num_ranks: int, words: tuple[str, ...]) -> None:
    """Check that the launcher ended well, with an undisturbed run's bits, leaving no process."""
    code = tree.wait()
    check(code == 0, f"the launcher ended with {code}: {tree.tail()}")
    orphans = tree.orphans()
    check(not orphans, f"processes are left: {orphans}")
    difference = trial.clean.difference(tree.run_dir, num_ranks, words)
    check(difference is None, str(difference))


def r1(trial: Trial) -> float | None:
    """Kill one of three ranks; torchrun restarts them."""
    with launched(trial, LONG, nproc=3, max_restarts=1) as tree:
        killed = kill_once(trial, tree, 3)
        check_end(trial, tree, 3, LONG)
    resumed = [event["step"] for event in events_of(tree.run_dir, "resumed")]
    lost = trial.notes["step_before"] - (resumed[-1] if resumed else 0)
    trial.notes["steps_lost"] = lost
    check(lost <= 2 * EVERY, f"{lost} steps were lost, saves come every {EVERY}")
    back = time_of_attempt(tree.run_dir, 1)
    return None if back is None else back - killed


def r2(trial: Trial) -> float | None:
    """Death inside a save, at a file operation or after some bytes."""
    mark = trial.folder / "fired"
    at_byte = trial.one_of(("file operation", "byte")) == "byte"
    fault = DeathInSave(
        rank=0,
        step=trial.dice.randrange(5, 50),
        mark=str(mark),
        event=trial.dice.randrange(8),
        cut=trial.dice.random() if at_byte else None,
    )
    trial.notes["fault"] = f"event {fault.event}" if fault.cut is None else f"cut {fault.cut:.2f}"
    trial.notes["step"] = fault.step
    config = small(trial.folder / "run", *SHORT)
    outcomes = trained(trial.folder, config, fault, world_size=2)
    trial.fired = mark.exists() and outcomes[0].exit_code in (-signal.SIGKILL, -signal.SIGXFSZ)
    check(trial.fired, f"did not die in a save: {how_it_ended(outcomes, trial.folder)}")
    for path in list_checkpoints(trial.folder / "run" / "checkpoints"):
        try:
            read_verified(path)
        except BadCheckpointError as bad:
            check(False, f"a checkpoint that is not whole is visible: {bad}")
    again = time.monotonic()
    outcomes = trained(trial.folder, config, world_size=2)
    check(outcomes[0].error is None, how_it_ended(outcomes, trial.folder))
    litter = [p.name for p in (trial.folder / "run" / "checkpoints").glob(".*")]
    check(not litter, f"litter stays: {litter}")
    difference = trial.clean.difference(trial.folder / "run", 2, SHORT)
    check(difference is None, str(difference))
    return time.monotonic() - again


def r3(trial: Trial) -> float | None:
    """Kill launcher, agent and ranks; then the same command again."""
    kind = trial.one_of(("all at once", "loader workers left"))
    words = LONG
    if kind != "all at once":
        # Workers start anew for every epoch and evaluation: one long epoch.
        words = (*LONG, "data.loader=workers", "data.num_workers=1", "data.image_size=12")
        words = (*words, "data.args.num_train=4200", "eval.every_epochs=null")
    with launched(trial, words, nproc=2, launcher="dist-train") as tree:
        tree.wait_for_ranks(2)
        tree.wait_for_step(trial.dice.randrange(1, STEPS - 30))
        victims = tree.pids()
        if kind != "all at once":
            ranks = set(tree.ranks().values())
            victims = [p for p in victims if p in ranks or p not in _children(ranks)]
        for pid in victims:
            os.kill(pid, signal.SIGSTOP)  # so that all of them die at the same instant
        trial.notes["killed"] = len(victims)
        trial.fired = all([send(pid, signal.SIGKILL) for pid in victims])
        orphans = tree.orphans(5.0)
        check(not orphans, f"alive five seconds later: {orphans}")
    with launched(trial, words, nproc=2, launcher="dist-train") as tree:
        again = time.time()
        before = last_step(tree.run_dir)
        check_end(trial, tree, 2, words)
    resumed = events_of(tree.run_dir, "resumed")
    check(resumed or before <= EVERY, "the same command did not resume")
    return (resumed[-1]["time"] - again) if resumed else None


def _children(parents: set[int]) -> set[int]:
    found = set()
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if int(fields[1]) in parents:
                found.add(int(entry.name))
    return found


def r4(trial: Trial) -> float | None:
    """One rank dies by a fault of its own; torchrun restarts; the cause and the rank are told."""
    how = trial.one_of(DEATHS)
    rank, step = trial.dice.randrange(2), trial.dice.randrange(1, 50)
    mark = trial.folder / "fired"
    trial.notes["rank"], trial.notes["step"] = rank, step
    fault = f"{how} {rank} {step} {mark}"
    entry = "benchmarks/reliability/entry.py"
    with launched(trial, SHORT, nproc=2, max_restarts=1, entry=entry, env={"FAULT": fault}) as tree:
        wait_until(lambda: mark.exists() or tree.process.poll() is not None, "no fault", 90.0)
        trial.fired = mark.exists()
        check_end(trial, tree, 2, SHORT)
    back = time_of_attempt(tree.run_dir, 1)
    told = {"exception": f"ValueError: injected at step {step}", "segfault": "exitcode: -11"}
    told |= {
        "abort": "exitcode: -6",
        "_exit": "exitcode: 1",
        "KeyboardInterrupt": "KeyboardInterrupt",
    }
    check(told[how] in tree.output, f"{told[how]!r} is not in the output: {tree.tail()}")
    blamed = f"local_rank: {rank} " in tree.output or f"[rank{rank}]:" in tree.output
    check(blamed, f"rank {rank} is not named in the output: {tree.tail()}")
    return None if back is None else back - mark.stat().st_mtime


def r8(trial: Trial) -> float | None:
    """Let torchrun restart ranks that only all-reduce."""
    world_size = 2 + trial.seed % 2
    victim = trial.dice.randrange(world_size)
    env = {"VICTIM": str(victim), "RESTARTS": "1", "MARKS": str(trial.folder)}
    entry = "benchmarks/reliability/entry_all_reduce.py"
    trial.notes |= {"ranks": world_size, "rank": victim}
    with launched(trial, (), nproc=world_size, max_restarts=1, entry=entry, env=env) as tree:
        code = tree.wait(90.0)
        trial.fired = (trial.folder / "killed.0").exists()
        check(code == 0, f"torchrun ended with {code}: {tree.tail()}")
        check(not processes_of(tree.run_dir), "processes are left")
    killed = float((trial.folder / "killed.0").read_text())
    check((trial.folder / "summed.1").exists(), "the restarted ranks never summed")
    return float((trial.folder / "summed.1").read_text()) - killed


ROWS = (
    Row(
        id="R1",
        promise="a rank killed at any moment: torchrun restarts all, and the result is bitwise "
        "an undisturbed run's",
        injection="kill -9 of one of 3 ranks at a random time",
        num_trials=100,
        measures="from the kill to the next step",
        work=r1,
    ),
    Row(
        id="R2",
        promise="a kill inside a save leaves only whole checkpoints, and the run goes on bitwise",
        injection="death at a random file operation or byte of a save",
        num_trials=30,
        measures="the run to its end, on ranks already started",
        work=r2,
        small=2,
    ),
    Row(
        id="R3",
        promise="launcher, agent and ranks killed: nothing survives 5 s, and the same command "
        "continues bitwise",
        injection="kill -9 of the whole tree, with and without the loaders' workers",
        num_trials=20,
        measures="from the second command to the resume",
        work=r3,
    ),
    Row(
        id="R4",
        promise="whatever a rank dies of is named with its rank, and the restart ends bitwise",
        injection=f"one rank dies of {', '.join(DEATHS)}",
        num_trials=30,
        measures="from the fault to the next step",
        work=r4,
    ),
    Row(
        id="R8",
        promise="torchrun's restart works on gloo every time",
        injection="kill -9 of one of 2 or 3 ranks that only all-reduce",
        num_trials=100,
        measures="from the kill to the first sum",
        work=r8,
    ),
)
