"""`--dry-run`: what a command would do, said without doing it and without a GPU."""

import os

import torch

from dist_train.build import build_model, checked_logits, model_in_words, precision_in_force
from dist_train.checkpoint_folder import list_checkpoints
from dist_train.config import Config
from dist_train.config.augmentation import hint
from dist_train.config.check import check_world
from dist_train.config.identity import as_begun, run_dir_of
from dist_train.data.loaders import open_data
from dist_train.data.worker_loader import WorkerLoader
from dist_train.device import threads_asked, threads_of
from dist_train.distributed import Ranks, single_process
from dist_train.layout import detect_layout
from dist_train.memory import estimate_memory
from dist_train.memory_format import memory_format_in_force
from dist_train.optim import peak_learning_rate
from dist_train.order import micro_batches, shards, share
from dist_train.plan import make_plan
from dist_train.run_folder import RunFolder
from dist_train.smallest import small_batches, try_small

RANKS_VARIABLE = "DIST_TRAIN_DRY_RUN_RANKS"


def describe(config: Config) -> str:
    """Return the lines of a dry run.

    Raises:
        ConfigError: whatever the run itself would refuse before its first step.
    """
    layout = detect_layout(os.environ)
    world_size = int(os.environ.get(RANKS_VARIABLE, layout.world_size))
    check_world(config, world_size)
    alone = single_process()
    config = _for_the_run_there(config, alone)
    data = open_data(config, alone)
    plan = make_plan(config, data.num_train, world_size=world_size)
    model = build_model(config, data.num_classes, alone)
    first, last = share(plan.global_batch_size, 0, world_size)
    asked = config.train.micro_batch_size
    pieces = micro_batches(last - first, None if asked == "auto" else asked)
    if config.train.order == "fixed":
        pieces = shards(plan.global_batch_size, 0, world_size, config.train.num_shards)
    micro = pieces[0][1] - pieces[0][0]
    gpus = torch.cuda.device_count() if config.device != "cpu" else 0
    kind = "cuda" if gpus else "cpu"
    with torch.no_grad():
        two = torch.zeros(2, *data.loader.image_shape)
        checked_logits(model, two, data.num_classes, config.model.factory)
        small = small_batches(config, plan, data, world_size=world_size, micro_batch_size=micro)
        try_small(
            model,
            lambda size: torch.zeros(size, *data.loader.image_shape),
            small,
            num_classes=data.num_classes,
            factory=config.model.factory,
        )
    precision, notice = precision_in_force(config, torch.device(kind))
    asked_form = config.model.memory_format
    form = memory_format_in_force(asked_form, model, precision, kind)
    memory = estimate_memory(model, data.loader.image_shape, micro, precision, config)
    dropped = data.num_train - plan.steps_per_epoch * plan.global_batch_size
    found_later = "; auto finds what fits when the run starts" if asked == "auto" else ""
    loading = data.loading
    if isinstance(data.loader, WorkerLoader) and config.data.num_workers == "auto":
        loading = "through workers, as many as there are cores and memory for each rank (auto)"
    rows = [
        ("world", f"{world_size} ranks, device {kind}"),
        ("threads", f"{threads_of(threads_asked(config), layout, os.environ)} a rank"),
        (
            "data",
            f"{data.name}: {data.num_train:,} train, {data.num_val:,} val, "
            f"{data.num_test:,} test, {data.num_classes} classes",
        ),
        ("model", model_in_words(model, config)),
        ("image size", data.image_size),
        ("loading", loading),
        ("augmentation", data.augmentation + hint(config.data, data.name)),
        ("global batch", f"{plan.global_batch_size} (at most {last - first} a rank)"),
        ("micro-batch", f"{micro} ({len(pieces)} accumulated)" + found_later),
        (
            "steps",
            f"{plan.steps_per_epoch:,} an epoch, {plan.total_steps:,} in all"
            + (f"; {dropped} samples of each epoch are dropped" if dropped > 0 else ""),
        ),
        (
            "learning rate",
            f"{peak_learning_rate(config.optim, plan.global_batch_size):g} at the "
            f"peak, {config.optim.schedule}, {plan.warmup_steps} warm-up steps",
        ),
        ("precision", precision + (" (auto)" if config.precision == "auto" else "")),
        ("memory format", form + (" (auto)" if asked_form == "auto" else "")),
        (
            "memory",
            f"about {memory / 2**30:.2f} GiB a rank (weights, gradients, optimizer, "
            f"activations of {micro}; without the framework's own)",
        ),
        ("run folder", str(run_dir_of(config))),
    ]
    lines = [f"*** {text} ***" for text in (data.notice, plan.notice, notice) if text]
    shown = [f"{name:<14} {value}" for name, value in rows]
    return "\n".join([*lines, *data.remarks, *shown])


def _for_the_run_there(config: Config, alone: Ranks) -> Config:
    """Return what the command means for the run that its folder holds, if it holds one."""
    folder = RunFolder(run_dir_of(config), alone)
    saved = folder.saved_config() if list_checkpoints(folder.checkpoints) else None
    return config if saved is None else as_begun(config, saved, folder.path)
