"""How fast each rank computes and copies; the slow one is named, with the reason if it shows.

The path on GPUs was written without a machine that has several.
"""

import os
import time
from collections.abc import Callable

import torch
from torch import Tensor

from dist_train.doctor.machine import megahertz, throttled
from dist_train.doctor.speeds import Speed

WINDOWS, QUICK_WINDOWS = (
    3,
    2,
)  # the best of them counts: a neighbour that disturbs one is not the rank's own fault
WINDOW_SEC = 0.5  # several periods of a cgroup's quota
SIDE = {"cpu": 512, "cuda": 8192}
COPIED_BYTES = {"cpu": 32 << 20, "cuda": 1 << 30}


def device_of(kind: str, gpu: int) -> torch.device:
    """Return this rank's device, and make it the calling thread's."""
    if kind != "cuda":
        return torch.device("cpu")
    device = torch.device("cuda", gpu)
    torch.cuda.set_device(device)
    return device


def measure_speed(rank: int, device: torch.device, *, quick: bool) -> Speed:
    """Multiply and copy for some windows of time."""
    side = SIDE[device.type]
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    left = torch.ones(side, side, dtype=dtype, device=device)
    out = torch.empty_like(left)
    source = torch.ones(COPIED_BYTES[device.type], dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    before = throttled()
    windows = QUICK_WINDOWS if quick else WINDOWS
    products, share = _best(windows, lambda: torch.mm(left, left, out=out), out)
    copies, copy_share = _best(windows, lambda: target.copy_(source), target)
    after = throttled()
    now, most = megahertz(sorted(os.sched_getaffinity(0)))
    return Speed(
        rank=rank,
        matmul_flops_per_sec=products * 2 * side**3,
        copied_bytes_per_sec=copies * source.numel(),
        core_share=share if device.type == "cpu" else 1.0,
        copy_core_share=copy_share if device.type == "cpu" else 1.0,
        num_threads=torch.get_num_threads(),
        throttled_periods=after[0] - before[0],
        periods=after[1] - before[1],
        megahertz=now,
        megahertz_most=most,
        device=device.type,
    )


def _best(windows: int, work: Callable[[], object], result: Tensor) -> tuple[float, float]:
    """Return the most calls a second of a window, and the share of the cores in that one."""
    work()
    _finish(result)
    best = (0.0, 0.0)
    for _ in range(windows):
        count, began, used = 0, time.perf_counter(), time.process_time()
        while time.perf_counter() - began < WINDOW_SEC:
            work()
            _finish(result)
            count += 1
        wall = time.perf_counter() - began
        share = (time.process_time() - used) / (wall * torch.get_num_threads())
        best = max(best, (count / wall, share))
    return best


def _finish(tensor: Tensor) -> None:
    if tensor.device.type == "cuda":
        torch.cuda.synchronize(tensor.device)
