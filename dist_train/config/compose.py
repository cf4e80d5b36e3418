"""Compose a Config from the schema's defaults, YAML groups and overrides with Hydra's compose API.

No `@hydra.main`: nothing is written, the working directory stays, nothing is instantiated.
"""

from collections.abc import Mapping
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
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from dist_train.config.augmentation import with_own_parts
from dist_train.config.check import check
from dist_train.config.earlier import filled
from dist_train.config.overrides import parse_override, quoted
from dist_train.config.redact import learn, mask, redact
from dist_train.config.schema import Config, ConfigError
from dist_train.config.text import as_typed, restore_texts, texts_read_as_numbers, with_folders
from dist_train.config.typed import build, did_you_mean, flatten, leaves, plain, unknown_key
from dist_train.config.yaml_limits import check_yaml

SCHEMA = "schema_defaults"
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
    store = ConfigStore.instance()
    store.store(name=SCHEMA, node=plain(Config()))
    main = _main(groups, config_file)
    store.store(name="main", node=main)
    GlobalHydra.instance().clear()
    searchpath = f"hydra.searchpath=[{quoted(f'file://{folders[-1].resolve()}')}]"
    try:
        with initialize_config_dir(str(folders[0].resolve()), version_base="1.3"):
            lines = [searchpath, *(o.input_line or "" for o in parsed)]
            composed = hydra_compose("main", lines, return_hydra_config=True)
            origins = {}
            raw: dict[str, Any] = OmegaConf.to_container(composed)  # type: ignore[assignment] # a mapping
            del raw["hydra"]
            if explain or texts_read_as_numbers(raw):
                loader = GlobalHydra.instance().config_loader()
                files = loader.compute_defaults_list("main", lines, RunMode.RUN).defaults
                origins = _origins(parsed, files, folders, config_file)
    except (HydraException, OmegaConfBaseException, YAMLError) as error:
        raise ConfigError(" ".join(str(error).split())) from None
    restore_texts(raw, origins)
    _replace_whole_mappings(raw, parsed)
    _refuse_resolvers(raw)
    choices = composed.hydra.runtime.choices
    if "experiment" in groups and choices.get("experiment"):
        raw["experiment"] = choices.experiment
    try:
        resolved = OmegaConf.to_container(OmegaConf.create(raw), resolve=True)
        config = with_folders(build(Config, resolved))  # type: ignore[arg-type] # a mapping
    except OmegaConfBaseException as error:
        raise ConfigError(" ".join(str(error).split())) from None
    own = {o.key_or_group for o in parsed} | _own_keys(choices, config_dir, main)
    config = with_own_parts(config, own)
    check(config)
    learn(config)
    return Composed(config=config, origins=origins)


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


def _main(groups: dict[str, list[str]], config_file: Path | None) -> dict[str, Any]:
    if config_file is None:
        first = {"model": "resnet9", "data": "auto", "optim": "sgd"}
        chosen = [{g: c} for g, c in first.items() if c in groups.get(g, [])]
        return {"defaults": [SCHEMA, *chosen, {"experiment": "cifar10_resnet9"}]}
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
    override = parse_override(line)
    key = override.key_or_group
    value = override.value()
    if override.is_sweep_override():
        raise ConfigError(f"{line} is a sweep: one run takes one value; give several to a launcher")
    if override.is_delete():
        raise ConfigError(f"{line} deletes a setting, which cannot be: write {key}=VALUE")
    if "${" in line:
        _refuse_resolvers({key: override.value()})
    if key in groups:
        if value not in groups[key]:
            raise ConfigError(f"{line} does not exist{did_you_mean(str(value), groups[key])}")
        return override
    known = dict(leaves(Config))
    owners = [
        k for k, hint in known.items() if "dict" in str(hint) and f"{key}.".startswith(f"{k}.")
    ]
    if owners:  # model.args.width=64 needs no "+"
        return parse_override(f"++{line.lstrip('+~')}")
    if key == NO_SETTINGS:
        raise ConfigError(
            f"{line} is no setting of a run: it belongs to dist-train submit --cluster {value}"
        )
    if config_file is not None and key in ("model", "data", "optim", "experiment"):
        raise ConfigError(f"{line}: groups are not used with --config; set single keys instead")
    if key not in known:
        raise ConfigError(unknown_key(key, groups))
    return as_typed(override, known[key])


def _replace_whole_mappings(raw: dict[str, Any], overrides: list[Override]) -> None:
    """Let model.args={...} replace what a group set, and later model.args.x=1 add to it.

    Hydra would merge the two.
    """
    for owner in (key for key, hint in leaves(Config) if "dict" in str(hint)):
        mine = [o for o in overrides if f"{o.key_or_group}.".startswith(f"{owner}.")]
        whole = [i for i, o in enumerate(mine) if o.key_or_group == owner]
        if not whole:
            continue
        value = mine[whole[-1]].value()
        node = OmegaConf.create({"args": value if isinstance(value, dict) else {}})
        for override in mine[whole[-1] + 1 :]:
            OmegaConf.update(node, f"args{override.key_or_group[len(owner) :]}", override.value())
        group, name = owner.split(".")
        raw[group][name] = OmegaConf.to_container(node)["args"]  # type: ignore[index] # a mapping


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


def _own_keys(
    choices: Mapping[str, str], config_dir: Path | None, main: dict[str, Any]
) -> set[str]:
    """Return the dotted keys that the user's own files set, and not one of those here.

    Of a --config, whose values `main` holds, none where it names data.augment: it is decided there.
    """
    keys = set(_dotted(OmegaConf.create({k: v for k, v in main.items() if k != "defaults"})))
    if "data.augment" in keys:
        return set()
    for group, choice in choices.items() if config_dir is not None else ():
        folder, _, package = group.partition("@")
        path = Path(config_dir or "", folder, f"{choice}.yaml")
        if path.is_file():
            found = _dotted(OmegaConf.load(path))
            keys |= {*found, *(f"{package or folder}.{key}" for key in found)}
    return keys


def _origins(
    overrides: list[Override], files: list[Any], folders: list[Path], config_file: Path | None
) -> dict[str, str]:
    """Map every key that something set to that something; later ones win, as in Hydra."""
    origins: dict[str, str] = {}
    if config_file is not None:
        origins |= dict.fromkeys(_dotted(OmegaConf.load(config_file)), str(config_file))
    for entry in files:
        for folder in folders:
            path = folder / f"{entry.config_path}.yaml"
            if not entry.config_path or not path.is_file():
                continue
            prefix = f"{entry.package}." if entry.package else ""
            origins |= {f"{prefix}{k}": str(path) for k in _dotted(OmegaConf.load(path))}
            break
    for override in overrides:
        name = override.key_or_group
        hit = [
            k
            for k, h in leaves(Config)
            if name == k or ("dict" in str(h) and name.startswith(f"{k}."))
        ]
        origins |= dict.fromkeys(hit, "command line")
    return origins


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
