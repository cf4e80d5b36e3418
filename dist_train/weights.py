"""A module's weights as a state holds them, and back: with all that its load_state_dict needs."""

import copy
from collections import OrderedDict
from typing import Any

from torch import Tensor, nn

from dist_train.buffers import Buffers
from dist_train.config import ConfigError

ENTRIES = ("model", "model_metadata", "buffers_made")


def weights_of(module: nn.Module, buffers: Buffers) -> dict[str, Any]:
    """Return the entries of a state that hold the module; does not copy.

    They are its state dictionary; what that knows beside its tensors, the version of each module
    above all; and which buffers have another form than the factory gave them.
    """
    tensors = module.state_dict()
    return {
        "model": tensors,
        "model_metadata": dict(getattr(tensors, "_metadata", {})),
        "buffers_made": buffers.made(),
    }


def extra_states(module: nn.Module) -> list[tuple[nn.Module, Any]]:
    """Return a copy of what each part of the module keeps beside its tensors, for those that do."""
    kept = nn.Module.get_extra_state
    parts = [part for part in module.modules() if type(part).get_extra_state is not kept]
    return [(part, copy.deepcopy(part.get_extra_state())) for part in parts]


def put_extra_states(states: list[tuple[nn.Module, Any]]) -> None:
    """Put back what extra_states returned.

    Raises:
        ConfigError: a part of the module does not take it.
    """
    for part, state in states:
        try:
            part.set_extra_state(state)
        except Exception as error:
            raise ConfigError(
                f"{type(part).__name__}.set_extra_state does not take what get_extra_state gave "
                f"({type(error).__name__}: {error}): no checkpoint could ever be loaded again. "
                "Fix set_extra_state, or leave both out"
            ) from error


def load_weights(module: nn.Module, buffers: Buffers, state: dict[str, Any]) -> None:
    """Load what weights_of returned. Of a state without metadata it is the module's own.

    Raises:
        RuntimeError: it is of another module. A module's own code may raise anything else.
    """
    held: dict[str, Tensor] = state["model"]
    buffers.take_form(held, state.get("buffers_made", {}))
    metadata = state.get("model_metadata")
    if metadata is None:  # of before it was kept
        metadata = getattr(module.state_dict(), "_metadata", {})
    tensors = OrderedDict(held)
    tensors._metadata = OrderedDict(metadata)  # type: ignore[attr-defined] # torch's own way
    module.load_state_dict(tensors)
