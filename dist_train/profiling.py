"""A torch.profiler trace of chosen steps on chosen ranks."""

from collections.abc import Iterator
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from dist_train.config import ProfileConfig
from dist_train.data.batch import Batch
from dist_train.distributed import Ranks


def profiled(
    batches: Iterator[Batch], config: ProfileConfig, folder: Path, ranks: Ranks, first_step: int
) -> Iterator[Batch]:
    """Pass `batches` on; steps [first, last) of config.steps are traced, loading included.

    Writes folder/profile/rank<r>_steps_<first>_<last>.json for chrome://tracing or Perfetto.
    """
    if config.steps is None or ranks.rank not in config.ranks:
        yield from batches
        return
    first, last = config.steps
    activities = [ProfilerActivity.CPU]
    if ranks.device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    tracer: profile | None = None
    step = first_step
    try:
        while True:
            if tracer is None and first <= step < last:
                tracer = profile(activities=activities, record_shapes=True)
                tracer.start()
            batch = next(batches, None)
            if batch is None:
                return
            yield batch
            step += 1
            if tracer is not None and step >= last:
                _write(tracer, folder, ranks, first, last)
                tracer = None
    finally:
        if tracer is not None:
            _write(tracer, folder, ranks, first, step)


def _write(tracer: profile, folder: Path, ranks: Ranks, first: int, last: int) -> None:
    if ranks.device.type == "cuda":
        torch.cuda.synchronize()
    tracer.stop()
    target = folder / "profile"
    target.mkdir(exist_ok=True)
    tracer.export_chrome_trace(str(target / f"rank{ranks.rank}_steps_{first}_{last}.json"))
