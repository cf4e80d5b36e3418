"""The ways in which a step is measured: as it is, and with one thing after another left out.

full: as in training. ready: the batch lies ready. alone: also without the other ranks. bare: only
forward, backward and optimizer, as in the shortest loop by hand.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from dist_train.bench.clock import Clock, clock_for
from dist_train.build import autocast
from dist_train.data.batch import Batch
from dist_train.data.feed import Feed
from dist_train.data.loaders import Data
from dist_train.gradients import backward
from dist_train.metrics import Meter
from dist_train.order import GlobalOrderSampler, micro_batches
from dist_train.progress import Progress
from dist_train.state import Parts
from dist_train.step import train_step
from dist_train.tasks import classification as task

WAYS = ("full", "ready", "alone", "bare")
ENDLESS = 1 << 40  # steps


class Steps:
    """Takes blocks of steps, each in one of the ways, and returns how long each step took."""

    def __init__(self, parts: Parts, data: Data) -> None:
        """Begin at step 0; `parts` have had their throw-away step."""
        self._parts = parts
        ranks, plan = parts.replica.ranks, parts.plan
        sampler = GlobalOrderSampler(
            data.num_train,
            global_batch_size=plan.global_batch_size,
            rank=ranks.rank,
            world_size=ranks.world_size,
            seed=parts.config.seed,
            drop_last=parts.config.train.drop_last,
            num_shards=_num_shards(parts),
        )
        self._feed = Feed(data.loader, sampler, ENDLESS)
        self.batch = self._feed.take(0)  # the one that lies ready
        self._ready = _Ready(self.batch)
        self._alone = replace(ranks, control=None)
        self._progress = Progress()
        self._meters = {way: Meter(ranks, plan) for way in ("full", "ready")}
        self._meters["alone"] = Meter(self._alone, plan)
        self._clock: Clock = clock_for(ranks.device)
        self.phases: list[list[float]] = []  # of the last bare block: forward, backward, optimizer

    def block(self, way: str, count: int) -> list[float]:
        """Take `count` steps; returns the seconds of each. Collective, waits for the device."""
        self._parts.replica.ranks.barrier()
        if way in ("full", "ready"):
            return self._loop(way, count)
        if way == "bare":
            times = self._bare(count)
        else:
            with self._parts.replica.alone():
                times = self._loop(way, count)
        self._agree_again()
        return times

    def _agree_again(self) -> None:
        """Give all ranks rank 0's weights: each has trained by itself. Collective."""
        parts, ranks = self._parts, self._parts.replica.ranks
        if ranks.control is None:
            return
        tensors: list[Tensor] = list(parts.replica.params)
        for state in parts.optimizer.state.values():
            tensors += [value for value in state.values() if isinstance(value, Tensor)]
        if parts.ema is not None:
            tensors += parts.ema.average
        for tensor in tensors:
            ranks.broadcast(tensor.detach())

    def _loop(self, way: str, count: int) -> list[float]:
        """Take steps as dist_train.train does, without what belongs to epochs."""
        parts, meter, progress = self._parts, self._meters[way], self._progress
        feed: Any = self._feed if way == "full" else self._ready
        self._clock.mark()
        for _ in range(count):
            outcomes = train_step(parts, feed, step=progress.step)
            progress.step += 1
            meter.add(outcomes)
            if way != "alone" and parts.drift.due(progress.step):
                parts.drift.check(progress.step)
            if meter.meeting_due(progress.step):
                meter.meet(progress, stopping=False)
                meter.line(progress)
            self._clock.mark()
        return self._clock.take()

    def _bare(self, count: int) -> list[float]:
        """Take steps as the shortest loop does, and note the phases of each."""
        parts, clock = self._parts, self._clock
        replica, pulse = parts.replica, parts.replica.ranks.pulse
        pieces = self.pieces()
        weight = replica.loss_weight(self.batch.global_size)
        smoothing = parts.config.optim.label_smoothing
        for _ in range(count):
            pulse.at("forward", self._progress.step)
            self._progress.step += 1
            for piece in pieces:
                clock.mark()
                with autocast(parts.precision, piece.images.device):
                    logits = replica.module(piece.images)
                loss = task.loss_sum(logits, piece, label_smoothing=smoothing)
                clock.mark()
                backward(loss, weight)
            clock.mark()
            parts.take_step()
            clock.mark()
            for param in replica.params:
                param.grad = None
        times = clock.take()
        each = 2 * len(pieces) + 2  # the last one is from the end of a step to the next
        self.phases, found = [], []
        for first in range(0, len(times), each):
            step = times[first : first + each]
            forward_sec = sum(step[0 : 2 * len(pieces) : 2])
            backward_sec = sum(step[1 : 2 * len(pieces) : 2])
            self.phases.append([forward_sec, backward_sec, step[2 * len(pieces)]])
            found.append(sum(step))
        return found

    def pieces(self) -> list[Batch]:
        """Return the ready batch as it is forwarded."""
        size = self._parts.recovery.micro_batch_size
        return [self.batch.part(*ends) for ends in micro_batches(len(self.batch), size)]

    def gradient_times(self) -> list[tuple[int, float]]:
        """Return (bytes, seconds after the backward's begin) of each gradient in its turn.

        Host time: on a GPU when the work was given to it.
        """
        parts, clock = self._parts, self._clock
        replica, order = parts.replica, []
        handles = []

        def note(param: torch.nn.Parameter) -> None:
            order.append(param.numel() * param.element_size())
            clock.mark()

        for param in replica.params:
            handles.append(param.register_post_accumulate_grad_hook(note))
        try:
            piece = self.pieces()[-1]
            with autocast(parts.precision, piece.images.device):
                logits = replica.module(piece.images)
            loss = task.loss_sum(logits, piece)
            clock.mark()
            backward(loss, replica.loss_weight(self.batch.global_size))
        finally:
            for handle in handles:
                handle.remove()
            for param in replica.params:
                param.grad = None
        at, found = 0.0, []
        for size, sec in zip(order, clock.take(), strict=True):
            at += sec
            found.append((size, at))
        return found


class _Ready:
    """A feed whose batch lies ready."""

    def __init__(self, batch: Batch) -> None:
        self._batch = batch

    def take(self, step: int) -> Batch:
        return self._batch


def _num_shards(parts: Parts) -> int | None:
    train = parts.config.train
    return train.num_shards if train.order == "fixed" else None
