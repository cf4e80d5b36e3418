"""`dist-train verify-resume`: kill and resume the user's own configuration, and compare the bits.

It trains once undisturbed and once with kills (SIGKILL) and stops (SIGTERM) at seeded steps and
places, each followed by the same command again. If the results differ, it trains undisturbed once
more: that tells a training that is not deterministic from a resume that loses something.
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from dist_train.config import Config, ConfigError
from dist_train.config.arguments import (
    Parser,
    add_run_options,
    compose_request,
    print_error,
    words_of,
)
from dist_train.config.check import check_world
from dist_train.config.overrides import quoted
from dist_train.data.loaders import open_data
from dist_train.differences import Difference, compare, moved_generators
from dist_train.distributed import single_process
from dist_train.plan import Plan, make_plan
from dist_train.rehearsal import FAULT_VARIABLE, NOTES_VARIABLE, Fault, Place
from dist_train.torchrun_here import ALONE, without_leftovers

PLACES: tuple[Place, ...] = (
    "in the evaluation",
    "in the save",
    "in the backward",
    "after the step",
    "before the step",
)
STEPS_BEYOND_EPOCH = 6
CHECKPOINTS = 12  # at so many steps of a run its state is kept, to find the first difference
MARGIN_STEPS = 2  # after the last kill


@dataclass(frozen=True, kw_only=True, slots=True)
class Rehearsal:
    """What is trained, and how it is disturbed."""

    words: list[str]  # of the command line
    config: Config
    plan: Plan
    num_ranks: int
    folder: Path
    faults: list[Fault]


def main(argv: list[str]) -> int:
    """Run `dist-train verify-resume`; returns 0 identical, 1 different, 2 the user's mistake."""
    try:
        options = _parse(argv)
        folder = Path(tempfile.mkdtemp(prefix="verify-resume-", dir=options.work_dir))
        try:
            return _verify(_prepare(options, folder))
        finally:
            if options.keep:
                _say(f"kept: {folder}")
            else:
                shutil.rmtree(folder, ignore_errors=True)
    except ConfigError as mistake:
        print_error(str(mistake))
        return 2


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = Parser(
        prog="dist-train verify-resume",
        description="Kill and resume a training at seeded places and compare the result's bits.",
    )
    parser.add_argument("--nproc", type=int, default=None, help="ranks; default: the GPUs, else 2")
    parser.add_argument("--steps", type=int, help="steps to train; default: an epoch and a few")
    parser.add_argument("--kills", type=int, default=6, help="kills and stops, in turn")
    parser.add_argument("--seed", type=int, default=0, help="of their steps and places")
    parser.add_argument("--keep", action="store_true", help="keep the temporary run folders")
    parser.add_argument("--work-dir", type=Path, help="where to put them")
    add_run_options(parser)
    options = parser.parse_intermixed_args(argv)
    if options.kills < 1:
        raise ConfigError(f"--kills={options.kills} must be 1 or more")
    if options.work_dir is not None and not options.work_dir.is_dir():
        raise ConfigError(f"--work-dir={options.work_dir} is no folder")
    return options


def _prepare(options: argparse.Namespace, folder: Path) -> Rehearsal:
    config = compose_request(options).config
    gpus = torch.cuda.device_count() if config.device != "cpu" else 0
    num_ranks = options.nproc if options.nproc is not None else gpus or 2
    check_world(config, num_ranks)
    data = open_data(config, single_process())
    plan = make_plan(config, data.num_train, world_size=num_ranks)
    steps = options.steps or plan.steps_per_epoch + STEPS_BEYOND_EPOCH
    if steps < options.kills + MARGIN_STEPS + 1:
        raise ConfigError(
            f"--steps={steps} is too short for {options.kills} kills: give --steps="
            f"{options.kills + MARGIN_STEPS + 1} or more, or fewer --kills"
        )
    every = max(1, steps // CHECKPOINTS)
    extra = {
        "train.steps": steps,
        "train.max_minutes": "null",
        "log_every": 1,
        "checkpoint.every_steps": every,
        "checkpoint.keep_last": steps,
        "checkpoint.exact_steps": "true",
        "profile.steps": "null",
        "tracking.wandb.mode": "disabled",
        "tracking.tensorboard": "false",
    }
    if plan.eval_every is None or plan.eval_every > steps:
        extra["eval.every_steps"] = max(1, steps // 2)
    options.overrides += [f"{key}={value}" for key, value in extra.items()]
    config = compose_request(options).config
    plan = make_plan(config, data.num_train, world_size=num_ranks)
    faults = _choose(plan, num_ranks, options.kills, options.seed, folder)
    return Rehearsal(
        words=words_of(options),
        config=config,
        plan=plan,
        num_ranks=num_ranks,
        folder=folder,
        faults=faults,
    )


def _choose(plan: Plan, num_ranks: int, count: int, seed: int, folder: Path) -> list[Fault]:
    """Return the faults in the order of their steps; kill and stop in turn, every place first."""
    dice = random.Random(seed)
    last = plan.total_steps - MARGIN_STEPS
    evaluations = [step for step in range(1, last + 1) if plan.eval_due(step)]
    saves = [step for step in range(1, last + 1) if plan.save_due(step)]
    best = evaluations[:1]  # the first evaluation is the best so far, and is saved
    drawn: list[tuple[int, Place, int]] = []
    for number in range(count):
        place = PLACES[number % len(PLACES)]
        if place == "in the evaluation" and not evaluations:
            place = "before the step"
        step = dice.randrange(1, last)
        if place == "in the evaluation":
            step = dice.choice(evaluations) - 1  # the step that ends there
        elif place == "in the save":
            step = dice.choice(best if best and number < len(PLACES) else saves) - 1
        # Only rank 0 saves, and a small split may give it the only batch.
        alone = place in ("in the evaluation", "in the save")
        drawn.append((step, place, 0 if alone else dice.randrange(num_ranks)))
    drawn.sort(key=lambda fault: fault[0])
    return [
        Fault(
            rank=rank,
            step=step,
            place=place,
            number=(signal.SIGKILL, signal.SIGTERM)[(number + seed) % 2],
            mark=str(folder / f"fired_{number}"),
        )
        for number, (step, place, rank) in enumerate(drawn)
    ]


def _verify(rehearsal: Rehearsal) -> int:
    plan, faults = rehearsal.plan, rehearsal.faults
    _say(
        f"{plan.total_steps} steps on {rehearsal.num_ranks} ranks, an epoch is "
        f"{plan.steps_per_epoch}: undisturbed, then with {len(faults)} kills and stops"
    )
    began = time.monotonic()
    _train_to_end(rehearsal, "undisturbed", notes=True)
    _say(f"undisturbed: {time.monotonic() - began:.0f} s")
    missed = []
    for fault in faults:
        _train(rehearsal, "disturbed", fault)
        name = signal.Signals(fault.number).name
        where = f"{name} to rank {fault.rank} {fault.place}, step {fault.step}"
        fired = Path(fault.mark).exists()
        missed += [] if fired else [where]
        _say(f"  {where}" + ("" if fired else ": NOT REACHED"))
    _train_to_end(rehearsal, "disturbed")
    found = compare(rehearsal.folder / "undisturbed", rehearsal.folder / "disturbed")
    if found is None:
        summary = json.loads((rehearsal.folder / "undisturbed" / "summary.json").read_text())
        _say(
            f"identical bit for bit after {len(faults) - len(missed)} of {len(faults)} kills and "
            f"stops: weights_sha256 {summary['weights_sha256'][:16]}, every line of metrics.jsonl"
        )
        if plan.total_steps <= plan.steps_per_epoch:
            _say(
                "not tried: the end of an epoch, where the order of the samples changes: give "
                f"--steps={plan.steps_per_epoch + STEPS_BEYOND_EPOCH}"
            )
        if missed:
            print_error(f"not reached: {'; '.join(missed)}: give more --steps or another --seed")
        return 2 if missed else 0
    _say("DIFFERENT")
    for line in found.lines():
        _say(f"  {line}")
    _say("training undisturbed once more, to find the cause ...")
    _train_to_end(rehearsal, "again")
    again = compare(rehearsal.folder / "undisturbed", rehearsal.folder / "again")
    _say(f"likely cause: {_likely_cause(rehearsal, found, again)}")
    return 1


def _likely_cause(rehearsal: Rehearsal, found: Difference, again: Difference | None) -> str:
    """Return a sentence: the machine's arithmetic, or what the user's code keeps or draws."""
    config = rehearsal.config
    on_gpu = config.device != "cpu" and torch.cuda.is_available()
    drawn = moved_generators(rehearsal.folder / "notes")
    draws = (
        f" The training draws from the global generator of {drawn}, which no checkpoint holds and "
        "no seed sets: draw from torch's (seeded before every micro-batch) or from one of your "
        "own that is seeded by the sample's index."
        if drawn
        else ""
    )
    if again is not None:
        where = f"two undisturbed trainings differ too, from step {again.first_step} on"
        if drawn:
            return f"{where}: not the resume, but randomness without a seed.{draws}"
        if on_gpu and not config.deterministic:
            return f"{where}: not the resume. Set deterministic=true: GPU kernels add in any order"
        return (
            f"{where}: not the resume. Look for randomness in your own model or data set (a clock, "
            "os.urandom, an unordered set, a generator without a seed), and give threads=N a number"
        )
    if found.surroundings:
        return f"the runs did not have the same surroundings: {'; '.join(found.surroundings)}"
    return (
        "two undisturbed trainings are identical, so the resume loses something: state that "
        "neither state_dict() nor the step's number gives back, such as a Python attribute or a "
        "non-persistent buffer that changes in forward, a counter or a cache in the data set, or "
        f"a generator of your own.{draws}"
    )


def _train_to_end(rehearsal: Rehearsal, name: str, *, notes: bool = False) -> None:
    code = _train(rehearsal, name, None, notes=notes)
    status = rehearsal.folder / name / "status.json"
    state = json.loads(status.read_text())["state"] if status.is_file() else "nothing"
    if code != 0 or state != "finished":
        log = (rehearsal.folder / f"{name}.log").read_text().splitlines()
        told = [line for line in log if "dist-train: error" in line or "Error" in line]
        raise ConfigError(
            f"the {name} training ended with code {code} ({state}) and proves nothing; it said: "
            f"{(told or log or ['nothing'])[-1].strip()[:400]}"
        )


def _train(rehearsal: Rehearsal, name: str, fault: Fault | None, *, notes: bool = False) -> int:
    """Give the command once, in the run folder `name`; returns torchrun's exit code."""
    environment = without_leftovers(os.environ, num_nodes=1)
    share = max(1, len(os.sched_getaffinity(0)) // rehearsal.num_ranks)
    environment.setdefault("OMP_NUM_THREADS", str(share))
    if fault is not None:
        environment[FAULT_VARIABLE] = json.dumps(asdict(fault))
    if notes:
        (rehearsal.folder / "notes").mkdir()
        environment[NOTES_VARIABLE] = str(rehearsal.folder / "notes")
    command = [sys.executable, "-m", "torch.distributed.run", *ALONE]
    command += [f"--nproc-per-node={rehearsal.num_ranks}", "-m", "dist_train.rehearsal"]
    command += [*rehearsal.words, f"run_dir={quoted(str(rehearsal.folder / name))}"]
    with (rehearsal.folder / f"{name}.log").open("a") as log:
        return subprocess.call(command, env=environment, stdout=log, stderr=log)


def _say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
