"""Which settings make a run what it is: the hash in its folder's name, what a resume may change."""

import hashlib
import json
import re
from collections.abc import Collection
from pathlib import Path

from dist_train.config.earlier import (
    LATER,
    former_meanings,
    keys_missing,
    later_defaults,
    with_its_choices,
)
from dist_train.config.redact import mask, redact
from dist_train.config.schema import Config, ConfigError
from dist_train.config.typed import flatten, plain

# Settings that do not change the result (or only its last bits), where it is kept, or how long
# it goes on. Everything else is in the hash.
NOT_IN_HASH = (
    "experiment",
    "run_dir",
    "resume",
    "resume_allow",
    "threads",
    "device",
    "log_every",
    "train.epochs",
    "train.steps",
    "train.max_minutes",
    "train.micro_batch_size",
    "parallel.name",
    "parallel.sync",
    "parallel.find_unused_parameters",
    "parallel.start_timeout_sec",
    "parallel.step_timeout_sec",
    "parallel.numa_binding",
    "data.root",
    "data.download",
    "data.in_memory_gib",
    "data.cache_dir",
    "data.num_workers",
    "data.eval_batch_size",
    "model.activation_checkpointing",
    "model.compile",
    "checkpoint.",
    "guards.",
    "profile.",
    "tracking.",
)


# Experiments that come with this package: made for CIFAR-10, and named after it.
BUNDLED = (
    "cifar10_resnet18",
    "cifar10_resnet9",
    "cifar10_speed",
    "cifar10_tutorial",
    "quickstart",
)
PATHS = ("run_dir", "data.root", "data.cache_dir")  # machines without a shared disk may differ


def hashed_settings(config: Config) -> dict[str, object]:
    """Return {dotted key: plain value} of every setting that changes the result; no secret."""
    return {
        key: mask(plain(value), key) for key, value in flatten(config).items() if not is_free(key)
    }


def is_free(key: str) -> bool:
    """Say whether a resume may change this setting and the run stays the same."""
    return any(key == free or (free[-1] == "." and key.startswith(free)) for free in NOT_IN_HASH)


def config_hash(config: Config) -> str:
    """Return 8 hex digits over every setting that changes the result.

    A setting that is newer than the first runs counts only where it is not at its default.
    """
    return _hash_without((), config)


def _hash_without(missing: Collection[str], config: Config) -> str:
    """Return the hash that a version without the keys `missing` made of `config`."""
    later = later_defaults()
    settings = {k: v for k, v in hashed_settings(config).items() if k not in missing}
    if config.data.name == "auto" and "auto" in config.data.augment:
        settings.pop("data.augment", None)  # what it adds is for a data.root that is no CIFAR-10
    return _digest({k: v for k, v in settings.items() if k not in later or v != plain(later[k])})


def full_hash(config: Config) -> str:
    """Return a hash over all settings but paths: ranks of one run must have the same."""
    settings = {k: plain(v) for k, v in flatten(config).items() if k not in PATHS}
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


def run_dir_of(config: Config) -> Path:
    """Return the run's folder: the one asked for, else runs/<what is trained>-<hash>.

    Without such a folder it is that in which an earlier version began this command's run.
    """
    if config.run_dir is not None:
        return Path(config.run_dir)
    runs = Path("runs")
    folder = runs / f"{name_of(config)}-{config_hash(config)}"
    if folder.exists():
        return folder
    for first in range(len(LATER)):
        missing = tuple(LATER)[first:]
        for former in former_meanings(config, missing):
            for name in {former.experiment, name_of(former)}:
                begun = runs / f"{name}-{_hash_without(missing, former)}"
                if keys_missing(begun) == missing:
                    return begun
    return folder


def name_of(config: Config) -> str:
    """Return what is trained, for a folder's or a job's name.

    That is the experiment; for data of the user's own under an experiment made for CIFAR-10 it is
    theirs: mine_stripes for data.name=mine:stripes.
    """
    data = config.data
    if config.experiment not in (*BUNDLED, Config().experiment):
        return config.experiment
    if ":" in data.name:
        module, _, name = data.name.partition(":")
        return re.sub(r"[^\w.+-]+", "_", f"{module.rpartition('.')[2]}_{name}", flags=re.ASCII)
    has_classes = data.root is not None and any(
        (Path(data.root) / name).is_dir() for name in ("train", "training")
    )
    if data.name == "image_folder" or (data.name == "auto" and has_classes):
        return "image_folder"
    return config.experiment


def as_begun(config: Config, saved: Config, run_dir: Path) -> Config:
    """Return what `config` means for the run in `run_dir`, whose settings are `saved`.

    That is `config`, but where an earlier version began the run, what the same command meant then;
    and what the command leaves to be chosen is as the run was told before.

    Raises:
        ConfigError: they are of two different runs.
    """
    missing = keys_missing(run_dir)
    config = with_its_choices(config, saved)
    if _changed(config, saved) and missing:
        for former in former_meanings(config, missing):
            if not _changed(former, saved):
                return former
    check_same_run(config, saved, run_dir)
    return config


def check_same_run(config: Config, saved: Config, run_dir: Path) -> None:
    """Raise ConfigError if resuming `saved` with `config` would mix two different runs."""
    old, new = redact(hashed_settings(saved)), redact(hashed_settings(config))
    changed = _changed(config, saved)
    if changed:
        what = ", ".join(f"{k}={new[k]} (the run has {old.get(k)})" for k in changed)
        raise ConfigError(
            f"{run_dir} holds a run with other settings: {what}. Use another run_dir, or allow "
            f"the change with resume_allow=[{','.join(changed)}]"
        )


def _changed(config: Config, saved: Config) -> list[str]:
    """Return the keys in which two runs differ and that `config` does not allow to differ."""
    old, new = redact(hashed_settings(saved)), redact(hashed_settings(config))
    return [k for k in new if old.get(k) != new[k] and k not in config.resume_allow]


def _digest(settings: dict[str, object]) -> str:
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]


def length_of(config: Config) -> str:
    """Return the setting that says how long to train."""
    train = config.train
    return f"train.epochs={train.epochs}" if train.steps is None else f"train.steps={train.steps}"
