"""Where the time of a step goes: one launch's blocks, taken apart. Imports no torch."""

import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

# In the order of a step. `residual` is what the others, each measured by itself, leave over.
PARTS = (
    "data",
    "forward",
    "backward",
    "optimizer",
    "host",
    "waiting",
    "all_reduce",
    "residual",
)
MEANS = {
    "data": "waiting for data",
    "forward": "forward",
    "backward": "backward",
    "optimizer": "optimizer",
    "host": "the loop itself: guards, sums, learning rate",
    "waiting": "waiting for the slowest rank",
    "all_reduce": "all-reduce that is not hidden",
    "residual": "not explained",
}


def step_seconds(launch: dict[str, Any]) -> float:
    """Return the seconds of a step: the mean over the ranks and the usual rounds."""
    means = _block_means(launch, "full")
    return statistics.fmean(means[number] for number in usual_rounds(launch))


def relative_step(launch: dict[str, Any]) -> float:
    """Return how many times as long as the fixed net's a step takes, by the usual ratio.

    Each piece of a block of steps is divided by what the net took right before and after it; of
    these ratios the mean of the middle half counts.
    """
    ranks, ratios = launch["ranks"], list[float]()
    for number, beside in enumerate(ranks[0]["reference_sec"]):
        each = len(ranks[0]["blocks"]["full"][number]) // len(beside)
        for piece in range(len(beside)):
            steps = slice(piece * each, (piece + 1) * each)
            means = [statistics.fmean(rank["blocks"]["full"][number][steps]) for rank in ranks]
            reference = [rank["reference_sec"][number][piece] for rank in ranks]
            ratios.append(statistics.fmean(means) / statistics.fmean(reference))
    ratios.sort()
    left_out = len(ratios) // 4  # at each end
    return statistics.fmean(ratios[left_out : len(ratios) - left_out])


def usual_rounds(launch: dict[str, Any]) -> list[int]:
    """Return the rounds that count: of all, those in the middle half by their whole length.

    One was disturbed, in another the machine ran faster than it usually does. All parts are means
    over the same rounds: so they add up to the step, whatever its noise, and what is not explained
    is nothing that the choice of a mean or a median for each has made.
    """
    ways = [_block_means(launch, way) for way in launch["ranks"][0]["blocks"]]
    lengths = [sum(means) for means in zip(*ways, strict=True)]
    order = sorted(range(len(lengths)), key=lambda number: lengths[number])
    left_out = len(order) // 4  # at each end
    return sorted(order[left_out : len(order) - left_out])


def parts_of(launch: dict[str, Any]) -> dict[str, float] | None:
    """Return seconds by part, each the mean of `rounds_of`; None if there are none."""
    rounds = rounds_of(launch)
    if not rounds:
        return None
    return {name: statistics.fmean(found[name] for found in rounds) for name in PARTS}


def rounds_of(launch: dict[str, Any]) -> list[dict[str, float]]:
    """Return seconds by part of each usual round; none if the ways it needs were not measured.

    data: full less ready; where a rank's step loads its batch itself, what that adds to the slowest
    of the ranks, step by step, each by its usual step alone. all_reduce: a step whose batch is
    ready less the slowest of the ranks alone, step by step. waiting: that slowest less the usual
    rank. host: the usual rank alone (of one rank: ready) less bare. forward, backward, optimizer:
    timed within the bare loop of the usual rank. residual: of the bare loop what lies between
    these three.
    """
    ranks = launch["ranks"]
    if "bare" not in ranks[0]["blocks"]:
        return []
    numbers = usual_rounds(launch)
    usual = ranks.index(_usual_rank(ranks, numbers))
    data = _data_seconds(ranks, numbers)
    return [_round(ranks, usual, *pair) for pair in zip(numbers, data, strict=True)]


def _usual_rank(ranks: list[dict[str, Any]], numbers: list[int]) -> dict[str, Any]:
    """Return the rank whose steps alone are the lower median, in all of these rounds together.

    In each round by itself it would be the one that was lucky.
    """
    if len(ranks) == 1:
        return ranks[0]
    order = sorted(ranks, key=lambda rank: _alone_sec(rank, numbers))
    return order[(len(order) - 1) // 2]


def _alone_sec(rank: dict[str, Any], numbers: list[int]) -> float:
    return statistics.fmean(statistics.fmean(rank["blocks"]["alone"][n]) for n in numbers)


def _round(ranks: list[dict[str, Any]], usual: int, number: int, data: float) -> dict[str, float]:
    """Return the parts by the blocks of one round, which follow each other."""
    blocks = {way: [rank["blocks"][way][number] for rank in ranks] for way in ranks[0]["blocks"]}
    mean = {way: [statistics.fmean(block) for block in found] for way, found in blocks.items()}
    full = statistics.fmean(mean["full"])
    ready = full - data
    bare, phases = mean["bare"][usual], ranks[usual]["phases"][number]
    forward, backward, optimizer = (statistics.fmean(step[i] for step in phases) for i in range(3))
    if len(ranks) == 1:  # alone it is anyhow
        alone = slowest = ready
    else:
        alone = mean["alone"][usual]
        slowest = statistics.fmean(max(step) for step in zip(*blocks["alone"], strict=True))
    parts = {
        "data": data,
        "forward": forward,
        "backward": backward,
        "optimizer": optimizer,
        "host": alone - bare,
        "waiting": slowest - alone,
        "all_reduce": ready - slowest,
    }
    return parts | {"residual": full - sum(parts.values())}


def _data_seconds(ranks: list[dict[str, Any]], numbers: list[int]) -> list[float]:
    """Return what a step waits for its batch, of each round."""
    if "ready" in ranks[0]["blocks"]:
        return [
            statistics.fmean(
                statistics.fmean(rank["blocks"]["full"][number])
                - statistics.fmean(rank["blocks"]["ready"][number])
                for rank in ranks
            )
            for number in numbers
        ]
    paces = [0.0] if len(ranks) == 1 else [_alone_sec(rank, numbers) for rank in ranks]
    found = []
    for number in numbers:
        steps = zip(*(rank["waits"][number] for rank in ranks), strict=True)
        found.append(statistics.fmean(_slowest_by(paces, waits) for waits in steps))
    return found


def _slowest_by(paces: list[float], waits: tuple[float, ...]) -> float:
    """Return how much later the slowest of the ranks is for these waits."""
    return max(map(sum, zip(paces, waits, strict=True))) - max(paces)


def alone_seconds(launch: dict[str, Any]) -> float | None:
    """Return the seconds of the usual rank's step without the others, its batch ready.

    None if it was not measured.
    """
    ranks, numbers = launch["ranks"], usual_rounds(launch)
    if len(ranks) == 1:
        return step_seconds(launch) - statistics.fmean(_data_seconds(ranks, numbers))
    if "alone" not in ranks[0]["blocks"]:
        return None
    return _alone_sec(_usual_rank(ranks, numbers), numbers)


def crowded_seconds(launch: dict[str, Any]) -> float:
    """Return how much longer a step takes whose ranks want more cores than their host has.

    Alone, ranks drift apart, and one computes while another sleeps or waits; in step with each
    other all want the cores at once, and the last is done when the host has done the work of all.
    What a rank waited for a core alone, too, is no part of it. On a GPU the host is busy with
    waiting, which says nothing: 0.
    """
    hosts: dict[str, list[dict[str, Any]]] = {}
    for rank in launch["ranks"]:
        hosts.setdefault(rank["host"], []).append(rank)
    found = 0.0
    for ranks in hosts.values():
        if ranks[0]["device"] != "cpu" or not ranks[0]["alone_cpu_sec"]:
            continue
        cores = len({core for rank in ranks for core in rank["cores"]})
        work = [statistics.median(rank["alone_cpu_sec"]) for rank in ranks]
        alone = max(work) / min(ranks[0]["threads"], cores)
        delay = _usual([statistics.median(rank["alone_core_delay_sec"]) for rank in ranks])
        found = max(found, sum(work) / cores - alone - delay)
    return found


def slowest_rank(launch: dict[str, Any]) -> tuple[int, str, float] | None:
    """Return (rank, host, times a usual rank's step) of the slowest rank, measured alone."""
    ranks = launch["ranks"]
    if len(ranks) == 1 or "alone" not in ranks[0]["blocks"]:
        return None
    times = [_median_block(rank, "alone") for rank in ranks]
    worst = max(range(len(ranks)), key=lambda number: times[number])
    return ranks[worst]["rank"], ranks[worst]["host"], times[worst] / _usual(times)


def lost(parts: dict[str, float], alone: dict[str, float], *, shrink: float) -> dict[str, float]:
    """Return the seconds of each part beyond those that one rank would need for its share.

    Args:
        parts: on several ranks.
        alone: on one rank.
        shrink: the batch of one rank, as a share of that on one rank.
    """
    return {name: parts[name] - shrink * alone[name] for name in PARTS}


@dataclass(frozen=True, slots=True)
class Losses:
    """What a point of a curve has lost to the first of it, by which its others are measured."""

    name: str
    sec: dict[str, float]  # by part
    half_sec: dict[str, float | None]  # of the interval of each
    step_sec: float


def losses_of(setups: list[dict[str, Any]]) -> list[Losses]:
    """Return the losses of each point, but for the first of a curve."""
    return [
        Losses(
            name=f"{scaling}, {result['num_ranks']} x {result['batch_size']}",
            sec=parts,
            half_sec=result["lost_half_sec"][scaling],
            step_sec=result["step_sec"]["value"],
        )
        for result in setups
        for scaling, parts in result["lost_sec"].items()
    ]


def steps_of_one(launch: dict[str, Any]) -> list[float]:
    """Return the seconds of single steps of rank 0 by itself, its batch ready."""
    rank = launch["ranks"][0]
    for way in ("alone", "ready"):
        if way in rank["blocks"]:
            return [sec for block in rank["blocks"][way] for sec in block]
    blocks = zip(rank["blocks"]["full"], rank["waits"], strict=True)
    pairs = [pair for block in blocks for pair in zip(*block, strict=True)]
    return [sec - wait for sec, wait in pairs]


def all_steps(launch: dict[str, Any]) -> Iterator[float]:
    """Yield the seconds of every measured step of rank 0."""
    for block in launch["ranks"][0]["blocks"]["full"]:
        yield from block


def _block_means(launch: dict[str, Any], way: str) -> list[float]:
    blocks = zip(*(rank["blocks"][way] for rank in launch["ranks"]), strict=True)
    return [statistics.fmean(statistics.fmean(block) for block in ranks) for ranks in blocks]


def _median_block(rank: dict[str, Any], way: str) -> float:
    return statistics.median(statistics.fmean(block) for block in rank["blocks"][way])


def _usual(values: list[float]) -> float:
    return statistics.median_low(values)
