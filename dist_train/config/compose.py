"""Compose a Config from the schema's defaults, YAML groups and overrides with Hydra's compose API.

No `@hydra.main`: nothing is written, the working directory stays, nothing is instantiated.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from hydra.types import RunMode
from hydra.version import VersionBase
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from dist_train.config.augmentation import DECIDED_BY, with_own_settings
from dist_train.config.check import check
from dist_train.config.earlier import filled
from dist_train.config.layers import (
    CALLED,
    MAPPINGS,
    Layer,
    arguments_for_any,
    keep_own_arguments,
    layers_of,
    put_on_top,
    with_packages,
)
from dist_train.config.overrides import parse_override, quoted
from dist_train.config.redact import learn, mask, redact
from dist_train.config.schema import Config, ConfigError
from dist_train.config.text import as_typed, restore_texts, texts_read_as_numbers, with_folders
from dist_train.config.typed import build, did_you_mean, flatten, leaves, plain, unknown_key
from dist_train.config.yaml_limits import check_yaml

# Names in Hydra's store, which a program may use for its own: no common ones.
SCHEMA, MAIN = "dist_train_schema", "dist_train_main"
FIRST = {"model": "resnet9", "data": "auto", "optim": "sgd", "experiment": "cifar10_resnet9"}
NO_EXPERIMENT = Config().experiment
NO_SETTINGS = "cluster"  # a folder beside the groups: what a job asks SLURM for
BUNDLED = Path(__file__).parents[1] / "_configs"  # in an installed wheel
CHECKOUT = Path(__file__).parents[2] / "configs"  # in a checkout


@dataclass(frozen=True, kw_only=True, slots=True)
class Composed:
    """A checked configuration and where each of its values came from."""

    config: Config
    origins: dict[str, str]  # dotted key -> a file | "command line"; empty if not asked for


def compose(
    overrides: list[str],
    *,
    config_dir: Path | None = None,
    config_file: Path | None = None,
    explain: bool = False,
) -> Composed:
    """Compose and check the configuration of a run.

    Args:
        overrides: `key=value` or `group=choice` in Hydra's grammar.
        config_dir: the user's own groups, searched before the bundled ones.
        config_file: start from this resolved config.yaml instead of the groups.
        explain: also find out where each value comes from, which takes as long again.

    Raises:
        ConfigError: one line: what is wrong, where, and the nearest right thing.
    """
    folders = [f for f in (config_dir, BUNDLED if BUNDLED.is_dir() else CHECKOUT) if f]
    if config_dir and not config_dir.is_dir():
        raise ConfigError(f"--config-dir {config_dir} is not a folder")
    if config_dir:
        _check_groups(config_dir)
    groups = _groups(folders) if config_file is None else {}
    parsed = [_parsed(o, groups, config_file) for o in overrides]
    choices = {o.key_or_group: str(o.value()) for o in parsed if o.key_or_group in groups}
    experiment = choices.get("experiment", FIRST["experiment"])
    with_experiment = experiment in groups.get("experiment", [])
    singles = [o for o in parsed if o.key_or_group not in groups]
    lines = [
        o.input_line or ""
        for o in parsed
        if o.key_or_group in groups and (with_experiment or o.key_or_group != "experiment")
    ]
    store = ConfigStore.instance()
    store.store(name=SCHEMA, node=plain(Config()))
    main = _main(groups, config_file, with_experiment=with_experiment)
    store.store(name=MAIN, node=main)
    try:
        with _hydra_in(folders):
            lines.append(f"hydra.searchpath=[{quoted(f'file://{folders[-1].resolve()}')}]")
            raw: dict[str, Any] = OmegaConf.to_container(hydra_compose(MAIN, lines))  # type: ignore[assignment] # a mapping
            layers: list[Layer] = []
            own_words = config_dir is not None or CALLED.keys() & choices.keys()
            if explain or own_words or texts_read_as_numbers(raw):
                loader = GlobalHydra.instance().config_loader()
                entries = loader.compute_defaults_list(MAIN, lines, RunMode.RUN).defaults
                layers = layers_of(entries, folders)
        if config_file is None:
            raw["experiment"] = experiment if with_experiment else NO_EXPERIMENT
        origins = _origins(layers, config_file)
        restore_texts(raw, origins)
        if own_words:
            keep_own_arguments(raw, layers, choices)
        written = main if config_file is not None else {}
        put_on_top(raw, singles, arguments_for_any(written, layers, config_dir))
        _refuse_resolvers(raw)
    except (HydraException, OmegaConfBaseException, YAMLError) as error:
        raise ConfigError(" ".join(str(error).split())) from None
    try:
        resolved = OmegaConf.to_container(OmegaConf.create(raw), resolve=True)
        config = with_folders(build(Config, resolved))  # type: ignore[arg-type] # a mapping
    except OmegaConfBaseException as error:
        raise ConfigError(" ".join(str(error).split())) from None
    own = {o.key_or_group for o in parsed} | _own_keys(layers, config_dir, main)
    config = with_own_settings(config, own)
    check(config)
    learn(config)
    if explain:
        origins |= _of_command_line(singles)
    return Composed(config=config, origins=origins if explain else {})


def describe(composed: Composed) -> str:
    """Return the configuration as YAML lines, each with where its value came from."""
    rows = []
    for key, secret in flatten(composed.config).items():
        value = mask(plain(secret), key)
        text = OmegaConf.to_yaml(OmegaConf.create({"v": value}), resolve=False)
        shown = text[3:].strip() if "\n" not in text.strip() else str(value)
        rows.append((f"{key}: {shown}", composed.origins.get(key, "default")))
    width = min(60, max(len(row) for row, _ in rows))
    return "\n".join(f"{row:<{width}}  # {origin}" for row, origin in rows)


def to_yaml(config: Config) -> str:
    """Return the resolved configuration as YAML, ready for --config but for its secrets."""
    return OmegaConf.to_yaml(OmegaConf.create(redact(plain(config))))


def _groups(folders: list[Path]) -> dict[str, list[str]]:
    found: dict[str, set[str]] = {}
    for folder in folders:
        for path in folder.glob("*/*.yaml"):
            if path.parent.name != NO_SETTINGS:
                found.setdefault(path.parent.name, set()).add(path.stem)
    return {group: sorted(names) for group, names in found.items()}


def _check_groups(config_dir: Path) -> None:
    for path in sorted(config_dir.glob("*/*.yaml")):
        try:
            check_yaml(path, str(path))
        except (OSError, YAMLError) as error:
            raise ConfigError(f"{path}: {' '.join(str(error).split())}") from None


@contextlib.contextmanager
def _hydra_in(folders: list[Path]) -> Iterator[None]:
    """Use Hydra's compose API in a program that may use Hydra itself: its state comes back."""
    theirs, version = GlobalHydra.instance().hydra, VersionBase.instance().version_base
    GlobalHydra.instance().clear()
    try:
        with (
            with_packages(folders[0]) as first,
            initialize_config_dir(str(first.resolve()), version_base="1.3"),
        ):
            yield
    finally:
        GlobalHydra.instance().hydra = theirs
        VersionBase.instance().version_base = version


def _main(
    groups: dict[str, list[str]], config_file: Path | None, *, with_experiment: bool
) -> dict[str, Any]:
    if config_file is None:
        first = FIRST if with_experiment else {g: c for g, c in FIRST.items() if g != "experiment"}
        chosen = [{group: choice} for group, choice in first.items() if group in groups]
        return {"defaults": [SCHEMA, *chosen]}
    try:
        check_yaml(config_file, f"--config {config_file}")
        loaded = OmegaConf.load(config_file)
    except (OSError, OmegaConfBaseException, YAMLError) as error:
        raise ConfigError(f"--config {config_file}: {' '.join(str(error).split())}") from None
    if not isinstance(loaded, DictConfig):
        raise ConfigError(f"--config {config_file} is no mapping of settings")
    values: dict[str, Any] = OmegaConf.to_container(loaded)  # type: ignore[assignment] # a mapping
    return {"defaults": [SCHEMA, "_self_"], **filled(values)}


def _parsed(line: str, groups: dict[str, list[str]], config_file: Path | None) -> Override:
    """Parse one override and check its key, so that a slip is answered with the nearest key."""
    for group, names in groups.items():
        if line in names:
            raise ConfigError(f"{line!r} is no override: write {group}={line}")
    override = parse_override(line)
    key = override.key_or_group
    value = override.value()
    if override.is_sweep_override():
        raise ConfigError(
            f"{line} is a sweep: one run takes one value; dist-train submit takes several, "
            "and makes a run of each"
        )
    if "${" in line:
        _refuse_resolvers({key: override.value()})
    if key == "experiment" and key in groups and (override.is_delete() or value == "none"):
        return parse_override("experiment=none")
    if key in groups and not override.is_delete():
        if value not in groups[key]:
            known = [*groups[key], *(["none"] if key == "experiment" and value else [])]
            raise ConfigError(f"{line} does not exist{did_you_mean(str(value), known)}")
        return override
    if override.package is not None:
        raise ConfigError(unknown_key(f"{key}@{override.package}", groups))
    owner = next((k for k in MAPPINGS if f"{key}.".startswith(f"{k}.")), None)
    if owner is not None and all(key.split(".")):  # model.args.width=64 needs no "+"
        return override
    if override.is_delete():
        raise ConfigError(f"{line} deletes a setting, which cannot be: write {key}=VALUE")
    known = dict(leaves(Config))
    if key == NO_SETTINGS:
        raise ConfigError(
            f"{line} is no setting of a run: it belongs to dist-train submit --cluster {value}"
        )
    if config_file is not None and key in ("model", "data", "optim", "experiment"):
        raise ConfigError(f"{line}: groups are not used with --config; set single keys instead")
    if key not in known:
        raise ConfigError(unknown_key(key, groups))
    return as_typed(override, known[key])


def _refuse_resolvers(values: Any, key: str = "") -> None:
    """Refuse ${oc.env:X}, ${now:...}: they would differ between ranks or store a secret."""
    if isinstance(values, dict):
        for name, value in values.items():
            _refuse_resolvers(value, f"{key}.{name}" if key else str(name))
    elif isinstance(values, list):
        for value in values:
            _refuse_resolvers(value, key)
    elif isinstance(values, str) and "${" in values and ":" in values.split("${", 1)[1]:
        raise ConfigError(
            f"{key}: {values} reads the environment, the time or a file; "
            f"only ${{other.key}} is allowed. Let the shell fill it in: {key}=$VALUE"
        )


def _own_keys(layers: list[Layer], config_dir: Path | None, main: dict[str, Any]) -> set[str]:
    """Return the dotted keys that the user's own files set, and not one of those here.

    Of a --config, whose values `main` holds, none whose meaning it names, too: decided there.
    """
    keys = set(_dotted(OmegaConf.create({k: v for k, v in main.items() if k != "defaults"})))
    keys -= {key for key, decided_by in DECIDED_BY.items() if decided_by in keys}
    for layer in layers:
        if config_dir is not None and config_dir in layer.path.parents:
            keys |= {f"{layer.prefix}{key}" for key in _dotted(OmegaConf.load(layer.path))}
    return keys


def _origins(layers: list[Layer], config_file: Path | None) -> dict[str, str]:
    """Map every key that a file set to that file; later ones win, as in Hydra."""
    origins: dict[str, str] = {}
    if config_file is not None:
        origins |= dict.fromkeys(_dotted(OmegaConf.load(config_file)), str(config_file))
    for layer in layers:
        keys = _dotted(OmegaConf.load(layer.path))
        origins |= {f"{layer.prefix}{key}": str(layer.path) for key in keys}
    return origins


def _of_command_line(overrides: list[Override]) -> dict[str, str]:
    return {
        key: "command line"
        for key, _ in leaves(Config)
        for o in overrides
        if o.key_or_group == key or (key in MAPPINGS and o.key_or_group.startswith(f"{key}."))
    }


def _dotted(values: Any) -> list[str]:
    flat = {k for k, _ in leaves(Config)}
    container = OmegaConf.to_container(values)
    found: list[str] = []

    def walk(node: Any, prefix: str) -> None:
        for key, value in node.items() if isinstance(node, dict) else ():
            name = f"{prefix}{key}"
            if isinstance(value, dict) and name not in flat:
                walk(value, f"{name}.")
            else:
                found.append(name)

    walk(container, "")
    return found
