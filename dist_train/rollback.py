"""Back to the last good checkpoint without a restart: after divergence, or drift of replicas."""

from typing import Any

from dist_train.metrics import Meter
from dist_train.nonfinite import NonFiniteError
from dist_train.progress import Progress
from dist_train.recovery import RollBack
from dist_train.run import Run
from dist_train.state import Parts, restore

MAX_SAME = 3  # returns to one checkpoint for drift: then the machine is to blame


class ReplicaDriftError(RuntimeError):
    """The ranks' weights came to differ again and again."""


def roll_back(
    request: RollBack, run: Run, parts: Parts, meter: Meter, progress: Progress
) -> Progress:
    """Load the last good checkpoint into the parts and return its counters. Collective.

    A checkpoint that a stop left in a row of skipped steps is no good one where there is an older.
    After divergence the way on is another one: the generation grows by one, and with it the order
    of the samples changes and the learning rate falls. After drift it is the same one again.

    Raises:
        NonFiniteError: the run went back often enough.
        ReplicaDriftError: the same steps ended in drift again and again.
    """
    guards, recovery = parts.config.guards, parts.recovery
    if request.new_order and progress.generation >= guards.max_rollbacks:
        count = progress.generation
        plural = "s" if count > 1 else ""
        again = f", {count} rollback{plural} did not help" if count else ""
        raise NonFiniteError(
            f"{request}{again}; {run.blamed}. Lower optim.lr, set optim.clip_norm, check the data "
            "of this step, or raise guards.max_consecutive"
        )
    run.ranks.pulse.enter("checkpoint")  # one may still be written; and one is read
    found = run.states.newest(going_back=True)
    assert found is not None, "a run that began has a state"
    origin, state = found
    micro_batch_size, scale = recovery.micro_batch_size, _scale(parts)
    before = progress.generation
    progress = run.ranks.together(lambda: restore(state, parts, meter, origin))
    progress.patience = parts.config.train.early_stop_patience
    recovery.micro_batch_size = micro_batch_size  # memory was short all the same
    progress.generation = before + request.new_order
    if request.new_order:
        if parts.scaler is not None and scale is not None:
            parts.scaler.update(min(scale, parts.scaler.get_scale()))
    elif run.went_back_to(progress.step) > MAX_SAME:
        raise ReplicaDriftError(
            f"{request}; after {MAX_SAME} returns to step {progress.step} again: test the memory "
            "of that machine, or leave it out"
        )
    run.states.set_aside_after(progress.step, why="rejected")
    parts.guard.reset()
    parts.drift.forget()
    run.rewind(progress, parts.plan)
    event: dict[str, Any] = {
        "event": "rolled_back",
        "step": progress.step,
        "reason": str(request),
        "checkpoint": origin,
        "generation": progress.generation,
        "say": f"{request}: back to {origin}, step {progress.step}",
    }
    run.note(event)
    return progress


def _scale(parts: Parts) -> float | None:
    return None if parts.scaler is None else parts.scaler.get_scale()
