"""Put the layers of settings together: what groups set, what arguments belong to, what is typed.

Hydra composes the groups; single settings of the command line are put on top of them here.
"""

import contextlib
import copy
import re
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.core.override_parser.types import Override
from omegaconf import OmegaConf

from dist_train.config.schema import Config, ConfigError
from dist_train.config.typed import leaves

EXPERIMENT = "experiment"
PACKAGE = re.compile(r"\A(?:[ \t]*(?:#.*)?\n)*# *@package ")
MAPPINGS = tuple(key for key, hint in leaves(Config) if "dict" in str(hint))
CALLED = {"model": "factory", "data": "name"}  # what the args of a group are for


@dataclass(frozen=True, kw_only=True, slots=True)
class Layer:
    """One file that sets something."""

    group: str  # "" for none
    path: Path
    prefix: str  # of its keys, with a dot at the end


def layers_of(entries: list[Any], folders: list[Path]) -> list[Layer]:
    """Return the files of Hydra's list of defaults, in order: later ones win."""
    found = []
    for entry in entries:
        for folder in folders:
            path = folder / f"{entry.config_path}.yaml"
            if not entry.config_path or not path.is_file():
                continue
            group = str(Path(entry.config_path).parent)
            prefix = f"{entry.package}." if entry.package else ""
            found.append(Layer(group=group, path=path, prefix=prefix))
            break
    return found


@contextlib.contextmanager
def with_packages(config_dir: Path) -> Iterator[Path]:
    """Yield a user's folder, or one like it whose experiments all set what their keys name.

    Hydra wants "# @package _global_" at the beginning of such a file.
    """
    experiments = sorted((config_dir / EXPERIMENT).glob("*.yaml"))
    texts = {path: path.read_text(encoding="utf-8") for path in experiments}
    bare = [path for path, text in texts.items() if not PACKAGE.search(text)]
    if not bare:
        yield config_dir
        return
    with tempfile.TemporaryDirectory(prefix="dist-train-") as name:
        (Path(name) / EXPERIMENT).mkdir()
        for path in [*config_dir.iterdir(), *(config_dir / EXPERIMENT).iterdir()]:
            twin = Path(name) / path.relative_to(config_dir)
            if path in bare:
                twin.write_text(f"# @package _global_\n{texts[path]}", encoding="utf-8")
            elif path != config_dir / EXPERIMENT:
                twin.symlink_to(path.resolve())
        yield Path(name)


def keep_own_arguments(raw: dict[str, Any], layers: list[Layer], chosen: dict[str, str]) -> None:
    """Drop the arguments that came for another model or data set than the one in force.

    That is the one of the group's choice on the command line, if there is one, also where an
    experiment names its own.

    Args:
        raw: the settings that groups have made, not yet resolved.
        layers: the files that made them.
        chosen: {group: choice} of the command line: the last word on what is built.
    """
    for owner, selector in CALLED.items():
        called, arguments = None, {}
        for layer in layers:
            values: Any = OmegaConf.to_container(OmegaConf.load(layer.path))
            own = _of_group(values, layer, owner)
            made_for = _choice_in(values, owner) if layer.group == "experiment" else None
            if layer.group == "experiment" and owner in chosen and made_for != chosen[owner]:
                continue
            name = own.get(selector, called)
            if name != called:
                called, arguments = name, {}
            if isinstance(own.get("args"), dict):
                arguments = merged(arguments, own["args"])
        raw[owner]["args"] = arguments
        if owner in chosen and called is not None:
            raw[owner][selector] = called


def arguments_for_any(
    config_file: dict[str, Any], layers: list[Layer], config_dir: Path | None
) -> dict[str, dict[str, Any]]:
    """Return {"model" | "data": args} that a user's own files give and do not say what for.

    They are for whatever the command names.

    Args:
        config_file: the settings of --config, empty without.
        layers: the files of groups, of which those below `config_dir` are the user's.
        config_dir: the user's own groups.
    """
    found: dict[str, dict[str, Any]] = {}
    for owner, selector in CALLED.items():
        owned = [_of_group(config_file, Layer(group="", path=Path(), prefix=""), owner)]
        for layer in layers:
            if config_dir is not None and config_dir in layer.path.parents:
                values = OmegaConf.to_container(OmegaConf.load(layer.path))
                owned.append(_of_group(values, layer, owner))
        found[owner] = {}
        for own in owned:
            if selector in own:
                found[owner] = {}
            elif isinstance(own.get("args"), dict):
                found[owner] = merged(found[owner], own["args"])
    return found


def put_on_top(
    raw: dict[str, Any], overrides: list[Override], for_any: dict[str, dict[str, Any]]
) -> None:
    """Set the single settings of the command line, in their order.

    Another model.factory or data.name begins without the arguments of the one before, but for
    those that belong to none (`for_any`); a mapping given whole replaces what was there, and
    ~model.args.x takes one out.

    Raises:
        ConfigError: there is no such argument to take out.
    """
    for owner, selector in CALLED.items():
        given = [o.value() for o in overrides if o.key_or_group == f"{owner}.{selector}"]
        if given and given[-1] != raw[owner][selector]:
            raw[owner]["args"] = for_any[owner]
    for override in overrides:
        key, value = override.key_or_group, copy.deepcopy(override.value())
        *groups, name = key.split(".")
        node = raw
        for group in groups:
            inner = node.get(group)
            node[group] = node = inner if isinstance(inner, dict) else {}
        if not override.is_delete():
            node[name] = {} if key in MAPPINGS and value is None else value
        elif name in node:
            del node[name]
        else:
            there = f"only {', '.join(map(str, node))}" if node else "nothing at all"
            raise ConfigError(
                f"~{key} takes {name!r} out of {'.'.join(groups)}, which holds {there}: leave "
                f"~{key} away"
            )


def merged(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """Return two mappings as one, mappings in them merged too; the second wins."""
    both = OmegaConf.merge(OmegaConf.create(below), OmegaConf.create(above))
    return OmegaConf.to_container(both)  # type: ignore[return-value] # a mapping


def _of_group(values: Any, layer: Layer, owner: str) -> dict[str, Any]:
    """Return what a file's values set of a group of settings."""
    if not layer.prefix:
        values = values.get(owner) if isinstance(values, dict) else None
    elif layer.prefix != f"{owner}.":
        values = None
    return values if isinstance(values, dict) else {}


def _choice_in(values: Any, group: str) -> str | None:
    """Return which choice of a group a file of settings asks for by itself."""
    for entry in values.get("defaults", ()) if isinstance(values, dict) else ():
        if isinstance(entry, dict) and f"override /{group}" in entry:
            return entry[f"override /{group}"]
    return None
