"""One override of Hydra's grammar: parsed; and text, quoted so that the grammar keeps it."""

import re
import shlex
import unicodedata

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException

from dist_train.config.schema import ConfigError

UNQUOTED = re.compile(r"[\w/+.$%*@?|:\-~ \t]", re.ASCII)  # what the grammar takes in plain text
KEY = re.compile(r"[+~]{0,2}[\w./@-]+", re.ASCII)


def parse_override(line: str) -> Override:
    """Parse `key=value`; plain text with letters beyond ASCII, as in a path, needs no quotes.

    What the grammar takes is never touched: only a line that it refuses is tried in quotes.

    Raises:
        ConfigError: it is no override; with how to write it.
    """
    key, _, value = line.partition("=")
    value = value.strip(" \t")
    is_setting = bool(value) and KEY.fullmatch(key) is not None
    try:
        return OverridesParser.create().parse_override(line)
    except HydraException:
        if is_setting and all(map(_is_plain, value)):
            return OverridesParser.create().parse_override(f"{key}={quoted(value)}")
    cure = "write key=value, like optim.lr=0.1"
    if is_setting and value[0] not in "[{\"'":
        cure += (
            "; text with other characters than the grammar's goes into quotes: "
            f"{shlex.quote(f'{key}={quoted(value)}')}"
        )
    raise ConfigError(f"{line!r} is no override: {cure}")


def quoted(text: str) -> str:
    """Return `text` as a value that the grammar reads as this very text."""
    # A backslash is itself, except in a row that ends at a quote: there each one is doubled.
    escaped = re.sub(r'(\\*)("|\Z)', lambda m: m[1] * 2 + ('\\"' if m[2] else ""), text)
    return f'"{escaped}"'


def _is_plain(character: str) -> bool:
    if character.isascii():
        return UNQUOTED.fullmatch(character) is not None
    return unicodedata.category(character)[0] in "LMN"  # letters, their marks, numbers
