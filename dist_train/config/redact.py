"""Keep secrets out of what a run writes: settings, the command, status, events, logs, trackers.

A secret is a value under a key that says so (`model.args.api_key`), the password of a URL, or the
value of such an environment variable wherever it turns up. Imports no torch.
"""

import json
import os
import re
from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import Any
from urllib.parse import quote

from dist_train.config.schema import Config, ConfigError
from dist_train.config.typed import plain

MASK = "[redacted]"
MIN_LENGTH = 8  # of a value that is looked for in text: a shorter one is in many words
LONE_USER_LENGTH = 16  # a user of a URL without a password, but as long as a token

_ANYWHERE = ("password", "passwd", "passphrase", "secret", "credential", "apikey")
_PAIRS = ("api_key", "access_key", "private_key", "auth_key", "signing_key", "encryption_key")
_NO_SECRET = ("file", "path", "dir", "env", "name", "type", "length")  # api_key_file, secret_name
_CAMEL = re.compile(r"(?<=[a-z0-9])(?=[A-Z])")
_WITH_PASSWORD = re.compile(r"(\b[A-Za-z][\w+.-]*://[^\s/:@]*):([^\s/@]+)@")
_LONE_USER = re.compile(rf"(\b[A-Za-z][\w+.-]*://)[^\s/:@]{{{LONE_USER_LENGTH},}}@")
_ASSIGNED = re.compile(r"([\w.\-]+)(=)(\"[^\"]*\"|'[^']*'|[^\s,;&}\])\"']+)")
_IN_MAPPING = re.compile(r"([\w\-]+)(\s*:\s*)(\"[^\"]*\"|'[^']*'|[^\s,}\]]+)")

# The one state of this module: text is written far from where the settings are known.
_of_settings: set[str] = set()


@lru_cache(maxsize=4096)
def is_secret(key: str) -> bool:
    """Say whether a setting, an option or an environment variable by this name holds a secret."""
    name = _CAMEL.sub("_", key.rsplit(".", 1)[-1]).lower().replace("-", "_").strip("_")
    words = [word for word in name.split("_") if word]
    if not words or words[-1] in _NO_SECRET:
        return False
    if any(part in name for part in (*_ANYWHERE, *_PAIRS)):
        return True
    return words[-1] == "token" or (len(words) > 1 and words[-1] in ("pwd", "pat"))


def learn(config: Config) -> None:
    """Let `redact` find the secrets of these settings in any text of this process, from now on."""
    _of_settings.update(_values(plain(config), ""))


def mask(value: Any, key: str = "") -> Any:
    """Return plain values without what keys and URLs show to be secret: the same everywhere."""
    if isinstance(value, Mapping):
        return {k: mask(v, str(k)) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [mask(v, key) for v in value]
    if is_secret(key) and _can_be_secret(value, key):
        return MASK
    if not isinstance(value, str):
        return value
    text = _WITH_PASSWORD.sub(rf"\1:{MASK}@", value)
    return _LONE_USER.sub(rf"\1{MASK}@", text)


def redact(value: Any, key: str = "") -> Any:
    """Return plain values or a text without secrets: those of `mask`, and known ones anywhere."""
    return _without(mask(value, key), _known())


def redact_words(words: Iterable[str]) -> list[str]:
    """Return a command line without secrets: key=value, {key: value} and --option value."""
    shown: list[str] = []
    for word in words:
        before = shown[-1] if shown else ""
        if before.startswith("--") and "=" not in before and is_secret(before):
            shown.append(MASK)
            continue
        key, equals, value = word.partition("=")
        if equals and is_secret(key.lstrip("+~")) and _can_be_secret(value, key):
            shown.append(f"{key}={MASK}")
        else:
            shown.append(_IN_MAPPING.sub(_masked, redact(word)))
    return shown


def refuse_redacted(config: Config) -> None:
    """Raise ConfigError if a setting was redacted where it comes from, as in a run's config.yaml.

    Such a file tells that there was a secret, not which.
    """
    for key in _redacted_keys(plain(config), ""):
        raise ConfigError(
            f"{key} is {MASK}: it is a secret, and no file of a run holds it; give it again: "
            f"{key}=VALUE"
        )


def _redacted_keys(value: Any, key: str) -> Iterable[str]:
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from _redacted_keys(inner, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list):
        for inner in value:
            yield from _redacted_keys(inner, key)
    elif isinstance(value, str) and MASK in value:
        yield key


def _can_be_secret(value: Any, key: str) -> bool:
    """Say whether it is a value to hide; a number of tokens, a switch or nothing is none."""
    if value is None or isinstance(value, bool) or value in ("", MASK):
        return False
    number = isinstance(value, int | float) or str(value).isdigit()
    switch = str(value).lower() in ("true", "false", "null", "none")
    return not switch and not (number and key.lower().endswith("token"))


def _known() -> list[str]:
    """Return the secrets of the environment and the settings, the longest first."""
    found = set(_of_settings)
    found.update(_values(dict(os.environ), ""))
    return sorted(found, key=len, reverse=True)


def _values(value: Any, key: str) -> Iterable[str]:
    """Yield the secrets of plain values, in each form in which they turn up in text."""
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from _values(inner, str(name))
        return
    if isinstance(value, list):
        for inner in value:
            yield from _values(inner, key)
        return
    secrets = [str(value)] if is_secret(key) and _can_be_secret(value, key) else []
    if isinstance(value, str) and "://" in value:
        secrets += [match.group(2) for match in _WITH_PASSWORD.finditer(value)]
    for secret in secrets:
        if len(secret) >= MIN_LENGTH and secret != MASK:
            yield from {secret, repr(secret)[1:-1], json.dumps(secret)[1:-1], quote(secret, "")}


def _without(value: Any, secrets: list[str]) -> Any:
    if isinstance(value, dict):
        return {k: _without(v, secrets) for k, v in value.items()}
    if isinstance(value, list):
        return [_without(v, secrets) for v in value]
    if not isinstance(value, str):
        return value
    for secret in secrets:
        value = value.replace(secret, MASK)
    return _ASSIGNED.sub(_masked, value)


def _masked(match: re.Match[str]) -> str:
    key, between, value = match.groups()
    if not is_secret(key) or not _can_be_secret(value.strip("\"'"), key) or MASK in value:
        return match.group(0)
    return f"{key}{between}{MASK}"
