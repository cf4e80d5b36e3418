"""What a launch measures once, after its rounds: what need not be repeated in turns."""

import os
import time
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from dist_train.bench.clock import clock_for
from dist_train.bench.machine_speed import data_sheet_peak, flops_of_a_sample
from dist_train.bench.ways import Steps
from dist_train.build import as_written
from dist_train.checkpoint import HostBuffers
from dist_train.distributed import Ranks
from dist_train.progress import Progress
from dist_train.state import Parts, capture

REDUCED = (4, 1 << 10, 16 << 10, 64 << 10, 256 << 10, 1 << 20, 4 << 20, 16 << 20, 64 << 20)
REDUCE_SEC = 0.15  # spent on one size
LONG_SEC = 0.5  # once an all-reduce takes so long, larger ones are left out


def measure_once(steps: Steps, parts: Parts, ranks: Ranks, *, count_flops: bool) -> dict[str, Any]:
    """Return it, of this rank; counting FLOPs takes torch as long as a start. Collective."""
    device, pulse = ranks.device, ranks.pulse
    flops = None
    if count_flops:  # for this torch imports as much again as for all else
        pulse.enter("start")  # torch counts in Python: it may take as long as that
        with as_written(parts.config):
            flops = flops_of_a_sample(parts.replica.module, steps.batch, parts.precision)
    peak = data_sheet_peak(device, parts.precision)
    pulse.enter("checkpoint")
    ranks.barrier()
    save_sec = _save_sec(parts) if ranks.rank == 0 else 0.0  # no other rank saves
    ranks.barrier()
    pulse.enter("backward")
    gradient_times = steps.gradient_times()
    pulse.enter("all-reduce")
    return {
        "save_sec": save_sec,
        "flops_per_sample": flops,
        "peak_flops_per_sec": None if peak is None else peak[0],
        "peak_of": None if peak is None else peak[1],
        "batch_size": len(steps.batch),
        "global_batch_size": steps.batch.global_size,
        "loader": steps.loader,
        "micro_batch_size": parts.recovery.micro_batch_size,
        "gradient_bytes": sum(p.numel() * p.element_size() for p in parts.replica.params),
        "gradient_times": gradient_times,
        "all_reduce": _all_reduces(ranks),
        "threads": torch.get_num_threads(),
        "cores": sorted(os.sched_getaffinity(0)),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "sync": parts.replica.form,
        "precision": parts.precision,
        "memory_format": memory_format_of(parts.replica.module),
    }


def memory_format_of(module: nn.Module) -> str:
    """Return how the weights of convolutions lie; some (1 x 1) lie both ways and say nothing."""
    wide = any(
        param.ndim == 4
        and not param.is_contiguous()
        and param.is_contiguous(memory_format=torch.channels_last)
        for param in module.parameters()
    )
    return "channels_last" if wide else "contiguous"


def _save_sec(parts: Parts) -> float:
    """Return how long a step waits when the state is copied for a save: the second of two."""
    buffers, sec = HostBuffers(), 0.0
    for _ in range(2):  # the first takes its memory
        begun = time.perf_counter()
        buffers.copy(capture(parts, Progress(), None, {}))
        sec = time.perf_counter() - begun
    return sec


def _all_reduces(ranks: Ranks) -> list[tuple[int, float]]:
    """Return (bytes, seconds) of all-reduces of growing size: the median of each. Collective."""
    found: list[tuple[int, float]] = []
    if ranks.control is None:
        return found
    clock = clock_for(ranks.device)
    for size in REDUCED:
        tensor = torch.zeros(max(1, size // 4), device=ranks.device)
        times: list[float] = []
        begun = time.monotonic()
        while True:
            ranks.barrier()
            clock.mark()
            dist.all_reduce(tensor)
            clock.mark()
            times += clock.take()
            done = len(times) >= 5 and time.monotonic() - begun > REDUCE_SEC
            if ranks.any(done):
                break
        found.append((size, sorted(times)[len(times) // 2]))
        if ranks.any(found[-1][1] > LONG_SEC):
            break
    return found
