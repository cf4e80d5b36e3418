"""What a checkpoint costs: `python -m benchmarks run checkpoint`.

ResNet-18 with SGD's momentum, 90 MB. In turns: a bare copy of the bytes, what a step waits for when
it saves, the whole save, the same with torch.save and with PyTorch's distributed checkpoint. Then
what a save costs the steps beside which it is written, and so training with one every 20 steps.
"""

import contextlib
import os
import random
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import HashStore
from torch.distributed.checkpoint.state_dict_saver import async_save

from benchmarks.intervals import mean_and_half_width, plus_minus
from benchmarks.opened import opened
from dist_train.bench.intervals import Estimate, geometric_mean_of, mean_of
from dist_train.checkpoint import load_state
from dist_train.checkpoint_folder import list_checkpoints, name_of, read_verified
from dist_train.checkpoint_writer import CheckpointWriter
from dist_train.config.compose import compose
from dist_train.distributed import start_ranks
from dist_train.models.resnet18 import resnet18_cifar
from dist_train.step import train_step

ROUNDS = 40
SAVES, EVERY_STEPS = 120, 20
COPY = "a bare copy of the bytes, one thread"
STALL = "here: what the step waits for"
WHOLE = "here: the whole save, hashed and synced"
TORCH_SAVE = "torch.save to a file, synced"
DCP_STALL = "distributed checkpoint, async_save: what the step waits for"
DCP_WHOLE = "distributed checkpoint, async_save: the whole save"


def state_of() -> dict[str, Any]:
    """Return the state of a ResNet-18 that SGD with momentum has taken a step with."""
    model = resnet18_cifar(num_classes=10)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(torch.zeros(2, 3, 32, 32)).sum().backward()
    optimizer.step()
    return {"model": model.state_dict(), "optimizer": optimizer.state_dict()}


def tensors_of(value: Any) -> list[Tensor]:
    """Return every tensor of a state."""
    if isinstance(value, Tensor):
        return [value]
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [tensor for part in parts for tensor in tensors_of(part)]


def saving(folder: Path) -> dict[str, Any]:
    """Return milliseconds of every way to save, and how many times the bare copy each takes."""
    state = state_of()
    sources = [t.detach().reshape(-1).numpy() for t in tensors_of(state)]
    targets = [np.zeros_like(source) for source in sources]
    errors: list[str] = []
    writer = CheckpointWriter(
        folder / "ours", keep_last=2, on_saved=lambda step: None, on_error=errors.append
    )
    times: dict[str, list[float]] = {}
    steps = 0

    def copy() -> None:
        for source, target in zip(sources, targets, strict=True):
            np.copyto(target, source)

    def ours() -> None:
        nonlocal steps
        steps += 1
        start = time.perf_counter()
        writer.save(state, step=steps, best_step=None)
        note(STALL, start)
        writer.wait()
        note(WHOLE, start)

    def torch_save() -> None:
        start = time.perf_counter()
        with (folder / "state.pt").open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        note(TORCH_SAVE, start)

    def dcp_save() -> None:
        start = time.perf_counter()
        saved: Any = async_save(state, checkpoint_id=folder / "dcp")
        note(DCP_STALL, start)
        saved.result()
        note(DCP_WHOLE, start)
        shutil.rmtree(folder / "dcp")

    def bare() -> None:
        start = time.perf_counter()
        copy()
        note(COPY, start)

    def note(name: str, start: float) -> None:
        times.setdefault(name, []).append(1000 * (time.perf_counter() - start))

    ways: list[Callable[[], None]] = [bare, ours, torch_save, dcp_save]
    for way in ways:
        way()  # the first time memory is fresh and modules are imported
    times.clear()
    dice = random.Random(0)
    for _ in range(ROUNDS):
        for way in dice.sample(ways, len(ways)):
            way()
    writer.close()
    assert not errors, errors
    path = folder / "ours" / name_of(steps)
    assert list_checkpoints(folder / "ours")[0] == path
    start = time.perf_counter()
    load_state(read_verified(path))
    reading = 1000 * (time.perf_counter() - start)
    return {
        "bytes": sum(source.nbytes for source in sources),
        "ways": {
            name: {
                "ms": mean_and_half_width(found),
                "times_copy": [times_copy.value, times_copy.high - times_copy.value],
            }
            for name, found in times.items()
            for times_copy in [_mean_ratio(found, times[COPY])]
        },
        "verified_and_loaded_ms": reading,
        "rounds": ROUNDS,
    }


def training(folder: Path) -> dict[str, Any]:
    """Return the share of the speed that is left with a save every 20 steps.

    What a save costs is over after a step or two. So here two steps beside which one is written are
    compared with the two before or after them, in which the machine's speed is much the same, and
    the difference is spread over 20 steps.
    """
    words = ["experiment=cifar10_resnet18", "data=synthetic", "train.global_batch_size=64"]
    words += ["device=cpu", "checkpoint.every_steps=20", "eval.every_epochs=null"]
    config = compose([*words, f"run_dir={folder}/run"]).config
    with contextlib.ExitStack() as stack:
        ranks = stack.enter_context(start_ranks(config))
        it = stack.enter_context(opened(config, ranks))
        parts, progress = it.parts, it.progress
        it.run.open_writer(stack)
        assert it.run.saves is not None
        wait = it.run.saves.wait

        def two_steps(*, save: bool) -> float:
            start = time.perf_counter()
            if save:
                parts.drift.check(progress.step)
                it.run.save(parts, progress, it.meter)
            for _ in range(2):
                train_step(parts, it.feed, step=progress.step)
                progress.step += 1
            if save and not wait():  # it has been done for long, as a rule
                raise RuntimeError("a save failed")
            return time.perf_counter() - start

        two_steps(save=True)
        dice, costs, usual = random.Random(0), [], []
        for _ in range(SAVES):
            sec = {save: two_steps(save=save) for save in dice.sample((False, True), 2)}
            costs.append(sec[True] - sec[False])
            usual.append(sec[False])
    step_sec = statistics.fmean(usual) / 2
    period_sec = EVERY_STEPS * step_sec
    cost = mean_of(costs)
    low, high = (period_sec / (period_sec + sec) for sec in (cost.high, cost.low))
    return {
        "cost_ms": [1000 * cost.value, 1000 * (cost.high - cost.value)],
        "share_of_speed": [period_sec / (period_sec + cost.value), (high - low) / 2],
        "saves": SAVES,
        "step_ms": 1000 * step_sec,
        "every_steps": EVERY_STEPS,
        "precision": parts.precision,
    }


def _mean_ratio(found: Sequence[float], base: Sequence[float]) -> Estimate:
    return geometric_mean_of([mine / theirs for mine, theirs in zip(found, base, strict=True)])


def measure() -> dict[str, Any]:
    """Measure both."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        trained = training(folder)
        store = HashStore()
        dist.init_process_group("gloo", store=store, rank=0, world_size=1)
        try:
            saved = saving(folder)
        finally:
            dist.destroy_process_group()
    return {"saving": saved, "training": trained}


def table(found: dict[str, Any]) -> str:
    """Return the results as Markdown."""
    saving, training = found["saving"], found["training"]
    lines = [
        f"A state of {saving['bytes'] / 1e6:.0f} MB (ResNet-18, SGD with momentum), "
        f"{saving['rounds']} rounds in turns; the disk is the machine's own.",
        "",
        "| what | ms | times the bare copy |",
        "|---|---|---|",
    ]
    for name, values in saving["ways"].items():
        times = "" if name == COPY else plus_minus(values["times_copy"], 2)
        lines.append(f"| {name} | {plus_minus(values['ms'], 1)} | {times} |")
    mean, half = (100 * value for value in training["share_of_speed"])
    return "\n".join(
        [
            *lines,
            "",
            f"Reading, verifying and loading it: {saving['verified_and_loaded_ms']:.0f} ms. "
            f"Training it (batches of 64, {training['precision']}, {training['step_ms']:.0f} ms a "
            f"step) with a save every {training['every_steps']} steps runs at {mean:.1f} +- "
            f"{half:.1f} % of the speed without: one costs {plus_minus(training['cost_ms'], 0)} ms "
            f"({training['saves']} saves, each against two steps beside it).",
        ]
    )
