"""A torch.profiler trace of chosen steps on chosen ranks."""

from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from dist_train.config import ProfileConfig
from dist_train.distributed import Ranks


def traced(
    steps: Iterable[int], config: ProfileConfig, folder: Path, ranks: Ranks
) -> Iterator[int]:
    """Pass `steps` on; those in [first, last) of config.steps are traced, loading included.

    Writes folder/profile/rank<r>_steps_<first>_<last>.json for chrome://tracing or Perfetto.
    """
    if config.steps is None or ranks.rank not in config.ranks:
        yield from steps
        return
    first, last = config.steps
    activities = [ProfilerActivity.CPU]
    if ranks.device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    tracer: profile | None = None
    end = first
    try:
        for step in steps:
            if tracer is None and first <= step < last:
                ranks.pulse.enter("checkpoint")  # both take longer than a step may, as a save does
                tracer = profile(activities=activities, record_shapes=True)
                tracer.start()
            yield step
            end = step + 1
            if tracer is not None and end >= last:
                _write(tracer, folder, ranks, first, last)
                tracer = None
    finally:
        if tracer is not None:
            _write(tracer, folder, ranks, first, end)


def _write(tracer: profile, folder: Path, ranks: Ranks, first: int, last: int) -> None:
    ranks.pulse.enter("checkpoint")
    if ranks.device.type == "cuda":
        torch.cuda.synchronize()
    tracer.stop()
    target = folder / "profile"
    target.mkdir(exist_ok=True)
    tracer.export_chrome_trace(str(target / f"rank{ranks.rank}_steps_{first}_{last}.json"))
