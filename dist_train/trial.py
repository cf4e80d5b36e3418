"""A throw-away step before training, and the proof that what the run will save can be loaded."""

from typing import Any

import torch
from torch import Tensor

from dist_train.build import as_written, autocast, checked_logits
from dist_train.config import ConfigError
from dist_train.config.user_code import is_of_machine
from dist_train.data.batch import Batch
from dist_train.data.loaders import Data
from dist_train.memory import is_out_of_memory
from dist_train.memory_format import laid_out
from dist_train.metrics import Meter
from dist_train.order import micro_batches, shards
from dist_train.progress import Progress
from dist_train.resumable import try_loading
from dist_train.run import Run
from dist_train.smallest import SmallBatch, small_batches, try_small
from dist_train.state import Parts, capture
from dist_train.tasks import classification as task
from dist_train.weights import extra_states, put_extra_states, weights_of


def throw_away_step(parts: Parts, data: Data, *, step: int) -> dict[str, Any]:
    """Run forward and backward once at the real shapes and leave no trace. Collective.

    DDP rebuilds its buckets after its first iteration and then sums in another order: without
    this a resumed run would differ in bits. It also warms the communicator, and finds before
    anything is trained a model that does not fit the data or the smallest batches of them, or a
    micro-batch the memory.

    Returns:
        What weights_of says of the module after it: the form of a state, its numbers undefined.

    Raises:
        ConfigError: the model cannot be trained, or not be brought back to what it was.
    """
    replica, ranks = parts.replica, parts.replica.ranks
    replica.buffers.remember()
    forms, extra = replica.buffers.saved_forms(), extra_states(replica.module)
    marks: dict[str, tuple[int, int]] = {}
    with torch.random.fork_rng(devices=[ranks.device] if ranks.device.type == "cuda" else []):
        repeat = True
        while repeat:
            failure = None
            replica.gradients.begin()
            marks = replica.buffers.marks()
            try:
                _forward_backward(parts, data)
            except Exception as error:
                failure = parts.recovery.contain(error, at_start=True)
            replica.reduce(poison=failure is not None)
            repeat = parts.recovery.trial(failure, step)
        replica.gradients.begin()
        ranks.together(replica.check_parts)
        weights = weights_of(replica.module, replica.buffers)
        own = replica.follow(replica.buffers.changed_since(marks))
        made = replica.buffers.saved_forms() != forms
        batches = small_batches(
            parts.config,
            parts.plan,
            data,
            world_size=ranks.world_size,
            micro_batch_size=parts.recovery.micro_batch_size,
        )
        ranks.together(lambda: _try_small(parts, data, batches))
        replica.buffers.restore()
        if ranks.any(made):
            ranks.together(lambda: _forward_again(parts, data))
        put_extra_states(extra)
    if own:
        parts.recovery.events.append(
            {
                "event": "buffers_of_each_rank",
                "step": step,
                "say": f"each rank has a buffer {own[0]!r} of another form, and a checkpoint holds "
                "rank 0's alone: the bits of a continued run will differ",
            }
        )
    return weights


def prove_resumable(parts: Parts, run: Run, meter: Meter, weights: dict[str, Any]) -> None:
    """See that what a run that begins will save can be loaded again. Collective.

    Args:
        parts: what is saved.
        run: the run; one that took up a state has the proof.
        meter: saved, too.
        weights: of a trial step: a forward may make buffers.

    Raises:
        ConfigError: it cannot be: the run could never be continued.
    """
    if run.took_up:
        return
    state = capture(parts, Progress(), meter, run.facts) | weights
    config, ranks = parts.config, run.ranks
    run.warn(ranks.from_first(lambda: try_loading(state, config, parts.num_classes, ranks)))


def blank(parts: Parts, data: Data, size: int) -> tuple[Tensor, Tensor]:
    """Return zeros in the shapes of a batch: images (size, c, h, w) float32, labels (size,)."""
    device = parts.replica.ranks.device
    images = torch.zeros((size, *data.loader.image_shape), device=device)
    return laid_out(images, parts.memory_format), torch.zeros(
        size, dtype=torch.int64, device=device
    )


def _try_small(parts: Parts, data: Data, batches: list[SmallBatch]) -> None:
    with as_written(parts.config), autocast(parts.precision, parts.replica.ranks.device):
        try_small(
            parts.replica.module,
            lambda size: blank(parts, data, size)[0],
            batches,
            num_classes=data.num_classes,
            factory=parts.config.model.factory,
        )


def _forward_backward(parts: Parts, data: Data) -> None:
    config, ranks, replica = parts.config.train, parts.replica.ranks, parts.replica
    batch = parts.plan.global_batch_size
    pieces = micro_batches(-(-batch // ranks.world_size), parts.recovery.micro_batch_size)[:1]
    if config.order == "fixed":
        pieces = shards(batch, ranks.rank, ranks.world_size, config.num_shards)
    for first, last in pieces:
        images, labels = blank(parts, data, last - first)
        with replica.gradients.piece(last=(first, last) == pieces[-1]):
            factory = parts.config.model.factory
            with autocast(parts.precision, ranks.device):
                logits = checked_logits(replica, images, data.num_classes, factory)
            task.loss_sum(logits, Batch(images=images, labels=labels)).backward()


def _forward_again(parts: Parts, data: Data) -> None:
    """See that a module whose forward makes buffers can make them again, after they were undone.

    Raises:
        ConfigError: it cannot.
    """
    buffers, device = parts.replica.buffers, parts.replica.ranks.device
    images, _ = blank(parts, data, 2)
    try:
        with as_written(parts.config), autocast(parts.precision, device), torch.no_grad():
            parts.replica.module(images)
    except Exception as error:
        if is_out_of_memory(error) or is_of_machine(error):
            raise
        raise ConfigError(
            f"model.factory={parts.config.model.factory} makes buffers in its first forward, and "
            f"fails when they are taken back before training ({type(error).__name__}: {error}). "
            "Make them in __init__, or give them to register_buffer with persistent=False"
        ) from error
    buffers.restore()
