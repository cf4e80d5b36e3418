"""All that survives a stop: what a checkpoint holds, and how a run takes it up again."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch

from dist_train.checkpoint_folder import BadCheckpointError
from dist_train.config import Config, ConfigError
from dist_train.config.earlier import SYNC
from dist_train.drift import DriftCheck
from dist_train.metrics import Meter
from dist_train.nonfinite import NonFiniteGuard
from dist_train.optim import Ema, load_optimizer
from dist_train.parallel import Replica
from dist_train.plan import Plan
from dist_train.progress import Progress
from dist_train.recovery import Recovery
from dist_train.sync_form import form_of
from dist_train.weights import load_weights, weights_of

# Among the facts: of imported_code, and of the data, which are told of in words.
CODE, CONTENT = "code", "content"


@dataclass(kw_only=True, slots=True)
class Parts:
    """What a step works with; all of it but the plan survives in a checkpoint."""

    config: Config
    plan: Plan
    replica: Replica
    optimizer: torch.optim.Optimizer
    take_step: Callable[[], None]  # the optimizer's, where no GradScaler takes it
    scaler: torch.amp.GradScaler | None
    ema: Ema | None
    guard: NonFiniteGuard
    recovery: Recovery
    drift: DriftCheck
    precision: str  # in force
    memory_format: str  # in force
    num_classes: int


def capture(
    parts: Parts, progress: Progress, meter: Meter | None, facts: dict[str, Any]
) -> dict[str, Any]:
    """Return the state of a run as tensors and plain values. Not collective, does not copy."""
    return {
        "progress": asdict(progress),
        **weights_of(parts.replica.module, parts.replica.buffers),
        "optimizer": parts.optimizer.state_dict(),
        "scaler": None if parts.scaler is None else parts.scaler.state_dict(),
        "ema": None if parts.ema is None else parts.ema.state_dict(),
        "recovery": parts.recovery.state_dict(),
        "meter": {} if meter is None else meter.state_dict(),
        "facts": facts | {SYNC: parts.replica.form},  # a trial step may have changed it
    }


def restore(state: dict[str, Any], parts: Parts, meter: Meter, origin: str) -> Progress:
    """Load a state into the parts and return its counters.

    Raises:
        ConfigError: it belongs to another model, optimizer or form of state.
    """
    try:
        load_weights(parts.replica.module, parts.replica.buffers, state)
        load_optimizer(parts.optimizer, state["optimizer"])
        progress = Progress(**state["progress"])
        meter.load_state_dict(state["meter"])
        parts.recovery.load_state_dict(state["recovery"])
        if parts.ema is not None:
            if state["ema"] is None:
                raise ConfigError(f"{origin} has no averaged weights: unset optim.ema_decay")
            parts.ema.load_state_dict(state["ema"])
        if parts.scaler is not None and state["scaler"] is not None:
            parts.scaler.load_state_dict(state["scaler"])
    except ConfigError:
        raise
    except Exception as error:  # a module's own loading may raise anything
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise BadCheckpointError(
            f"{origin} is of another model or optimizer ({' '.join(lines[:2])[:200]}): set "
            "model.factory, model.args and optim.name as they were, or use another run_dir"
        ) from None
    return progress


def check_facts(facts: dict[str, Any], now: dict[str, Any], origin: str) -> list[str]:
    """Compare the surroundings of a checkpoint with today's; returns warnings about bits.

    Raises:
        ConfigError: the data are not those that the run was trained on.
    """
    shared = facts["data"].keys() & now["data"].keys()  # an earlier version knew fewer
    changed = [k for k in now["data"] if k in shared and facts["data"][k] != now["data"][k]]
    if changed:
        what = ", ".join(f"{k} {now['data'][k]} instead of {facts['data'][k]}" for k in changed)
        raise ConfigError(
            f"{origin} was trained on other data: {what}. Give data.name and data.root as they "
            "were, or use another run_dir"
        )
    facts = {"model.memory_format": "channels_last"} | facts  # before there was a choice
    free = {"data", CODE, CONTENT}
    if SYNC in facts:
        facts |= {SYNC: form_of(facts)}
    if now[SYNC] == "fixed":
        free.add("world_size")
    told = []
    if facts.get(CONTENT, now[CONTENT]) not in ("", now[CONTENT]):
        told.append(
            f"the data have changed since {origin} was saved: other files, images or labels of the "
            "same number. The run goes on with those that are there now"
        )
    return told + [
        f"{key} is {now[key]} and was {facts.get(key)}: the bits of the result may differ"
        for key in now
        if key not in free and facts.get(key) != now[key]
    ]


def run_facts(parts: Parts, data: dict[str, Any], content: str, cpu: str) -> dict[str, Any]:
    """Return the surroundings that decide about bits, and the data's fingerprint and content."""
    ranks = parts.replica.ranks
    if {"data.image_size", "data.resize"} & set(parts.config.resume_allow):
        data = {key: value for key, value in data.items() if key != "image_shape"}
    return {
        "data": data,
        CONTENT: content,
        "world_size": ranks.world_size,
        SYNC: parts.replica.form,
        "precision": parts.precision,
        "model.memory_format": parts.memory_format,
        "model.compile": parts.config.model.compile,
        "threads": torch.get_num_threads(),
        "device": cpu if ranks.device.type == "cpu" else torch.cuda.get_device_name(),
        "torch": str(torch.__version__),
        "train.micro_batch_size": parts.config.train.micro_batch_size,
    }
