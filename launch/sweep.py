"""Several runs of one command: `optim.lr=0.1,0.2 seed=range(3)` in Hydra's grammar is six.

Every combination is composed and checked, and each gets a run folder of its own.
"""

import argparse
import copy
import dataclasses
import hashlib
import re
from dataclasses import dataclass
from pathlib import Path

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException

from dist_train.config import Config, ConfigError
from dist_train.config.arguments import compose_request, words_of
from dist_train.config.identity import run_dir_of
from dist_train.config.overrides import parse_override, quoted

LONGEST_NAME = 120  # of a folder; file systems end at 255 bytes


@dataclass(frozen=True, kw_only=True, slots=True)
class Element:
    """One run of a command."""

    config: Config
    words: tuple[str, ...]  # what its ranks are given
    overrides: tuple[str, ...] = ()  # what sets it apart from the others; empty: it is the only one

    @property
    def run_dir(self) -> Path:
        """Its folder."""
        return run_dir_of(self.config)


def elements_of(options: argparse.Namespace) -> list[Element]:
    """Compose every run that parsed options ask for; one, if nothing has several values.

    Raises:
        ConfigError: a value that cannot be, or two runs that would share a folder.
    """
    parsed = [parse_override(line) for line in options.overrides]
    swept = [override for override in parsed if override.is_sweep_override()]
    if not swept:
        request = compose_request(options)
        return [Element(config=request.config, words=tuple(words_of(options)))]
    spelt = {line: own for override in swept for line, own in _spelt(override).items()}
    elements = [
        _element(options, parsed, [spelt.get(line, line) for line in choice])
        for choice in _combined(swept)
    ]
    _refuse_shared_folders(elements)
    return elements


def _combined(swept: list[Override]) -> list[list[str]]:
    try:
        [combined] = BasicSweeper.split_arguments(swept, max_batch_size=None)
    except HydraException as error:  # interval(0, 1) has no values to list, glob(*) no folder
        lines = " ".join(override.input_line or "" for override in swept)
        raise ConfigError(
            f"{lines} cannot be listed ({error}): write the values, like optim.lr=0.1,0.2, or "
            "choice(...) or range(...)"
        ) from None
    return combined


def _spelt(override: Override) -> dict[str, str]:
    """Return {Hydra's spelling: the user's} of plain values: 1e30, not 1e+30."""
    key, _, values = (override.input_line or "").partition("=")
    lines = [f"{key}={value.strip()}" for value in values.split(",")]
    try:
        ones = [parse_override(line) for line in lines]
    except ConfigError:  # range(3), or a list with commas of its own
        return {}
    if any(one.is_sweep_override() for one in ones):
        return {}
    return {
        f"{o.get_key_element()}={o.get_value_element_as_str()}": o.input_line or "" for o in ones
    }


def _element(options: argparse.Namespace, parsed: list[Override], choice: list[str]) -> Element:
    mine, chosen = copy.copy(options), {line.partition("=")[0]: line for line in choice}
    mine.overrides = [
        chosen[o.get_key_element()] if o.is_sweep_override() else o.input_line for o in parsed
    ]
    try:
        config = compose_request(mine).config
    except ConfigError as error:
        raise ConfigError(f"{' '.join(choice)}: {error}") from None
    apart = [line for line in choice if not line.startswith("run_dir=")]
    if config.run_dir is not None and apart:
        folder = str(Path(config.run_dir) / folder_name(apart))
        mine.overrides.append(f"run_dir={quoted(folder)}")
        config = dataclasses.replace(config, run_dir=folder)
    return Element(config=config, words=tuple(words_of(mine)), overrides=tuple(choice))


def folder_name(overrides: list[str]) -> str:
    """Return a folder's name that tells of overrides: optim.lr-0.1+seed-2.

    Of characters that need no quotes in a shell or in `run_dir=...`.
    """
    text = "+".join(re.sub(r"[^\w.+-]+", "_", line.replace("=", "-", 1)) for line in overrides)
    if len(text) <= LONGEST_NAME:
        return text
    digest = hashlib.sha256("+".join(overrides).encode()).hexdigest()[:8]
    return f"{text[:LONGEST_NAME]}-{digest}"


def _refuse_shared_folders(elements: list[Element]) -> None:
    seen: dict[Path, Element] = {}
    for element in elements:
        other = seen.setdefault(element.run_dir, element)
        if other is not element:
            raise ConfigError(
                f"{' '.join(other.overrides)} and {' '.join(element.overrides)} would share the "
                f"run folder {element.run_dir}, as they differ in nothing that changes the result: "
                "leave one out, or give run_dir=DIR for a folder of each below it"
            )
