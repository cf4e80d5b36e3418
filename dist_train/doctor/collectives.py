"""All-reduces over all ranks, and messages between each two nodes, timed. Every wait has an end.

The path through NCCL was written without a machine that has several GPUs, NVLink or InfiniBand.
"""

import contextlib
import os
import re
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import PrefixStore, Store

from dist_train.doctor.link_speed import link_toward
from dist_train.doctor.speeds import Pair, Reduction, Traffic

TIMEOUT_SEC = 30.0
SIZES = (4, 4 << 10, 64 << 10, 1 << 20, 8 << 20, 64 << 20)
GPU_SIZES = (*SIZES, 256 << 20, 1 << 30)
QUICK_SIZES = (4, 64 << 10, 1 << 20)
ENOUGH_SEC = 0.5  # spent on one size
MOST_REPEATS = 20
SLOW_ENOUGH_SEC = 1.0  # a size that takes this long is the last one
PAIR_BYTES, GPU_PAIR_BYTES = 4 << 20, 64 << 20
PAIR_REPEATS, PING_REPEATS = 3, 10
TRANSPORT = re.compile(r" via (NET/\w+|P2P|SHM|COLLNET|NVLS)")


def measure_traffic(
    store: Store,
    rank: int,
    world_size: int,
    *,
    device: torch.device,
    nodes: dict[str, int],
    address: str,
    quick: bool,
) -> Traffic:
    """Make a process group of its own, time it, and take it down. Collective; never raises.

    Args:
        store: of rank 0, reached by all.
        rank: this process's.
        world_size: how many take part.
        device: whose backend is timed.
        nodes: the first rank of each node; these exchange messages in pairs.
        address: this node's on the network, to find the interface.
        quick: fewer and smaller messages.
    """
    backend = "nccl" if device.type == "cuda" else "gloo"
    # Else torch ends the process when a collective hangs, and with rank 0 the report is lost.
    os.environ |= {"TORCH_NCCL_ASYNC_ERROR_HANDLING": "0", "TORCH_NCCL_ENABLE_MONITORING": "0"}
    speed, link = link_toward(address)
    reductions: list[Reduction] = []
    pairs: list[Pair] = []
    error, stage, init_sec, began = "", "making the process group", 0.0, time.perf_counter()
    with _nccl_log() as transports_of:
        try:
            _make_group(backend, PrefixStore("doctor", store), rank, world_size, device)
            init_sec = time.perf_counter() - began
            stage = "the all-reduce"
            sizes = GPU_SIZES if backend == "nccl" else SIZES
            _all_reduces(QUICK_SIZES if quick else sizes, device, reductions)
            stage = "messages between nodes"
            _all_pairs(rank, nodes, device, pairs)
        except (RuntimeError, OSError) as failure:
            error = " ".join(str(failure).split())[:300]
        finally:
            if dist.is_initialized() and not error:
                dist.destroy_process_group()
        transports = transports_of()
    return Traffic(
        backend=backend,
        init_sec=init_sec,
        reductions=reductions,
        pairs=pairs,
        transports=transports,
        link_bytes_per_sec=speed,
        link=link,
        error=error,
        stage=stage if error else "",
    )


def _make_group(
    backend: str, store: Store, rank: int, world_size: int, device: torch.device
) -> None:
    dist.init_process_group(
        backend,
        store=store,
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=TIMEOUT_SEC),
        device_id=device if backend == "nccl" else None,
    )
    _timed(lambda: dist.all_reduce(torch.zeros(1, device=device)), device)  # connects


def _all_reduces(sizes: tuple[int, ...], device: torch.device, found: list[Reduction]) -> None:
    """Time growing sizes; the times that decide how it goes on are rank 0's, for all ranks."""
    for size in sizes:
        tensor = torch.zeros(size // 4, device=device)

        def once(tensor: Tensor = tensor) -> None:
            dist.all_reduce(tensor)

        first = torch.tensor(_timed(once, device), device=device)
        dist.broadcast(first, src=0)
        sec = float(first)
        repeats = max(3, min(MOST_REPEATS, int(ENOUGH_SEC / sec)))
        times = [_timed(once, device) for _ in range(repeats)]
        found.append(Reduction(num_bytes=size, sec=statistics.median(times)))
        if sec > SLOW_ENOUGH_SEC:
            return


def _all_pairs(rank: int, nodes: dict[str, int], device: torch.device, found: list[Pair]) -> None:
    """Let every two nodes exchange messages, as many pairs at once as there are."""
    name_of = {number: name for name, number in nodes.items()}
    size = PAIR_BYTES if device.type == "cpu" else GPU_PAIR_BYTES
    small, large = torch.zeros(1, device=device), torch.zeros(size // 4, device=device)
    for matches in rounds(sorted(name_of)):
        dist.barrier()
        partner = {**matches, **{b: a for a, b in matches.items()}}.get(rank)
        if partner is None:
            continue
        ping = _exchange_sec(small, partner, PING_REPEATS)
        load = _exchange_sec(large, partner, PAIR_REPEATS)
        if rank < partner:
            pair = [name_of[rank], name_of[partner]]
            found.append(Pair(nodes=pair, latency_sec=ping, bytes_per_sec=size / load))
    dist.barrier()


def rounds(players: list[int]) -> list[dict[int, int]]:
    """Return rounds in which everybody meets everybody once, each at most once a round."""
    ring: list[int | None] = [*players, *([None] if len(players) % 2 else [])]
    found = []
    for _ in range(len(ring) - 1):
        half = len(ring) // 2
        matches = zip(ring[:half], reversed(ring[half:]), strict=True)
        found.append({a: b for a, b in matches if a is not None and b is not None})
        ring = [ring[0], ring[-1], *ring[1:-1]]  # the circle method
    return found


def _exchange_sec(tensor: Tensor, partner: int, repeats: int) -> float:
    """Return the least time that it takes to send a tensor and receive one: the link's own."""
    theirs = torch.empty_like(tensor)

    def exchange() -> None:
        sides = [dist.P2POp(dist.isend, tensor, partner), dist.P2POp(dist.irecv, theirs, partner)]
        for work in dist.batch_isend_irecv(sides):
            work.wait()

    exchange()  # connects
    return min(_timed(exchange, tensor.device) for _ in range(repeats))


def _timed(work: Callable[[], object], device: torch.device) -> float:
    """Return how long `work` takes, on the device too."""
    began = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began


@contextlib.contextmanager
def _nccl_log() -> Iterator[Callable[[], dict[str, int]]]:
    """Have NCCL write down what it uses, unless the user has it write elsewhere."""
    if "NCCL_DEBUG" in os.environ or "NCCL_DEBUG_FILE" in os.environ:
        yield dict
        return
    with tempfile.TemporaryDirectory(prefix="doctor-") as folder:
        path = Path(folder) / "nccl.txt"
        os.environ |= {"NCCL_DEBUG": "INFO", "NCCL_DEBUG_FILE": str(path)}
        try:
            yield lambda: transports_in(path.read_text()) if path.exists() else {}
        finally:
            del os.environ["NCCL_DEBUG"], os.environ["NCCL_DEBUG_FILE"]


def transports_in(log: str) -> dict[str, int]:
    """Count NCCL's channels by what carries them, from its own log (NCCL_DEBUG=INFO)."""
    return dict(Counter(TRANSPORT.findall(log)))
