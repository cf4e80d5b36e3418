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
    parsed = _tried(line)
    if parsed is not None:
        return parsed
    in_quotes = None
    if value and KEY.fullmatch(key) is not None and value[0] not in "[{\"'":
        in_quotes = f"{key}={quoted(value)}"
    parsed = None if in_quotes is None else _tried(in_quotes)
    if parsed is not None and all(map(_is_plain, value)):
        return parsed
    cure = "write key=value, like optim.lr=0.1"
    if any(not character.isprintable() for character in value):
        cure += ", on one line and without control characters"
    elif parsed is not None and in_quotes is not None:
        cure += (
            "; text with other characters than the grammar's goes into quotes: "
            f"{shlex.quote(in_quotes)}"
        )
    raise ConfigError(f"{line!r} is no override: {cure}")


def _tried(line: str) -> Override | None:
    try:
        return OverridesParser.create().parse_override(line)
    except HydraException:
        return None


def quoted(text: str) -> str:
    """Return `text` as a value that the grammar reads as this very text."""
    # A backslash is itself, except in a row that ends at a quote: there each one is doubled.
    escaped = re.sub(r'(\\*)("|\Z)', lambda m: m[1] * 2 + ('\\"' if m[2] else ""), text)
    return f'"{escaped}"'


def _is_plain(character: str) -> bool:
    if character.isascii():
        return UNQUOTED.fullmatch(character) is not None
    return unicodedata.category(character)[0] in "LMN"  # letters, their marks, numbers
