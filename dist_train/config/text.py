"""Settings that are text keep the text: 2026_11_30 is no number there, and ~ is the home."""

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from types import NoneType
from typing import Any, get_args

import yaml
from hydra.core.override_parser.types import Override

from dist_train.config.overrides import parse_override, quoted
from dist_train.config.schema import Config, ConfigError
from dist_train.config.typed import leaves

FOLDERS = ("run_dir", "resume", "data.root", "data.cache_dir")  # ~ begins a home in these


def is_text(hint: Any) -> bool:
    """Say whether a setting of this type is text, or text or nothing."""
    return hint is str or set(get_args(hint)) == {str, NoneType}


def as_typed(override: Override, hint: Any) -> Override:
    """Return an override of a text setting with the very text of the command line.

    The grammar reads 1e3, 2026_11_30 and true as numbers and switches; null stays nothing.
    """
    if not is_text(hint) or not isinstance(override.value(), bool | int | float):
        return override
    text = (override.input_line or "").partition("=")[2].strip(" \t")
    former = str(override.value())
    # A run that a version before this one began, in the folder that this was to it.
    if override.key_or_group == "run_dir" and not Path(text).exists() and _is_run(former):
        text = former
    return parse_override(f"{override.key_or_group}={quoted(text)}")


def restore_texts(raw: dict[str, Any], files: Mapping[str, str]) -> None:
    """Put back what YAML made a number or a switch of, in settings that are text.

    Args:
        raw: the composed settings, not yet resolved.
        files: {dotted key: the file that set it}.
    """
    for key in texts_read_as_numbers(raw):
        owner, name = _owner(raw, key)
        text = _scalar(Path(files[key]), key.split(".")) if key in files else None
        owner[name] = str(owner[name]) if text is None else text


def texts_read_as_numbers(raw: dict[str, Any]) -> list[str]:
    """Return the text settings that hold a number or a switch."""
    found = []
    for key, hint in leaves(Config):
        owner, name = _owner(raw, key)
        if is_text(hint) and isinstance(owner.get(name), bool | int | float):
            found.append(key)
    return found


def with_folders(config: Config) -> Config:
    """Return the settings with ~ replaced by the home in folders.

    Raises:
        ConfigError: a folder is empty, or there is no such home.
    """
    changed = {key: _folder(key, _value(config, key)) for key in FOLDERS}
    data = dataclasses.replace(
        config.data, root=changed["data.root"], cache_dir=changed["data.cache_dir"]
    )
    return dataclasses.replace(
        config, run_dir=changed["run_dir"], resume=changed["resume"] or "", data=data
    )


def _folder(key: str, text: str | None) -> str | None:
    if text is None:
        return None
    if not text.strip():
        raise ConfigError(
            f"{key} is empty, as of a variable that is not set: name a folder, or leave {key} out"
        )
    if "\0" in text:
        raise ConfigError(f"{key}={text!r} holds a zero byte: no path can")
    if not text.startswith("~"):
        return text
    home = os.path.expanduser(text)
    if home.startswith("~"):
        raise ConfigError(
            f"{key}={text}: there is no home of {text.partition('/')[0]}: write the path, or "
            f"./{text} for a folder of that name"
        )
    return home


def _value(config: Config, key: str) -> str | None:
    value: Any = config
    for part in key.split("."):
        value = getattr(value, part)
    return value


def _owner(raw: dict[str, Any], key: str) -> tuple[dict[str, Any], str]:
    """Return the mapping that holds a dotted key, and the key's last part."""
    *path, name = key.split(".")
    node: Any = raw
    for part in path:
        node = node.get(part) if isinstance(node, dict) else None
    return (node if isinstance(node, dict) else {}), name


def _scalar(path: Path, parts: list[str]) -> str | None:
    """Return the text of a key in a YAML file: with its groups before it, or those left out."""
    root = yaml.compose(path.read_bytes(), Loader=yaml.SafeLoader)
    for first in range(len(parts)):
        node = root
        for part in parts[first:]:
            inner = node.value if isinstance(node, yaml.MappingNode) else []
            node = next((value for key, value in inner if key.value == part), None)
        if isinstance(node, yaml.ScalarNode):
            return node.value
    return None


def _is_run(folder: str) -> bool:
    return (Path(folder) / "config.yaml").is_file()
