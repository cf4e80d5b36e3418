"""One optimizer step of all ranks, and the same batch once more when it was not finite."""

from pathlib import Path

import torch
from torch import Tensor

from dist_train.attribution import Culprit, find_culprits
from dist_train.build import as_written, autocast
from dist_train.config.compose import to_yaml
from dist_train.data.batch import Batch
from dist_train.data.feed import Feed
from dist_train.gradients import backward
from dist_train.metrics import Outcome
from dist_train.optim import learning_rate_in_force, set_learning_rate
from dist_train.order import micro_batches, seed_of, shards
from dist_train.state import Parts
from dist_train.tasks import classification as task
from dist_train.tasks.outputs import Output
from dist_train.weights import weights_of


def train_step(parts: Parts, feed: Feed, *, step: int, generation: int = 0) -> list[Outcome]:
    """Take one optimizer step on this rank's part of a global batch. Collective.

    A rank on which anything fails makes the gradients' sum NaN. Then no rank's norm is finite, and
    all of them drop the attempt and repeat it, skip it or fail, together.

    Returns:
        What each piece of this rank's part came to, on the device.

    Raises:
        StepFailedError, ConfigError: on all ranks, with the cause of the first that failed.
    """
    config, replica, optimizer = parts.config, parts.replica, parts.optimizer
    scaler, recovery, pulse = parts.scaler, parts.recovery, replica.ranks.pulse
    set_learning_rate(optimizer, learning_rate_in_force(step, generation, config, parts.plan))
    replica.agree_on_followed()
    replica.buffers.remember()
    outcomes: list[Outcome] = []
    verdict = "retry"
    while verdict == "retry":
        outcomes.clear()
        failure = None
        pulse.at("data", step)
        replica.gradients.begin()
        try:
            _accumulate(parts, feed.take(step), outcomes, step=step, generation=generation)
        except Exception as error:
            failure = recovery.contain(error, at_start=step == 0)
        pulse.at("all-reduce", step)  # on a GPU until the norm is read: only then is it done
        replica.reduce(poison=failure is not None)
        if scaler is not None and failure is None:
            scaler.unscale_(optimizer)
        grad_norm = replica.clip(config.optim.clip_norm)
        verdict = recovery.decide(grad_norm, failure, step)
        if verdict == "retry" and scaler is not None:
            scaler.update(scaler.get_scale())  # being short of memory says nothing about the scale
    pulse.at("optimizer", step)
    if verdict == "apply":
        try:
            if scaler is None or config.guards.lag == 0:
                parts.take_step()  # a scaler would ask once more whether the gradients are finite
            else:
                scaler.step(optimizer)
            if parts.ema is not None:
                parts.ema.update(step, keep=parts.guard.skip_flag)
        except Exception as error:  # half a step cannot be taken back: this ends the attempt
            recovery.remember_shortage(error)
            raise
    parts.guard.after_step()
    return outcomes


def culprits_of(parts: Parts, feed: Feed, step: int, folder: Path) -> list[Culprit]:
    """Run a skipped step's batch again on every rank, to see where it went wrong. Collective."""
    config, generation = parts.config, feed.sampler.generation
    if config.parallel.sync_batchnorm:
        return []  # its forward waits for the other ranks: none can repeat the batch by itself
    batch = feed.take(step)

    def loss_of(part: Batch) -> Tensor:
        logits = _forward(parts, part, step=step, generation=generation, bare=True)
        return task.loss_sum(logits, part, label_smoothing=config.optim.label_smoothing)

    parts.replica.buffers.remember()
    with as_written(config):  # compiled, it would run no hooks
        found = find_culprits(
            parts.replica.ranks,
            parts.replica.module,
            [batch.part(first, last) for first, last in pieces_of(parts, batch)],
            loss_of,
            state=lambda: weights_of(parts.replica.module, parts.replica.buffers),
            indices=feed.samples(step),
            folder=folder,
            context={
                "step": step,
                "generation": generation,
                "precision": parts.precision,
                "memory_format": parts.memory_format,
                "config": to_yaml(config),
                "num_classes": parts.num_classes,
            },
        )
    parts.replica.buffers.restore()
    return found


def _accumulate(
    parts: Parts, batch: Batch, outcomes: list[Outcome], *, step: int, generation: int
) -> None:
    """Forward and backward of every piece of a batch; adds to the gradients and to `outcomes`."""
    replica, pulse = parts.replica, parts.replica.ranks.pulse
    weight = replica.loss_weight(batch.global_size)
    if parts.scaler is not None:
        weight = parts.scaler.scale(weight)
    for first, last in pieces_of(parts, batch):
        part = batch.part(first, last)
        with replica.gradients.piece(last=last == len(batch)):
            pulse.at("forward", step)
            logits = _forward(parts, part, step=step, generation=generation)
            loss = task.loss_sum(logits, part, label_smoothing=parts.config.optim.label_smoothing)
            outcomes.append(task.outcome(loss, logits, part))
            pulse.at("backward", step)
            backward(loss, weight)


def pieces_of(parts: Parts, batch: Batch) -> list[tuple[int, int]]:
    """Return the [first, last) of a rank's batch that are forwarded at once."""
    config, ranks = parts.config.train, parts.replica.ranks
    if config.order == "fast":
        return micro_batches(len(batch), parts.recovery.micro_batch_size)
    own = shards(batch.global_size, ranks.rank, ranks.world_size, config.num_shards)
    return [(first - batch.first_position, last - batch.first_position) for first, last in own]


def _forward(
    parts: Parts, part: Batch, *, step: int, generation: int, bare: bool = False
) -> Output:
    """Forward one piece; `bare` leaves out the wrapper, which the other ranks take part in."""
    # Dropout: a function of the run's place, never of the rank. Not torch.manual_seed: where CUDA
    # is not in use it formats the caller's stack each time, for 0.1 to 0.2 ms.
    seed = seed_of(parts.config.seed, generation, step, part.first_position)
    torch.default_generator.manual_seed(seed)
    if part.images.is_cuda:
        torch.cuda.manual_seed(seed)
    with autocast(parts.precision, part.images.device):
        return (parts.replica.module if bare else parts.replica)(part.images)
