"""What the emulated GPU promises; run by test_emulated_gpu.py in a process that has two."""

import ctypes
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

from dist_train.config import Config
from dist_train.distributed import start_ranks
from tests.emulated_gpu.kernels import MixedDevicesError, allow_pinned, counted, emulated
from tests.ranks import run_ranks
from tests.settings import small

GARBAGE = ctypes.c_float.from_buffer(bytearray(b"\xa5" * 4)).value


def pinned(size: int) -> torch.Tensor:
    return torch.zeros(size, pin_memory=True)


def test_a_copy_to_the_host_arrives_when_the_host_waits() -> None:
    host, source = pinned(3), torch.arange(3.0, device="cuda")
    host.copy_(source, non_blocking=True)
    assert host.tolist() == [GARBAGE] * 3
    torch.cuda.current_stream().synchronize()
    assert host.tolist() == [0.0, 1.0, 2.0]


def test_an_event_brings_what_its_own_stream_has_done_before_it_and_nothing_else() -> None:
    first, second, third = pinned(1), pinned(1), pinned(1)
    source, other = torch.ones(1, device="cuda"), torch.cuda.Stream()
    first.copy_(source, non_blocking=True)
    before, event = torch.cuda.Event(), torch.cuda.Event()
    before.record()
    second.copy_(source, non_blocking=True)
    with torch.cuda.stream(other):
        third.copy_(source, non_blocking=True)
        event.record()
    event.synchronize()
    assert (first.item(), second.item(), third.item()) == (GARBAGE, GARBAGE, 1.0)
    before.synchronize()
    assert (first.item(), second.item()) == (1.0, GARBAGE)
    torch.cuda.synchronize()
    assert second.item() == 1.0


def test_a_stream_that_waits_for_another_has_its_work_behind_it() -> None:
    host, source, other = pinned(1), torch.ones(1, device="cuda"), torch.cuda.Stream()
    host.copy_(source, non_blocking=True)
    other.wait_stream(torch.cuda.current_stream())
    other.synchronize()
    assert host.item() == 1.0


def test_a_device_that_is_asked_often_enough_is_ready() -> None:
    host, event = pinned(1), torch.cuda.Event()
    host.copy_(torch.ones(1, device="cuda"), non_blocking=True)
    event.record()
    assert not event.query()
    while not event.query():
        assert host.item() == GARBAGE
    assert host.item() == 1.0


def rewrite(*, wait: bool) -> None:
    """Write to pinned memory that is on its way to the device."""
    with emulated():
        host = pinned(3)
        host.to("cuda", non_blocking=True)
        if wait:
            torch.cuda.current_stream().synchronize()
        host.fill_(1.0)


def test_pinned_memory_that_is_written_before_the_device_has_read_it_is_a_race() -> None:
    with pytest.raises(AssertionError, match="changed 1 times before the device had read it"):
        rewrite(wait=False)
    rewrite(wait=True)


def test_waits_and_pageable_copies_are_counted() -> None:
    on_gpu = torch.ones(2, device="cuda")
    before = counted("waits"), counted("event_waits"), counted("pageable")
    on_gpu.sum().item()
    event = torch.cuda.Event()
    event.record()
    event.synchronize()
    torch.ones(2).to("cuda", non_blocking=True)
    after = counted("waits"), counted("event_waits"), counted("pageable")
    assert [b - a for a, b in zip(before, after, strict=True)] == [1, 1, 1]


def test_a_tensor_of_the_cpu_is_refused_among_those_of_the_device() -> None:
    on_gpu, on_cpu = torch.ones(2, device="cuda"), torch.ones(2)
    for mixed in (lambda: on_gpu + on_cpu, lambda: torch.cat([on_gpu, on_cpu])):
        with pytest.raises(MixedDevicesError):
            mixed()
    assert (on_gpu * torch.tensor(3.0)).tolist() == [3.0, 3.0], "a number is none"
    with pytest.raises(MixedDevicesError):
        on_gpu.to("cuda:0").add(torch.ones(2, device="cuda:1"))


def test_a_kernel_that_nothing_computes_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="not supported by the emulated GPU"), emulated():
        torch.cuda._sleep(1)


def test_memory_of_the_device_is_what_torch_says_it_is() -> None:
    size = 1 << 20
    before = torch.cuda.memory_allocated()
    kept = torch.empty(size, dtype=torch.uint8, device="cuda")
    assert torch.cuda.memory_allocated() - before == size
    with pytest.raises(torch.OutOfMemoryError, match="CUDA out of memory"):
        torch.empty(1 << 40, device="cuda")
    del kept
    assert torch.cuda.memory_allocated() == before


def test_pinned_memory_can_be_scarce() -> None:
    allow_pinned(counted("pinned_bytes"))
    try:
        with pytest.raises(RuntimeError, match="out of memory"):
            torch.empty(1 << 24, pin_memory=True)
    finally:
        allow_pinned(1 << 40)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_net_has_the_numbers_of_the_cpu(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten())
    net = net.to(memory_format=torch.channels_last)
    images = torch.randn(4, 3, 8, 8)
    found = []
    for device in ("cpu", "cuda"):
        net.to(device).zero_grad()
        with torch.autocast(device, dtype, enabled=dtype != torch.float32):
            out = net(images.to(device))
        out.float().square().sum().backward()
        left = [out.detach(), *(p.grad for p in net.parameters() if p.grad is not None)]
        found.append([tensor.cpu().clone() for tensor in left])
    assert len(found[0]) == 5
    for mine, theirs in zip(*found, strict=True):
        assert torch.equal(mine, theirs)


def summed(config: Config) -> tuple[float, int]:
    """Sum over two ranks without waiting; then read what came of it."""
    with start_ranks(config) as ranks:
        tensor = torch.full((1000,), float(ranks.rank + 1), device=ranks.device)
        work = dist.all_reduce(tensor, async_op=True)
        assert work is not None
        assert work.get_future().done(), "it is enqueued, and that is all"
        return (tensor * 2).sum().item(), ranks.device.index


def test_what_follows_a_sum_over_the_ranks_reads_the_sum(tmp_path: Path) -> None:
    assert run_ranks(summed, 2, small(tmp_path)) == [(6000.0, 0), (6000.0, 1)]
