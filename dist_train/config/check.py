"""Ranges of single settings and rules between them, in one place."""

import math
from dataclasses import dataclass
from typing import Any

from dist_train.config.augmentation import in_force
from dist_train.config.importing import as_import_path, check_import_path, nearest
from dist_train.config.schema import Config, ConfigError, DataConfig
from dist_train.config.typed import flatten


@dataclass(frozen=True, slots=True)
class Range:
    """Closed interval of a number; `above` is an open lower end."""

    least: float | None = None
    most: float | None = None
    above: float | None = None


SOURCES = ("auto", "cifar10", "image_folder", "synthetic")  # of images, beside the user's own
RANGES: dict[str, Range] = {
    "seed": Range(least=0, most=2**63 - 1),
    "threads": Range(least=1),
    "log_every": Range(least=1),
    "train.epochs": Range(least=1),
    "train.steps": Range(least=1),
    "train.max_minutes": Range(above=0),
    "train.global_batch_size": Range(least=1),
    "train.micro_batch_size": Range(least=1),
    "train.early_stop_patience": Range(least=1),
    "train.num_shards": Range(least=1),
    "parallel.start_timeout_sec": Range(above=0),
    "parallel.step_timeout_sec": Range(above=0),
    "data.val_fraction": Range(least=0, most=0.9),
    "data.in_memory_gib": Range(least=0),
    "data.num_workers": Range(least=0),
    "data.image_size": Range(least=1),
    "data.crop_padding": Range(least=0),
    "data.cutout": Range(least=0),
    "data.mixup": Range(least=0),
    "data.cutmix": Range(least=0),
    "data.eval_batch_size": Range(least=1),
    "optim.lr": Range(above=0),
    "optim.momentum": Range(least=0, most=0.9999),
    "optim.rest_lr": Range(above=0),
    "optim.rest_momentum": Range(least=0, most=0.9999),
    "optim.orthogonal_steps": Range(least=1, most=20),
    "optim.weight_decay": Range(least=0),
    "optim.warmup_steps": Range(least=0),
    "optim.warmup_epochs": Range(least=0),
    "optim.final_lr_fraction": Range(least=0, most=1),
    "optim.lr_base_batch_size": Range(least=1),
    "optim.clip_norm": Range(above=0),
    "optim.label_smoothing": Range(least=0, most=0.999),
    "optim.ema_decay": Range(above=0, most=0.999999),
    "eval.every_epochs": Range(least=1),
    "eval.every_steps": Range(least=1),
    "checkpoint.every_steps": Range(least=1),
    "checkpoint.mtbf_hours": Range(above=0),
    "checkpoint.keep_last": Range(least=1),
    "guards.max_consecutive": Range(least=1),
    "guards.max_rollbacks": Range(least=0),
    "guards.rollback_lr_factor": Range(above=0, most=1),
    "guards.drift_every": Range(least=1),
    "guards.loss_spike": Range(above=1),
    "guards.hang_sec": Range(least=0.5),
}


def check_source(data: DataConfig) -> None:
    """Raise ConfigError if data.name names no source, or one that lacks its folder."""
    if ":" in data.name:
        check_import_path(data.name, "data.name")
        return
    if data.name not in SOURCES:
        meant = as_import_path(data.name)
        hint = f"; did you mean data.name={meant}?" if meant else nearest(data.name, SOURCES)
        known = ", ".join(SOURCES)
        raise ConfigError(
            f"data.name={data.name} is none of {known} or package.module:callable{hint}"
        )
    if data.name == "image_folder" and data.root is None:
        raise ConfigError(
            "data.name=image_folder needs data.root: give the folder that holds train/ and test/"
        )


def check(config: Config) -> None:
    """Raise ConfigError for the first value out of range or rule between keys that is broken."""
    for key, value in flatten(config).items():
        if key in RANGES and value is not None and not isinstance(value, str):
            _check_range(key, value, RANGES[key])
    train, optim, data = config.train, config.optim, config.data
    check_import_path(config.model.factory, "model.factory")
    check_source(data)
    if train.epochs is None and train.steps is None:
        raise ConfigError("how long to train is not set: give train.epochs=N or train.steps=N")
    if train.early_stop_patience is not None and data.val_fraction == 0:
        raise ConfigError(
            "train.early_stop_patience needs a validation split: set data.val_fraction=0.1"
        )
    if train.early_stop_patience is not None and not config.checkpoint.keep_best:
        raise ConfigError(
            "train.early_stop_patience ends with the best weights: set checkpoint.keep_best=true"
        )
    if train.order == "fixed":
        _check_fixed_order(config)
    if optim.name == "sgd" and optim.nesterov and optim.momentum == 0:
        raise ConfigError("optim.nesterov=true needs momentum: raise optim.momentum above 0")
    if optim.name == "muon" and config.guards.lag:
        raise ConfigError(
            "optim.name=muon cannot skip a step on the device, which guards.lag=1 needs: set "
            "guards.lag=0"
        )
    if data.loader == "workers" and in_force(data, data.name).flip == "alternating":
        raise ConfigError(
            "data.flip=alternating is for pictures in memory: set data.flip=true, or "
            "data.loader=memory"
        )
    if not all(0 <= b < 1 for b in optim.betas):
        raise ConfigError(f"optim.betas={list(optim.betas)}: both must be in [0, 1)")
    if config.precision == "fp16" and config.device == "cpu":
        raise ConfigError("precision=fp16 needs a GPU: on a CPU use precision=bf16 or fp32")
    if config.parallel.sync_batchnorm and config.device == "cpu":
        raise ConfigError(
            "parallel.sync_batchnorm=true needs GPUs: torch's SyncBatchNorm refuses CPU tensors"
        )
    if config.parallel.sync_batchnorm and train.micro_batch_size == "auto":
        raise ConfigError(
            "train.micro_batch_size=auto tries sizes on each rank by itself, and the forward of "
            "parallel.sync_batchnorm=true waits for all ranks: give a number"
        )
    if data.randaugment and data.loader == "memory":
        raise ConfigError("data.randaugment works on single pictures: set data.loader=workers")
    if data.mean is not None and data.std is not None and len(data.mean) != len(data.std):
        raise ConfigError(
            f"data.mean has {len(data.mean)} channels and data.std {len(data.std)}: give as many"
        )
    if (data.mean is None) != (data.std is None):
        raise ConfigError("data.mean and data.std go together: give both or none")
    if data.std is not None and min(data.std) <= 0:
        raise ConfigError(f"data.std={list(data.std)}: every value must be above 0")
    steps = config.profile.steps
    if steps is not None and not 0 <= steps[0] < steps[1]:
        raise ConfigError(f"profile.steps={list(steps)}: give [first, last] with first < last")


def _check_fixed_order(config: Config) -> None:
    """Raise ConfigError if the bits of the result would depend on something else than shards."""
    train, shards = config.train, config.train.num_shards
    if shards & (shards - 1):
        lower = 1 << (shards.bit_length() - 1)
        raise ConfigError(
            f"train.num_shards={shards} is not a power of two: set {lower} or {2 * lower}"
        )
    if train.global_batch_size < shards:
        raise ConfigError(
            f"train.global_batch_size={train.global_batch_size} is smaller than train.num_shards "
            f"(= {shards}): raise the former or lower the latter"
        )
    if train.micro_batch_size is not None:
        raise ConfigError(
            "train.order=fixed computes one shard at a time: unset train.micro_batch_size; more "
            "train.num_shards make smaller pieces"
        )
    if config.threads not in (None, 1):
        raise ConfigError(
            f"threads={config.threads}: train.order=fixed needs one thread a rank, since sums "
            "depend on their number: unset threads"
        )
    if config.model.compile:
        raise ConfigError(
            "model.compile=true may add up in another order for another shape: unset it for "
            "train.order=fixed"
        )
    if config.parallel.sync == "ddp":
        raise ConfigError(
            "parallel.sync=ddp adds up in DDP's order: unset it for train.order=fixed"
        )
    if config.parallel.sync_batchnorm:
        raise ConfigError(
            "parallel.sync_batchnorm=true and train.order=fixed exclude each other: in fixed order "
            "BatchNorm's statistics belong to the shard"
        )


def check_world(config: Config, world_size: int) -> None:
    """Raise ConfigError if this configuration cannot be cut over `world_size` ranks."""
    batch = config.train.global_batch_size
    if batch < world_size:
        raise ConfigError(
            f"train.global_batch_size={batch} is smaller than world_size (= {world_size}): "
            f"raise train.global_batch_size to {world_size} or more, "
            f"or start at most {batch} ranks"
        )
    check_pieces(config, batch, world_size, cure="a train.global_batch_size that the ranks divide")
    shards = config.train.num_shards
    if config.train.order == "fixed" and (world_size & (world_size - 1) or world_size > shards):
        fit = ", ".join(str(1 << i) for i in range(shards.bit_length()))
        raise ConfigError(
            f"train.order=fixed deals train.num_shards (= {shards}) evenly to the ranks: "
            f"world_size (= {world_size}) must be one of {fit}"
        )


def check_pieces(config: Config, num_samples: int, world_size: int, *, cure: str) -> None:
    """Raise ConfigError if ranks would cut their parts of a step into unlike numbers of pieces.

    The forward of SyncBatchNorm waits for all ranks, so each must have as many. Parts differ by at
    most one sample, and so in pieces only where the smaller one comes out even.

    Args:
        config: of the run.
        num_samples: of the step, over all ranks; at least one for each.
        world_size: the number of ranks.
        cure: what helps besides another micro-batch.
    """
    micro, (least, extra) = config.train.micro_batch_size, divmod(num_samples, world_size)
    if not config.parallel.sync_batchnorm or not isinstance(micro, int):
        return
    if extra == 0 or least % micro != 0:
        return
    larger = next(size for size in range(micro + 1, least + 2) if least % size != 0)
    raise ConfigError(
        "parallel.sync_batchnorm=true needs as many micro-batches on every rank, as its forward "
        f"waits for all of them, but the {least} or {least + 1} of {num_samples} samples that one "
        f"of {world_size} ranks gets are {least // micro} or {least // micro + 1} micro-batches "
        f"of train.micro_batch_size={micro}: set train.micro_batch_size={larger}, or {cure}"
    )


def _check_range(key: str, value: Any, allowed: Range) -> None:
    if not math.isfinite(value):
        raise ConfigError(f"{key}={value} is out of range: it must be a finite number")
    if allowed.above is not None and not value > allowed.above:
        raise ConfigError(f"{key}={value} is out of range: it must be above {allowed.above:g}")
    if allowed.least is not None and not value >= allowed.least:
        raise ConfigError(f"{key}={value} is out of range: it must be at least {allowed.least:g}")
    if allowed.most is not None and not value <= allowed.most:
        raise ConfigError(f"{key}={value} is out of range: it must be at most {allowed.most:g}")
