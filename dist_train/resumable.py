"""Can what a run saves be loaded again? Tried when it begins, on a second model without numbers."""

import contextlib
import random
import warnings
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import nn

from dist_train.buffers import Buffers
from dist_train.build import build_model
from dist_train.config import Config, ConfigError
from dist_train.distributed import Ranks
from dist_train.plain_state import plain
from dist_train.weights import load_weights

CURE = (
    "Make parameters, modules and buffers in __init__, let the factory give the same model each "
    "time, and let load_state_dict (set_extra_state) take what state_dict (get_extra_state) gives"
)


def try_loading(
    state: dict[str, Any], config: Config, num_classes: int, ranks: Ranks
) -> str | None:
    """Load a state into a model made anew; returns a warning where that cannot be tried.

    The second model is on the meta device, where it has no memory; in host memory if its code
    needs numbers. No random generator moves. Not collective: one rank speaks for all.

    Raises:
        ConfigError: a checkpoint of this run could never be loaded; says why.
    """
    factory = config.model.factory
    held = plain(state, lambda tensor, _: tensor)
    with _generators_kept(ranks.device), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # they were told of the first model
        with contextlib.suppress(Exception):  # its code may need numbers: it gets them below
            with torch.device("meta"):
                fresh = build_model(config, num_classes, _on(ranks, "meta"))
            _load(fresh, held)
            return None
        try:
            fresh = build_model(config, num_classes, _on(ranks, "cpu"))
        except Exception as error:
            return f"that this run can be continued is not proven: called a second time, {error}"
        try:
            _load(fresh, held)
        except Exception as error:
            raise _refused(factory, _reason(error)) from error
    return None


def _load(fresh: nn.Module, held: dict[str, Any]) -> None:
    load_weights(fresh, Buffers(fresh), held)


def _on(ranks: Ranks, device: str) -> Ranks:
    return replace(ranks, device=torch.device(device))


def _reason(error: Exception) -> str:
    """Return what a failed load_state_dict says, in a line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if isinstance(error, RuntimeError) and len(lines) > 1:  # the first names the class alone
        return " ".join(lines[1:])[:400]
    return f"{type(error).__name__}: {' '.join(lines)}"[:400]


def _refused(factory: str, why: str) -> ConfigError:
    return ConfigError(
        f"a checkpoint of model.factory={factory} could never be loaded again: {why}. {CURE}"
    )


@contextlib.contextmanager
def _generators_kept(device: torch.device) -> Iterator[None]:
    """Leave all global random generators as they are, whatever a factory draws."""
    of_python, of_numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        try:
            yield
        finally:
            random.setstate(of_python)
            np.random.set_state(of_numpy)
