"""A model of scale: what a step takes on more ranks than are at hand, from what was measured here.

Time of an all-reduce of n bytes over p ranks, with latency a and bandwidth b of a link:
    ring    2 (p - 1) a + 2 (p - 1) / p * n / b     (Patarasuk and Yuan 2009, JPDC 69:117)
    tree    2 log2(p) a + 2 n / b                   (Sanders, Speck, Traeff 2009, ParCo 35:581)
and on nodes of g ranks: a reduce-scatter inside, an all-reduce of a g-th between the nodes, an
all-gather inside. On the networks below the shorter of ring and tree counts, as NCCL chooses; on
the link found here the ring, to which it is fitted.

Imports no torch.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

BUCKET_BYTES, FIRST_BUCKET_BYTES = 25 << 20, 1 << 20  # DistributedDataParallel's
RING_BYTES = 1 << 10  # smaller sums are no measure of a ring
COUNTS = (8, 64, 512, 4096, 16384)
# Llama 3's 54 days on 16,384 H100: 419 unplanned stops (arXiv:2407.21783, section 3.3.4).
MTBF_HOURS = 50_000.0


@dataclass(frozen=True, slots=True)
class Link:
    """What carries messages."""

    latency_sec: float  # of one hop
    bytes_per_sec: float


@dataclass(frozen=True, slots=True)
class Network:
    """Nodes of `node_size` ranks: `inside` them, and `between` them for each rank."""

    name: str
    inside: Link
    between: Link
    node_size: int


# Per GPU and direction, as libraries reach it rather than as the data sheet says: NVLink 4 450 GB/s
# and NDR InfiniBand 400 Gb/s by NVIDIA's DGX H100 user guide, four fifths of that; latencies as in
# NCCL's own cost model (nccl/src/graph/tuning.cc, LL128 and simple protocols), rounded.
NETWORKS = (
    Network("NVLink, InfiniBand 400 Gb/s a GPU", Link(3e-6, 360e9), Link(8e-6, 40e9), 8),
    Network("NVLink, Ethernet 100 Gb/s a node", Link(3e-6, 360e9), Link(3e-5, 10e9 / 8), 8),
    Network("PCIe 4, Ethernet 25 Gb/s a node", Link(8e-6, 20e9), Link(4e-5, 2.5e9 / 8), 8),
)


@dataclass(frozen=True, slots=True)
class Step:
    """One rank's step without the others, and what it must exchange."""

    before_sec: float  # data, host, forward: all but the next two
    backward_sec: float
    after_sec: float  # optimizer
    jitter_sec: float  # standard deviation of the whole, between ranks and steps
    gradient_times: tuple[tuple[int, float], ...]  # (bytes, share of the backward), in order
    overlapped: bool

    @property
    def alone_sec(self) -> float:
        return self.before_sec + self.backward_sec + self.after_sec


def ring_sec(num_bytes: float, count: int, link: Link) -> float:
    """Return the time of an all-reduce in a ring of `count` ranks."""
    hops, moved = _ring(count)
    return hops * link.latency_sec + moved * num_bytes / link.bytes_per_sec


def all_reduce_sec(num_bytes: float, count: int, link: Link) -> float:
    """Return the time of an all-reduce over `count` ranks on one kind of link: ring or tree."""
    if count == 1:
        return 0.0
    a, b = link.latency_sec, link.bytes_per_sec
    tree = 2 * math.log2(count) * a + 2 * num_bytes / b
    return min(ring_sec(num_bytes, count, link), tree)


def hierarchical_sec(num_bytes: float, count: int, network: Network) -> float:
    """Return the time of an all-reduce over `count` ranks on nodes of several."""
    inside = min(count, network.node_size)
    nodes = math.ceil(count / inside)
    if nodes == 1:
        return all_reduce_sec(num_bytes, inside, network.inside)
    link = network.inside
    half = (inside - 1) * link.latency_sec + (inside - 1) / inside * num_bytes / link.bytes_per_sec
    return 2 * half + all_reduce_sec(num_bytes / inside, nodes, network.between)


def fitted_link(sweep: Sequence[Sequence[float]], count: int) -> Link | None:
    """Return the link whose ring explains the measured (bytes, seconds) with least relative error.

    A number or two, which no ring cuts into pieces, are left out: they travel another way, up to
    20 times as fast with gloo. None for one rank, or for times that do not grow with size.
    """
    sweep = [(size, sec) for size, sec in sweep if size >= max(RING_BYTES, 4 * count)]
    if count < 2 or len(sweep) < 2:
        return None
    # Weighted least squares of sec = x * hops + y * moved, weights 1 / sec^2.
    hops, moved = _ring(count)
    rows = [(hops / sec, moved * size / sec) for size, sec in sweep]
    aa, ab, bb = (
        sum(r[0] * r[0] for r in rows),
        sum(r[0] * r[1] for r in rows),
        sum(r[1] * r[1] for r in rows),
    )
    a1, b1 = sum(r[0] for r in rows), sum(r[1] for r in rows)
    determinant = aa * bb - ab * ab
    if determinant <= 0:
        return None
    latency, per_byte = (a1 * bb - b1 * ab) / determinant, (b1 * aa - a1 * ab) / determinant
    if per_byte <= 0:
        return None
    return Link(max(latency, 0.0), 1 / per_byte)


def step_sec(step: Step, count: int, reduce: Any, *, late_sec: float | None = None) -> float:
    """Return the time of a step on `count` ranks; `reduce(bytes, count)` is one all-reduce's.

    The slowest of `count` ranks sets the pace. Where it was not measured how late that is
    (`late_sec`), it is taken for the largest of so many normal values (Blom 1958, Statistical
    Estimates and Transformed Beta-Variables).
    """
    if count == 1:
        return step.alone_sec
    late = late_by_jitter(step, count) if late_sec is None else late_sec
    sizes = [size for size, _ in step.gradient_times]
    if not step.overlapped:
        return step.alone_sec + late + reduce(sum(sizes), count)
    free = 0.0  # when the link has sent all before, counted from the backward's begin
    for size, share in buckets(step.gradient_times):
        free = max(free, share * step.backward_sec) + reduce(size, count)
    exposed = max(0.0, free - step.backward_sec)
    return step.alone_sec + late + exposed


def late_by_jitter(step: Step, count: int) -> float:
    """Return by how much the slowest of `count` ranks is expected to be late."""
    return step.jitter_sec * NormalDist().inv_cdf((count - 0.375) / (count + 0.25))


def buckets(gradient_times: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    """Return (bytes, ready at this share of the backward) of DistributedDataParallel's buckets."""
    found: list[tuple[int, float]] = []
    size, limit = 0, FIRST_BUCKET_BYTES
    for number, (num_bytes, share) in enumerate(gradient_times):
        size += num_bytes
        if size >= limit or number == len(gradient_times) - 1:
            found.append((size, share))
            size, limit = 0, BUCKET_BYTES
    return found


def goodput(count: int, *, save_sec: float, restart_sec: float, mtbf_hours_of_one: float) -> float:
    """Return the share of the time that is useful, with failures and the best save period.

    Saves cost `save_sec` every sqrt(2 * save_sec * M) seconds (Young 1974, CACM 17:530), M being
    the mean time between failures of all; a failure costs half a period and a restart.
    """
    mean = 3600 * mtbf_hours_of_one / count
    period = math.sqrt(2 * max(save_sec, 1e-3) * mean)
    lost = max(save_sec, 1e-3) / period + (period / 2 + restart_sec) / mean
    return max(0.0, 1 - lost)


def step_of(result: dict[str, Any]) -> Step | None:
    """Return the step of a usual rank of a setup, as it was measured without the others.

    Only the wait for data is that of the whole step.
    """
    parts = result["parts_sec"]
    if parts is None:
        return None
    last = max((sec for _, sec in result["gradient_times"]), default=0.0) or 1.0
    return Step(
        before_sec=parts["data"] + result["alone_sec"] - parts["backward"] - parts["optimizer"],
        backward_sec=parts["backward"],
        after_sec=parts["optimizer"],
        jitter_sec=result["jitter_sec"],
        gradient_times=tuple((size, sec / last) for size, sec in result["gradient_times"]),
        overlapped=result["sync"] == "ddp",
    )


def predictions(setups: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """Return the model's error where it can be measured, and what it says of larger counts.

    Weak scaling of the step of the largest setup. What is checked is predicted from steps without
    the other ranks, also how late the slowest of them is, and from the sweep of all-reduces, by the
    ring that the sweep was fitted to: the residual of the very run would hide the model's error.
    The wait for data is no matter of the model: it is taken as it was measured. So is how long a
    step waits for cores, where ranks want more than their host has; of larger counts that is not
    known, and left out.
    """
    checked = []
    for result in setups:
        step, link = step_of(result), None
        if result["num_ranks"] > 1:
            link = fitted_link(result["all_reduce"], result["num_ranks"])
        if step is None or link is None:
            continue
        found = link

        def measured(size: float, count: int, link: Link = found) -> float:
            return ring_sec(size, count, link)

        late = result["parts_sec"]["waiting"]
        told = step_sec(step, result["num_ranks"], measured, late_sec=late)
        told += result["crowded_sec"]
        checked.append(
            {
                "num_ranks": result["num_ranks"],
                "batch_size": result["batch_size"],
                "latency_sec": link.latency_sec,
                "bytes_per_sec": link.bytes_per_sec,
                "late_sec": late,
                "predicted_late_sec": late_by_jitter(step, result["num_ranks"]),
                "predicted_sec": told,
                "measured_sec": result["step_sec"]["value"],
                "error": told / result["step_sec"]["value"] - 1,
            }
        )
    largest = max(setups, key=lambda result: result["num_ranks"])
    step = step_of(largest)
    if step is None:
        return None
    networks = []
    for network in NETWORKS:

        def across(size: float, count: int, network: Network = network) -> float:
            return hierarchical_sec(size, count, network)

        shares = [[count, step.alone_sec / step_sec(step, count, across)] for count in COUNTS]
        networks.append({"name": network.name, "efficiency": shares})
    usual = {
        "save_sec": largest["save_sec"],
        "restart_sec": largest["start_to_first_step_sec"],
        "mtbf_hours_of_one": MTBF_HOURS,
    }
    useful = [[count, goodput(count, **usual)] for count in COUNTS]
    return {"checked": checked, "networks": networks, "goodput": usual | {"shares": useful}}


def _ring(count: int) -> tuple[float, float]:
    """Return the messages that follow each other, and how many times all bytes a rank sends."""
    return 2.0 * (count - 1), 2.0 * (count - 1) / count
