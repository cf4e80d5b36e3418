"""The ways in which a step is measured: as it is, and with one thing after another left out.

full: as in training. ready: the batch lies ready. alone: also without the other ranks. bare: only
forward, backward and optimizer, as in the shortest loop by hand. Where a step loads its batch in
its own thread, how long that took is all that loading costs: no ready steps are needed. One rank
needs no steps alone.
"""

import os
import time
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from dist_train.bench.clock import Clock, clock_for
from dist_train.build import autocast
from dist_train.data.batch import Batch
from dist_train.data.feed import Feed
from dist_train.data.loaders import Data
from dist_train.data.worker_loader import WorkerLoader
from dist_train.gradients import backward
from dist_train.metrics import Meter
from dist_train.monitor.processes import core_delay_ns
from dist_train.progress import Progress
from dist_train.start import open_feed
from dist_train.state import Parts
from dist_train.step import pieces_of, train_step
from dist_train.tasks import classification as task

WAYS = ("full", "ready", "alone", "bare")
ENDLESS = 1 << 40  # steps
PREFETCHED = 2  # batches that a worker of torch's DataLoader loads ahead, its default
MOST_UNMEASURED = 32  # steps before a block, if that is not more blocks than the next
MOST_UNMEASURED_BLOCKS = 16


class Steps:
    """Takes blocks of steps, each in one of the ways, and returns how long each step took."""

    def __init__(self, parts: Parts, data: Data) -> None:
        """Begin at step 0; `parts` have had their throw-away step."""
        self._parts = parts
        ranks, plan = parts.replica.ranks, parts.plan
        feed = open_feed(parts, data, last_step=ENDLESS)
        self.batch = feed.take(0)  # the one that lies ready
        self._ahead = 0  # batches that workers load while nobody takes one
        beside = isinstance(data.loader, WorkerLoader)
        self.loader = "workers" if beside else "memory"
        left_out = set()
        if not beside and ranks.device.type == "cpu":
            left_out.add("ready")
        if ranks.control is None:  # it is alone anyhow
            left_out.add("alone")
        if parts.config.parallel.sync_batchnorm:  # its forward waits for the others
            left_out |= {"alone", "bare"}
        self.ways = [way for way in WAYS if way not in left_out]
        if isinstance(data.loader, WorkerLoader):
            copied = ranks.device.type == "cuda"  # one more lies on the device
            self._ahead = PREFETCHED * data.loader.num_workers + copied
        self._unmeasured = 0  # steps to take before the next full block
        self._step = 0  # of all ways together
        lone = replace(ranks, control=None, rank=0, world_size=1)  # it meets nobody
        ready = _Ready(self.batch)
        self._loops = {
            "full": _Loop(_InTurn(feed), Meter(ranks, plan)),
            "ready": _Loop(ready, Meter(ranks, plan)),
            "alone": _Loop(ready, Meter(lone, plan)),
        }
        self._clock: Clock = clock_for(ranks.device)
        self.phases: list[list[float]] = []  # of the last bare block: forward, backward, optimizer
        self.waits: list[float] = []  # of the last full block: seconds until the batch was there
        # Of a step of the last other block: CPU time of all threads, and how long the first of
        # them was ready to run and had no core.
        self.cpu_sec = self.core_delay_sec = 0.0

    def drain(self, count: int) -> None:
        """Take what workers have loaded ahead during other blocks, before a full one of `count`.

        It would hide that steps wait for their batches. Collective.
        """
        self._take(
            "full", min(self._unmeasured, max(MOST_UNMEASURED, MOST_UNMEASURED_BLOCKS * count))
        )
        self._unmeasured = 0
        self._parts.replica.ranks.barrier()

    def block(self, way: str, count: int, *, lead: int = 0) -> list[float]:
        """Take `count` steps; returns the seconds of each. Collective, waits for the device.

        Args:
            way: one of `ways`. A full block was drained for, or begins with steps that are not
                measured.
            count: of the steps that are measured.
            lead: of steps before them that are not. Ranks do not leave a barrier at once, and the
                first step after it waits for the last of them; it also finds in the caches what
                came before the block.
        """
        scaler = self._parts.scaler
        self._parts.replica.ranks.barrier()
        if way == "full":
            self.drain(count)
            return self._take(way, count, lead=lead)
        self._unmeasured = self._ahead
        if way == "ready":
            return self._take(way, count, lead=lead)
        scale = None if scaler is None else scaler.state_dict()
        if way == "bare":
            times = self._bare(count, lead=lead)
        else:
            with self._parts.replica.alone():
                times = self._take(way, count, lead=lead)
        if scaler is not None and scale is not None:
            scaler.load_state_dict(scale)
        self._agree_again()
        return times

    def _agree_again(self) -> None:
        """Give all ranks rank 0's weights and the least micro-batch. Collective.

        Each has trained by itself, and may have been short of memory.
        """
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
        sizes = ranks.gather(parts.recovery.micro_batch_size)
        parts.recovery.micro_batch_size = min((s for s in sizes if s is not None), default=None)

    def _take(self, way: str, count: int, *, lead: int = 0) -> list[float]:
        """Take steps as dist_train.train does, without what belongs to epochs."""
        parts, loop = self._parts, self._loops[way]
        meter, progress = loop.meter, loop.progress
        meter.resume()
        for _ in range(lead):  # uncounted, so that what is due now and then falls on measured ones
            train_step(parts, loop.feed, step=self._step)
            loop.feed.take_waited_sec()
            self._step += 1
        cpu_begun, delay_begun = time.process_time(), core_delay_ns(os.getpid())
        waits = []
        self._clock.mark()
        for _ in range(count):
            outcomes = train_step(parts, loop.feed, step=self._step)
            waits.append(loop.feed.take_waited_sec())
            self._step += 1
            progress.step += 1
            meter.add(outcomes)
            if way != "alone" and parts.drift.due(progress.step):
                parts.drift.check(self._step)
            if meter.meeting_due(progress.step):
                meter.meet(progress, stopping=False)
                meter.line(progress)
            self._clock.mark()
        times = self._clock.take()
        if way == "full":
            self.waits = waits
        self.cpu_sec = (time.process_time() - cpu_begun) / max(1, count)
        self.core_delay_sec = (core_delay_ns(os.getpid()) - delay_begun) / 1e9 / max(1, count)
        meter.pause()
        parts.recovery.settle()  # here, where those are who took the step
        return times

    def _bare(self, count: int, *, lead: int = 0) -> list[float]:
        """Take steps as the shortest loop does, and note the phases of each measured one."""
        parts, clock = self._parts, self._clock
        replica, pulse = parts.replica, parts.replica.ranks.pulse
        pieces = self.pieces()
        weight = replica.loss_weight(self.batch.global_size)
        smoothing = parts.config.optim.label_smoothing
        for _ in range(lead + count):
            pulse.at("forward", self._step)
            self._step += 1
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
        clock.mark()
        times = clock.take()
        each = 2 * len(pieces) + 2  # the last one is from the end of a step to the next
        self.phases, found = [], []
        for first in range(lead * each, len(times), each):
            step = times[first : first + each]
            forward_sec = sum(step[0 : 2 * len(pieces) : 2])
            backward_sec = sum(step[1 : 2 * len(pieces) : 2])
            self.phases.append([forward_sec, backward_sec, step[2 * len(pieces)]])
            found.append(sum(step))
        return found

    def pieces(self) -> list[Batch]:
        """Return the ready batch as a step forwards it: in micro-batches, or in shards."""
        return [self.batch.part(*ends) for ends in pieces_of(self._parts, self.batch)]

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

    def take_waited_sec(self) -> float:
        return 0.0


class _InTurn:
    """A feed whose batches follow each other, however far apart the steps are that ask."""

    def __init__(self, feed: Feed) -> None:
        self._feed = feed
        self._asked, self._step = -1, -1

    def take(self, step: int) -> Batch:
        if step != self._asked:
            self._asked, self._step = step, self._step + 1
        return self._feed.take(self._step)

    def take_waited_sec(self) -> float:
        return self._feed.take_waited_sec()


class _Loop:
    """What a way counts for itself, as if no other's steps came in between."""

    def __init__(self, feed: Any, meter: Meter) -> None:
        self.feed = feed
        self.meter = meter
        self.progress = Progress()
        meter.pause()
