"""From launches to the numbers of the report: a plain dictionary, of the schema that SCHEMA names.

    schema, created, command, experiment, repeats, seconds
    machine         host, cpu, cores, device, torch, python
    setups          one for each number of ranks and batch:
        num_ranks, num_nodes, global_batch_size, batch_size (of rank 0), scalings
        step_sec, images_per_sec        {value, low, high}: 95 % intervals over the launches
        step_sec_of_launches            what they are made of
        step_sec_p50, _p90, _p99        of all single steps
        speedup, efficiency             by scaling: {value, low, high}, against the fewest ranks
        parts_sec, lost_sec             by part (breakdown.PARTS); lost: against the fewest ranks
        parts_half_sec, lost_half_sec   half of their 95 % intervals; null: not known
        parts_sec_of_launches           what they are made of
        alone_sec                       a usual rank's step without the others, its batch ready
        jitter_sec                      standard deviation of the steps of one rank alone
        crowded_sec                     what a step is longer for having more ranks than cores
        slowest_rank                    rank, host, times
        mfu, peak_flops_per_sec, peak_source, flops_per_sample
        memory_bytes                    of the rank with most
        warm_up_steps, steady, start_to_first_step_sec
        save_sec                        what a step waits for when the state is saved
        reference_sec_of_launches       a fixed small net's step: how fast the machine was
        relative_step_of_launches       a step by that of the fixed net beside it
        precision, memory_format, sync, all_reduce, gradient_bytes, gradient_times,
        micro_batch_size, threads, loader (memory or workers), dataset, notice
    advice          text, part, gain (share of the step's time)
    scale           checked: the model of scale against what was measured; networks: what it says;
                    goodput: the useful share of the time with failures, and what it assumes

A new key leaves the schema's number as it is: readers do without what an older report lacks. One
that goes, or means something else, raises it. Imports no torch.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from dist_train.bench.breakdown import (
    PARTS,
    all_steps,
    alone_seconds,
    crowded_seconds,
    lost,
    relative_step,
    rounds_of,
    slowest_rank,
    step_seconds,
    steps_of_one,
)
from dist_train.bench.intervals import Estimate, geometric_mean_of, mean_of, quantile
from dist_train.bench.launches import Setup

SCHEMA = "dist_train.bench/4"
QUANTILES = (("p50", 0.5), ("p90", 0.9), ("p99", 0.99))


def results_of(measured: Sequence[tuple[Setup, Sequence[dict[str, Any]]]]) -> list[dict[str, Any]]:
    """Return the results of all setups; each comes with its launches, one of every round."""
    results = [_result(setup, launches) for setup, launches in measured]
    for result in results:
        result["speedup"], result["efficiency"] = {}, {}
        for scaling in result["scalings"]:
            base = _base_of(result, results, scaling)
            ratios = [
                _rate(base, ours) / _rate(result, mine)
                for mine, ours in zip(
                    result["step_sec_of_launches"], base["step_sec_of_launches"], strict=True
                )
            ]
            speedup = geometric_mean_of([1 / ratio for ratio in ratios])
            share = base["num_ranks"] / result["num_ranks"]
            result["speedup"][scaling] = _finite(asdict(speedup))
            result["efficiency"][scaling] = _finite(asdict(speedup.scaled(share)))
            if result is not base and result["parts_sec"] and base["parts_sec"]:
                shrink = result["batch_size"] / base["batch_size"]
                result["lost_sec"][scaling] = lost(
                    result["parts_sec"], base["parts_sec"], shrink=shrink
                )
                result["lost_half_sec"][scaling] = _lost_half(result, base, shrink=shrink)
    return results


def _result(setup: Setup, launches: Sequence[dict[str, Any]]) -> dict[str, Any]:
    first = launches[0]["ranks"][0]
    times = [step_seconds(launch) for launch in launches]
    step = geometric_mean_of(times)
    rate = step.inverted(setup.global_batch_size)
    singles = [sec for launch in launches for sec in all_steps(launch)]
    peak, source = _peak_of(launches)
    needed = first["flops_per_sample"] * setup.global_batch_size / step.value
    return {
        **asdict(setup),
        "scalings": list(setup.scalings),
        "batch_size": first["batch_size"],
        "step_sec": _finite(asdict(step)),
        "images_per_sec": _finite(asdict(rate)),
        "step_sec_of_launches": times,
        **{f"step_sec_{name}": quantile(singles, share) for name, share in QUANTILES},
        **_parts(launches, times, step.value),
        "lost_sec": {},
        "lost_half_sec": {},
        "alone_sec": _alone(launches, times, step.value),
        "jitter_sec": _jitter(launches),
        "crowded_sec": statistics.median(map(crowded_seconds, launches)),
        "slowest_rank": _slowest(launches),
        "mfu": needed / (setup.num_ranks * peak),
        "peak_flops_per_sec": peak,
        "peak_source": source,
        "memory_bytes": max(r["memory_bytes"] for launch in launches for r in launch["ranks"]),
        "warm_up_steps": max(launch["ranks"][0]["warm_up_steps"] for launch in launches),
        "steady": all(launch["ranks"][0]["steady"] for launch in launches),
        "start_to_first_step_sec": statistics.median(
            launch["ranks"][0]["start_to_first_step_sec"] for launch in launches
        ),
        "save_sec": statistics.median(launch["ranks"][0]["save_sec"] for launch in launches),
        "reference_sec_of_launches": [
            statistics.median(
                sec
                for rank in launch["ranks"]
                for beside in rank["reference_sec"]
                for sec in beside
            )
            for launch in launches
        ],
        "relative_step_of_launches": [relative_step(launch) for launch in launches],
        "all_reduce": _median_reductions(launches),
        **{
            key: first[key]
            for key in (
                "dataset",
                "notice",
                "precision",
                "memory_format",
                "sync",
                "flops_per_sample",
                "gradient_bytes",
                "gradient_times",
                "loader",
                "micro_batch_size",
                "threads",
                "device",
            )
        },
    }


def _jitter(launches: Sequence[dict[str, Any]]) -> float:
    """Return the standard deviation of the steps of one rank alone, outliers left out."""
    found = []
    for launch in launches:
        steps = steps_of_one(launch)
        found.append((quantile(steps, 0.84) - quantile(steps, 0.16)) / 2)
    return statistics.median(found)


def _parts(
    launches: Sequence[dict[str, Any]], times: Sequence[float], step_sec: float
) -> dict[str, Any]:
    """Return the parts of a step of `step_sec`, and half of the interval of each.

    They are mean shares of the launches' own steps. The interval is the wider one of those over
    the launches and over all rounds: of rounds alone if launches differ no more than by chance.
    """
    found = [rounds_of(launch) for launch in launches]
    if not all(found):
        return {"parts_sec": None, "parts_half_sec": None, "parts_sec_of_launches": None}
    parts, halves, of_launches = {}, {}, [dict[str, float]() for _ in launches]
    for name in PARTS:
        shares = [
            [one[name] / whole for one in rounds]
            for rounds, whole in zip(found, times, strict=True)
        ]
        means = [statistics.fmean(rounds) for rounds in shares]
        for told, mean, whole in zip(of_launches, means, times, strict=True):
            told[name] = whole * mean
        parts[name] = step_sec * statistics.fmean(means)
        over_rounds = mean_of([share for rounds in shares for share in rounds])
        halves[name] = step_sec * max(_half(over_rounds), _half(mean_of(means)))
    return {
        "parts_sec": parts,
        "parts_half_sec": _finite(halves),
        "parts_sec_of_launches": of_launches,
    }


def _lost_half(
    result: dict[str, Any], base: dict[str, Any], *, shrink: float
) -> dict[str, float | None]:
    """Return half of the interval of breakdown.lost, over the launches, which are paired."""
    pairs = list(zip(result["parts_sec_of_launches"], base["parts_sec_of_launches"], strict=True))
    halves = {}
    for name in PARTS:
        over_launches = mean_of([mine[name] - shrink * alone[name] for mine, alone in pairs])
        halves[name] = _half(over_launches)
    return _finite(halves)


def _half(estimate: Estimate) -> float:
    return estimate.high - estimate.value


def _alone(
    launches: Sequence[dict[str, Any]], times: Sequence[float], step_sec: float
) -> float | None:
    found = [sec for sec in map(alone_seconds, launches) if sec is not None]
    return step_sec * _mean_share(found, times) if found else None


def _mean_share(found: Sequence[float], times: Sequence[float]) -> float:
    return statistics.fmean(sec / whole for sec, whole in zip(found, times, strict=True))


def _slowest(launches: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """Return the rank that is the slowest in most launches, and by how much it usually is."""
    found = [slow for slow in map(slowest_rank, launches) if slow is not None]
    if not found:
        return None
    ranks = [rank for rank, _, _ in found]
    rank = statistics.mode(ranks)
    mine = [(host, times) for number, host, times in found if number == rank]
    times = statistics.median(times for _, times in mine)
    return {"rank": rank, "host": mine[0][0], "times": times, "in": f"{len(mine)}/{len(found)}"}


def _peak_of(launches: Sequence[dict[str, Any]]) -> tuple[float, str]:
    """Return FLOP/s of one rank's device, and where the number is from."""
    first = launches[0]["ranks"][0]
    if first["peak_flops_per_sec"] is not None:
        return first["peak_flops_per_sec"], f"data sheet, dense, {first['peak_of']}"
    rates = [max(rank["product_flops_per_sec"]) for launch in launches for rank in launch["ranks"]]
    return max(rates), "the fastest product of matrices seen here"


def _median_reductions(launches: Sequence[dict[str, Any]]) -> list[list[float]]:
    rows = [launch["ranks"][0]["all_reduce"] for launch in launches]
    return [
        [row[0][0], statistics.median(sec for _, sec in row)]
        for row in zip(*rows, strict=False)  # a launch may have stopped at a smaller size
    ]


def _base_of(
    result: dict[str, Any], results: Sequence[dict[str, Any]], scaling: str
) -> dict[str, Any]:
    """Return the point of the same curve with the fewest ranks."""
    curve = [other for other in results if scaling in other["scalings"]]
    return min(curve, key=lambda other: other["num_ranks"])


def _rate(result: dict[str, Any], step_sec: float) -> float:
    return result["global_batch_size"] / step_sec


def _finite(values: Mapping[str, float]) -> dict[str, float | None]:
    """JSON knows no infinity: an open end is null."""
    return {key: value if math.isfinite(value) else None for key, value in values.items()}
