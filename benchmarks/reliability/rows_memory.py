"""Rows O: memory that is short on one rank, or in one of its loader workers."""

import time
from dataclasses import asdict

import torch

from benchmarks.reliability.clean import events_of, lines_of
from benchmarks.reliability.greedy import (
    GROUP_VARIABLE,
    LIMIT_BYTES,
    MARK_VARIABLE,
    small_group,
    why_no_group,
)
from benchmarks.reliability.in_ranks import called, how_it_ended, wait_until
from benchmarks.reliability.in_torchrun import launched, time_of_attempt
from benchmarks.reliability.row import Row, Trial, check
from benchmarks.reliability.rows_crash import SHORT, check_end
from tests.settings import small
from tests.step_faults import StepFault
from tests.test_step_failures import NUM_STEPS, SETTINGS, follow

PLACES = ("copy", "forward", "before the backward", "backward", "after the last gradient")
NUM_LAYERS, NUM_BUCKETS = 12, 4  # of noisy_net
REAL = 5  # every so many trials the allocator itself refuses


def o1(trial: Trial) -> float | None:
    """One rank runs out of memory somewhere in a step; all repeat it in smaller pieces."""
    dice = trial.dice
    world_size, sync = 2 + dice.randrange(2), dice.choice(("flat", "ddp"))
    pieces = dice.choice((1, 1, 4))
    late = ("before the all-reduce",) if sync == "flat" else (f"bucket {dice.randrange(4)}",)
    place = dice.choice((*PLACES, *late))
    fault = StepFault(
        ranks=(dice.randrange(world_size),),
        step=dice.randrange(NUM_STEPS),
        place=place,
        kind="real memory" if trial.seed % REAL == REAL - 1 else "memory",
        layer=dice.randrange(NUM_LAYERS),
        # Behind the last gradient's backward and in a bucket only the last piece is under way.
        piece=dice.randrange(pieces) if place in PLACES[:4] else pieces - 1,
    )
    trial.notes |= asdict(fault) | {"world": world_size, "sync": sync, "pieces": pieces}
    words = (*SETTINGS, f"parallel.sync={sync}")
    if pieces > 1:
        words += (f"train.micro_batch_size={24 // world_size // pieces}",)
    begin = time.monotonic()
    run = trial.folder / "run"
    ends = called(trial.folder, world_size, follow, small(run, *words), (fault,), {})
    sec = time.monotonic() - begin
    check(all(o.error is None and o.value for o in ends), how_it_ended(ends, trial.folder))
    found = [o.value for o in ends]
    trial.fired = sum(rank.fired for rank in found) > 0
    told = events_of(run, "out_of_memory")
    check([e["step"] for e in told] == [fault.step], f"events: {told}")
    check(told[0]["ranks"] == list(fault.ranks), f"blamed {told[0]['ranks']}")
    plan = {step: size for step, size in enumerate(found[0].sizes) if size is not None}
    twin = trial.folder / "twin"
    ends = called(trial.folder, world_size, follow, small(twin, *words), (), plan)
    check(all(o.error is None and o.value for o in ends), how_it_ended(ends, trial.folder))
    for rank, (mine, clean) in enumerate(zip(found, [o.value for o in ends], strict=True)):
        check(mine.sizes == found[0].sizes, f"rank {rank} used other pieces: {mine.sizes}")
        check(mine.samples_seen == NUM_STEPS * 24, f"{mine.samples_seen} samples")
        for name, value in mine.weights.items():
            check(torch.equal(value, clean.weights[name]), f"{name} of rank {rank} differs")
    losses = [[line.get("train/loss") for line in lines_of(path)] for path in (run, twin)]
    check(losses[0] == losses[1], "the losses differ")
    return sec


def o2(trial: Trial) -> float | None:
    """The kernel kills a loader worker; `dist-train run` starts the ranks again."""
    words = (*SHORT, "data.name=benchmarks.reliability.greedy:GreedyPictures")
    words += (f"data.args={{greedy: {trial.dice.randrange(200)}}}", "data.val_fraction=0")
    words += ("data.loader=workers", "data.num_workers=1", "data.image_size=12")
    words += ("eval.every_epochs=null",)
    mark = trial.folder / "fired"
    with small_group() as group:
        env = {GROUP_VARIABLE: str(group), MARK_VARIABLE: str(mark)}
        with launched(
            trial, words, nproc=2, max_restarts=1, launcher="dist-train", env=env
        ) as tree:
            wait_until(lambda: mark.exists() and mark.read_text(), "nobody is greedy")
            since = time.time()
            trial.fired = True
            check_end(trial, tree, 2, words)
    worker = mark.read_text()
    told = [line for line in tree.output.splitlines() if f"(pid(s) {worker})" in line]
    told += [line for line in tree.output.splitlines() if f"worker (pid {worker})" in line]
    check(told, f"worker {worker} is not named: {tree.tail()}")
    trial.notes["told"] = told[0][:200]
    back = time_of_attempt(tree.run_dir, 1)
    check(back is not None, "there was no second attempt")
    return None if back is None else back - since


ROWS = (
    Row(
        id="O1",
        promise="one rank out of memory: all halve the micro-batch and retry the same batch, "
        "bitwise as a run with that schedule",
        injection="OutOfMemoryError, or a real refusal of the allocator, in copy, forward, "
        "backward, a bucket or before the all-reduce on a random rank",
        num_trials=30,
        measures="the whole run",
        work=o1,
    ),
    Row(
        id="O2",
        promise="a loader worker killed for memory is named and recovered from like a dead rank",
        injection=f"the kernel kills a loader worker in a control group of {LIMIT_BYTES >> 20} MiB",
        num_trials=10,
        measures="from the kill to the next step",
        work=o2,
        needs="root, for control groups",
        cannot_run=why_no_group,
    ),
)
