"""Two hand-written loops: as everybody writes it, and as fast as it can be."""

import contextlib
import gc
import inspect
from contextlib import AbstractContextManager

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from benchmarks.peers.job import PEAK_LR, SETTLED, Batches, Job


def plain(job: Job) -> dict[str, Tensor]:
    """Train as in the tutorials of PyTorch: an optimizer and a scheduler with their defaults."""
    job.start_group()
    model = job.model()
    wrapped: nn.Module = DistributedDataParallel(model) if job.world_size > 1 else model
    optimizer = job.optimizer(model, fused=False)
    scheduler = job.schedule(optimizer)
    batches, step = Batches(job), 0
    for _ in range(job.epochs):
        for images, labels in batches:
            optimizer.zero_grad()
            with autocast(job):
                logits = wrapped(images)
            loss = F.cross_entropy(logits.float(), labels)
            loss.backward()
            optimizer.step()
            scheduler.step()
            step += 1
            if not job.lean and step % 50 == 0:
                print(f"step {step} loss {loss.item():.4f}", flush=True)
    return model.state_dict()


def fast(job: Job) -> dict[str, Tensor]:
    """Train with all that a careful author knows and no guard against anything."""
    job.start_group()
    model = job.model()
    wrapped: nn.Module = model
    if job.world_size > 1:
        # As dist_train.parallel does, which is not imported: a fifth of a second of the start.
        names = inspect.signature(DistributedDataParallel.__init__).parameters
        buffers = "forward_sync_buffers" if "forward_sync_buffers" in names else "broadcast_buffers"
        options: dict[str, bool] = {buffers: False}  # torch 2.15 renamed it
        wrapped = DistributedDataParallel(
            model,
            gradient_as_bucket_view=True,
            **options,  # type: ignore[arg-type] # one boolean, under either name
        )
    optimizer = job.optimizer(model)
    rates = [PEAK_LR * job.factor(step) for step in range(job.total_steps)]
    [group] = optimizer.param_groups
    batches, step = Batches(job), 0
    for _ in range(job.epochs):
        for images, labels in batches:
            group["lr"] = rates[step]
            with autocast(job):
                logits = wrapped(images)
            loss = F.cross_entropy(logits.float(), labels)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            step += 1
            if step == SETTLED:  # what lives by now stays: no collection goes through it again
                gc.collect()
                gc.freeze()
            if not job.lean and step % 50 == 0:
                print(f"step {step} loss {loss.item():.4f}", flush=True)
    gc.unfreeze()
    return model.state_dict()


def autocast(job: Job) -> AbstractContextManager[object]:
    """Return the context of a forward pass."""
    if job.precision == "fp32":
        return contextlib.nullcontext()
    return torch.autocast("cpu", torch.bfloat16)
