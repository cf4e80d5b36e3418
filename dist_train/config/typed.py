"""Turn plain mappings into the schema's dataclasses, naming the key of whatever does not fit."""

import dataclasses
import difflib
import types
from collections.abc import Iterable, Iterator
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from dist_train.config.schema import Config, ConfigError
from dist_train.config.synonyms import option_for, setting_for
from dist_train.config.value_synonyms import FORMER_VALUES, value_for

MOST_SHOWN = 6  # keys of a group

_NAMES: dict[Any, str] = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
}


def build(cls: type, values: dict[str, Any], prefix: str = "") -> Any:
    """Make a frozen dataclass `cls` of `values`, checking keys and types all the way down.

    Raises:
        ConfigError: an unknown key or a value of another type; says the nearest right one.
    """
    hints = get_type_hints(cls)
    for key in values:
        if key not in hints:
            raise ConfigError(unknown_key(f"{prefix}{key}"))
    made = {k: convert(hints[k], v, f"{prefix}{k}") for k, v in values.items()}
    return cls(**made)


def unknown_key(key: str, groups: Iterable[str] = ()) -> str:
    """Say that `key` is none of ours, with the key, group or option that is meant."""
    keys, last = [k for k, _ in leaves(Config)], key.rpartition(".")[2]
    meant, option = setting_for(key), option_for(key)
    if meant is None and not any(k.rpartition(".")[2] == last for k in keys):
        meant, option = setting_for(last), option or option_for(last)
    if meant is not None:
        setting, _, remark = meant.partition(" ")
        return f"unknown key {key!r}: did you mean {setting}?" + (f" ({remark})" if remark else "")
    if option is not None:
        return f"unknown key {key!r}: it is no setting but an option: dist-train run {option}"
    within = [k for k in keys if k.startswith(f"{key}.")]
    if within:
        shown = ", ".join(within[:MOST_SHOWN]) + (" ..." if len(within) > MOST_SHOWN else "")
        return f"unknown key {key!r}: it is a group of settings: {shown}"
    hint = did_you_mean(key, [*groups, *keys])
    return f"unknown key {key!r}{hint or ': --print-config lists all'}"


def did_you_mean(word: str, choices: list[str]) -> str:
    """Return ': did you mean X?' for the nearest of `choices`, else the list of them if short."""
    last = word.rsplit(".", 1)[-1]
    same = [c for c in choices if c.rsplit(".", 1)[-1] == last]
    near = difflib.get_close_matches(word, same, 1, 0.0)
    near = near or difflib.get_close_matches(word, choices, 1, 0.6)
    near = near or [
        c
        for c in choices
        if difflib.SequenceMatcher(None, c.rsplit(".", 1)[-1], last).ratio() > 0.75
    ]
    if near:
        return f": did you mean {near[0]}?"
    return f": choose one of {', '.join(choices)}" if len(choices) <= 12 else ""


def leaves(cls: type, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (dotted key, type) of every setting below a dataclass type."""
    for name, hint in get_type_hints(cls).items():
        if dataclasses.is_dataclass(hint) and isinstance(hint, type):
            yield from leaves(hint, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", hint


def flatten(config: Any, prefix: str = "") -> dict[str, Any]:
    """Return {dotted key: value} of a dataclass; a dict-valued setting stays whole."""
    flat: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            flat |= flatten(value, f"{prefix}{field.name}.")
        else:
            flat[f"{prefix}{field.name}"] = value
    return flat


def plain(value: Any) -> Any:
    """Turn dataclasses and tuples into dicts and lists, ready for YAML or JSON."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items()}
    return [plain(v) for v in value] if isinstance(value, list | tuple) else value


def convert(hint: Any, value: Any, key: str) -> Any:
    """Return `value` as the type `hint`, or raise ConfigError naming `key`."""
    origin = get_origin(hint)
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        if not isinstance(value, dict):
            raise ConfigError(f"{key} is a group of settings, not {value!r}: set {key}.<name>=...")
        return build(hint, value, f"{key}.")
    if origin in (Union, types.UnionType):
        if value is None and type(None) in get_args(hint):
            return None
        inner = [a for a in get_args(hint) if a is not type(None)]
        words = [word for a in inner if get_origin(a) is Literal for word in get_args(a)]
        others = [a for a in inner if get_origin(a) is not Literal]
        assert len(inner) == 1 or len(others) == 1, f"only `X | 'word' | None`: {key}"
        if value in words and others:
            return value
        known = isinstance(value, bool) and bool in others
        if words and others and isinstance(value, str | bool) and not known:
            wanted = f"{_NAMES.get(others[0], 'a list')} or {' or '.join(words)}"
            raise _wrong(key, value, wanted + value_for(key, value, words))
        return convert((others or inner)[0], value, key)
    if origin is Literal:
        value = FORMER_VALUES.get(key, {}).get(str(value), value)
        if value in get_args(hint):
            return value
        choices = ", ".join(str(a) for a in get_args(hint))
        hint = value_for(key, value, get_args(hint))
        raise ConfigError(f"{key}={value} is not a choice: choose one of {choices}{hint}")
    if origin is tuple:
        items = get_args(hint)
        if not isinstance(value, list | tuple):
            raise _wrong(key, value, f"a list like {key}=[...]")
        if items[-1] is not Ellipsis and len(value) != len(items):
            raise _wrong(key, value, f"a list of {len(items)} values")
        return tuple(convert(items[0], v, f"{key}[{i}]") for i, v in enumerate(value))
    if origin is dict:
        if not isinstance(value, dict):
            raise _wrong(key, value, f"a mapping: set {key}.<name>=...")
        return {str(k): v for k, v in value.items()}
    return _scalar(hint, value, key)


def _scalar(hint: Any, value: Any, key: str) -> Any:
    if hint is bool and isinstance(value, bool):
        return value
    if hint is int and isinstance(value, int) and not isinstance(value, bool):
        return value
    if hint is int and isinstance(value, float) and value.is_integer():
        return int(value)
    if hint is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    if hint is str and isinstance(value, str | int | float) and not isinstance(value, bool):
        return str(value)
    raise _wrong(key, value, _NAMES[hint])


def _wrong(key: str, value: Any, wanted: str) -> ConfigError:
    shown = "null" if value is None else value
    return ConfigError(f"{key}={shown} has the wrong type: it must be {wanted}")
