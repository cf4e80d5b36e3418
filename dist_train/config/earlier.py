"""Runs begun by an earlier version: the same command finds them, and they go on as they began."""

import dataclasses
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

import yaml

from dist_train.config.schema import Config, ConfigError
from dist_train.config.typed import flatten
from dist_train.config.whole_file import read_json
from dist_train.config.yaml_limits import check_yaml

BEGUN_WITHOUT = "begun_without"  # in environment.json: the keys of LATER that there were not yet

# Settings that are newer than the first runs, the oldest first, and what happened before they
# existed. At its default such a key is not in the hash: the folder of a run keeps its name.
LATER: dict[str, Any] = {
    "data.augment": "standard",
    "model.memory_format": "channels_last",
    "data.resize": "always",
}

SYNC = "parallel.sync"  # it is in no hash, and auto goes on as the run was begun

# Values of such settings that follow from older ones of a command.
FOLLOWING: dict[str, tuple[Any, ...]] = {"data.resize": ("needed",)}

# Settings of bundled experiments that had another value: {experiment: {key: (value, before)}}.
FORMER_PRESETS: dict[str, dict[str, tuple[Any, Any]]] = {
    "cifar10_speed": {"precision": ("auto", "bf16")},
}

# What a bundled experiment's model was called with, and any other that took its place:
# {experiment: (model.factory, model.args)}.
FORMER_ARGUMENTS: dict[str, tuple[str, dict[str, Any]]] = {
    "cifar10_resnet9": ("dist_train.models:resnet9", {"width": 32}),
    "cifar10_speed": ("dist_train.models:speed_net", {"widths": [64, 256, 256]}),
    "quickstart": ("dist_train.models:resnet9", {"width": 16}),
}


def later_defaults() -> dict[str, Any]:
    """Return {key: default} of the settings in LATER."""
    return {key: value for key, value in flatten(Config()).items() if key in LATER}


def former_meanings(config: Config, missing: Collection[str]) -> Iterator[Config]:
    """Yield what the command of `config` may have meant to a version without the keys `missing`.

    None, if it gives such a setting a value of its own.
    """
    defaults, flat = later_defaults(), flatten(config)
    for key in missing:
        # A list is what older settings of the command add up to.
        known = (defaults[key], LATER[key], *FOLLOWING.get(key, ()))
        if flat[key] not in known and not isinstance(flat[key], tuple):
            return
    candidates = [with_values(config, {key: LATER[key] for key in missing})]
    for change in FORMER:
        candidates += [former for c in candidates if (former := change(c)) is not None]
    yield from candidates


def keys_missing(run_dir: Path) -> tuple[str, ...]:
    """Return the settings of LATER that there were not yet when the run in `run_dir` was begun."""
    told = read_json(run_dir / "environment.json").get(BEGUN_WITHOUT)
    if isinstance(told, list):
        return tuple(key for key in told if key in LATER)
    path = run_dir / "config.yaml"
    try:
        check_yaml(path, str(path))
        values = yaml.safe_load(path.read_bytes())
    except (OSError, ValueError, ConfigError, yaml.YAMLError):
        return ()
    return missing_in(values) if is_whole(values) else ()


def is_whole(values: Any) -> bool:
    """Say whether settings are those of a run's config.yaml, which names every group."""
    groups = [f.name for f in dataclasses.fields(Config) if dataclasses.is_dataclass(f.type)]
    return isinstance(values, dict) and all(isinstance(values.get(g), dict) for g in groups)


def filled(values: dict[str, Any]) -> dict[str, Any]:
    """Return a run's config.yaml with what the settings that it lacks meant when it was written.

    A file that is not whole, one that a user wrote, is returned as it is.
    """
    if not is_whole(values):
        return values
    values = {k: dict(v) if isinstance(v, dict) else v for k, v in values.items()}
    for key in missing_in(values):
        *groups, name = key.split(".")
        node = values
        for group in groups:
            node = node[group]
        node[name] = LATER[key]
    return values


def missing_in(values: dict[str, Any]) -> tuple[str, ...]:
    """Return the settings of LATER that a run's config.yaml does not name."""
    return tuple(key for key in LATER if not _has(values, key.split(".")))


def with_its_choices(config: Config, saved: Config) -> Config:
    """Return `config` with what the run of `saved` was told where this command says auto.

    Before there was parallel.sync=auto, flat was the default.
    """
    sync = saved.parallel.sync
    return with_values(config, {SYNC: sync}) if config.parallel.sync == "auto" else config


def with_values(config: Config, values: dict[str, Any]) -> Config:
    """Return `config` with other values; {dotted key: value}."""
    for key, value in values.items():
        config = _with(config, key.split("."), value)
    return config


def _has(values: Any, path: list[str]) -> bool:
    for name in path:
        if not isinstance(values, dict) or name not in values:
            return False
        values = values[name]
    return True


def _with(config: Any, path: list[str], value: Any) -> Any:
    if len(path) > 1:
        value = _with(getattr(config, path[0]), path[1:], value)
    return dataclasses.replace(config, **{path[0]: value})


def _former_preset(config: Config) -> Config | None:
    flat = flatten(config)
    presets = FORMER_PRESETS.get(config.experiment, {})
    former = {key: before for key, (now, before) in presets.items() if flat[key] == now}
    return with_values(config, former) if former else None


def _former_arguments(config: Config) -> Config | None:
    """Return the settings with what an experiment's own model left to any other factory."""
    factory, arguments = FORMER_ARGUMENTS.get(config.experiment, ("", {}))
    if not arguments or config.model.factory == factory:
        return None
    return with_values(config, {"model.args": arguments | config.model.args})


# What else the same command meant: each turns settings into those of before, or None.
FORMER: tuple[Callable[[Config], Config | None], ...] = (_former_preset, _former_arguments)
