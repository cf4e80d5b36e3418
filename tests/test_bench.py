"""The benchmark: its arithmetic on made-up launches, and what it names in real ones."""

import argparse
import contextlib
import errno
import itertools
import json
import math
import os
import random
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from dist_train.bench import compare, once, worker
from dist_train.bench import main as bench_main
from dist_train.bench.advice import advice_for
from dist_train.bench.breakdown import (
    MEANS,
    PARTS,
    alone_seconds,
    crowded_seconds,
    parts_of,
    relative_step,
    slowest_rank,
    step_seconds,
    steps_of_one,
    usual_rounds,
)
from dist_train.bench.intervals import geometric_mean_of, mean_of
from dist_train.bench.launches import FIXED, Setup, settings_of, setups_of
from dist_train.bench.machine_speed import peak_of
from dist_train.bench.main import main
from dist_train.bench.once import memory_format_of
from dist_train.bench.page import _bars, _figure, write_page
from dist_train.bench.report import as_text
from dist_train.bench.results import SCHEMA, results_of
from dist_train.bench.scale import (
    Link,
    Step,
    all_reduce_sec,
    buckets,
    fitted_link,
    goodput,
    predictions,
    step_sec,
)
from dist_train.bench.steady import warm_up_length
from dist_train.bench.ways import Steps
from dist_train.claim import open_run
from dist_train.config import Config, ConfigError
from dist_train.config.compose import compose
from dist_train.data.loaders import open_data
from dist_train.data.memory_loader import MemoryLoader
from dist_train.data.worker_loader import WorkerLoader
from dist_train.device import threads_asked, threads_of
from dist_train.distributed import Ranks, start_ranks
from dist_train.layout import Layout
from dist_train.metrics import Meter
from dist_train.plan import make_plan
from dist_train.start import build_parts
from dist_train.state import Parts
from dist_train.trial import throw_away_step
from tests.ranks import run_ranks
from tests.settings import small

BLOCKS, STEPS = 5, 8


def made_up_rank(number: int, batch: int, **sec: float) -> dict[str, Any]:
    """Return what a rank would have measured whose ways take so long, without any noise."""
    phases = [sec["forward"], sec["backward"], sec["optimizer"]]
    return {
        "rank": number,
        "host": f"node{number}",
        "blocks": {
            way: [[sec[way]] * STEPS for _ in range(BLOCKS)]
            for way in ("full", "ready", "alone", "bare")
        },
        "phases": [[phases] * STEPS for _ in range(BLOCKS)],
        "reference_sec": [[0.001] * 2] * BLOCKS,
        "product_flops_per_sec": [1e11] * BLOCKS,
        "flops_per_sample": 1e6,
        "peak_flops_per_sec": None,
        "memory_bytes": 1e9,
        "warm_up_steps": 5,
        "steady": True,
        "start_to_first_step_sec": 4.0,
        "save_sec": 0.01,
        "all_reduce": [(1024, 0.001), (1_000_000, 0.002)],
        "batch_size": batch,
        "dataset": "cifar10",
        "notice": None,
        "precision": "fp32",
        "memory_format": "channels_last",
        "sync": "flat",
        "gradient_bytes": 4_000_000,
        "gradient_times": [(1_000_000, 0.001), (3_000_000, 0.004)],
        "loader": "workers",
        "micro_batch_size": None,
        "threads": 1,
        "cores": [0, 1],
        "alone_cpu_sec": [0.002] * BLOCKS,
        "alone_core_delay_sec": [0.0] * BLOCKS,
        "device": "cpu",
    }


ALONE = {"forward": 0.002, "backward": 0.004, "optimizer": 0.001, "bare": 0.0071}


def one(**more: float) -> dict[str, Any]:
    sec = {"full": 0.009, "ready": 0.008, "alone": 0.0, **ALONE, **more}
    rank = made_up_rank(0, 64, **sec)
    del rank["blocks"]["alone"]  # it is alone anyhow
    return {"ranks": [rank | {"alone_cpu_sec": [], "alone_core_delay_sec": []}]}


def two(slow: float = 1.0, **more: float) -> dict[str, Any]:
    sec = {"full": 0.013, "ready": 0.012, "alone": 0.008, **ALONE, **more}
    late = {name: slow * value for name, value in sec.items() if name not in ("full", "ready")}
    return {"ranks": [made_up_rank(0, 32, **sec), made_up_rank(1, 32, **sec | late)]}


def now_and_then(late_sec: float, data: float) -> dict[str, Any]:
    """Return a launch of two ranks of which now the one, now the other is late: half of that is
    what they wait on the average.
    """
    both = 0.008 + late_sec
    launch = two(bare=0.008 + late_sec / 2, ready=both, full=both + data)
    for number, rank in enumerate(launch["ranks"]):
        block = [0.008 + late_sec * (n % 2 == number) for n in range(STEPS)]
        rank["blocks"]["alone"] = [block] * BLOCKS
    return launch


def test_the_parts_of_a_step_are_what_was_left_out() -> None:
    parts = parts_of(two(slow=1.25))
    assert parts is not None
    assert tuple(parts) == PARTS
    expected = {
        "data": 0.001,
        "forward": 0.002,
        "backward": 0.004,
        "optimizer": 0.001,
        "host": 0.0009,
        "waiting": 0.002,
        "all_reduce": 0.002,
        "residual": 0.0001,
    }
    assert parts == pytest.approx(expected)
    assert slowest_rank(two(slow=1.25)) == (1, "node1", pytest.approx(1.25))


def at_speeds(launch: dict[str, Any], speeds: Callable[[], float], *rounds: int) -> dict[str, Any]:
    """Return the launch with the blocks of some rounds so many times as long, each by itself."""
    for rank in launch["ranks"]:
        for way, blocks in rank["blocks"].items():
            for number in rounds:
                times = speeds()
                blocks[number] = [times * sec for sec in blocks[number]]
                if way == "bare":
                    phases = rank["phases"][number]
                    rank["phases"][number] = [[times * sec for sec in step] for step in phases]
    return launch


def test_the_parts_add_up_to_the_step_whatever_the_noise() -> None:
    dice = random.Random(0)
    for _ in range(10):
        launch = at_speeds(two(), lambda: dice.uniform(0.7, 1.6), *range(BLOCKS))
        parts = parts_of(launch)
        assert parts is not None
        assert sum(parts.values()) == pytest.approx(step_seconds(launch))
        assert 0.00007 < parts["residual"] < 0.00016, "what the bare loop does between its phases"
    launches = [at_speeds(two(), lambda: dice.uniform(0.7, 1.6), *range(BLOCKS)) for _ in range(4)]
    [setup] = setups_of([(2, 0)], 64, ("strong",))
    [result] = results_of([(setup, launches)])
    assert sum(result["parts_sec"].values()) == pytest.approx(result["step_sec"]["value"])


def test_a_round_that_was_disturbed_does_not_count() -> None:
    quiet = two()
    disturbed = at_speeds(two(), lambda: 10.0, 3)
    assert parts_of(disturbed) == pytest.approx(parts_of(quiet))
    assert step_seconds(disturbed) == pytest.approx(0.013)


def test_the_usual_rank_is_the_same_in_all_rounds() -> None:
    """Now the one is lucky, now the other: the luckiest of each round would be no usual rank."""
    launch = two(ready=0.010, full=0.010)
    for number, rank in enumerate(launch["ranks"]):
        rank["blocks"]["alone"] = [
            [0.008 + 0.002 * (n % 2 == number)] * STEPS for n in range(BLOCKS)
        ]
    parts = parts_of(launch)
    assert parts is not None
    assert usual_rounds(launch) == [1, 2, 3]
    mean = (0.008 + 0.010 + 0.008) / 3  # of rank 0, which was lucky twice
    assert parts["waiting"] == pytest.approx(0.010 - mean)
    assert parts["host"] == pytest.approx(mean - 0.0071)
    assert alone_seconds(launch) == pytest.approx(mean)


def test_a_step_is_divided_by_what_was_measured_beside_it() -> None:
    """A machine that is slow for a while is slow for both; what hits one alone counts no round."""
    launch = at_speeds(two(), lambda: 3.0, 1, 2)
    for rank in launch["ranks"]:
        rank["reference_sec"] = [[sec] for sec in (0.001, 0.003, 0.003, 0.001, 0.0001)]
    assert relative_step(launch) == pytest.approx(13.0)


def test_each_piece_of_a_block_is_divided_by_what_is_beside_it() -> None:
    """The machine has become slow in the middle of every block."""
    launch = two()
    for rank in launch["ranks"]:
        half = STEPS // 2
        for block in rank["blocks"]["full"]:
            block[half:] = [3 * sec for sec in block[half:]]
        rank["reference_sec"] = [[0.001, 0.003]] * BLOCKS
    assert relative_step(launch) == pytest.approx(13.0)


@pytest.mark.parametrize(
    ("length", "workers", "pieces"),
    [(2, False, 1), (5, False, 2), (50, False, 3), (50, True, 1)],
)
def test_a_block_is_cut_where_that_costs_little(length: int, workers: bool, pieces: int) -> None:
    """Not where batches would be loaded between, or where as many steps would not be measured."""
    assert worker.pieces_of_block(length, workers=workers) == pieces


def own_loading(launch: dict[str, Any], *waits: float) -> dict[str, Any]:
    """Return the launch as if each rank's step loaded its batch itself, in so many seconds."""
    for rank, sec in zip(launch["ranks"], waits, strict=True):
        del rank["blocks"]["ready"]
        rank["loader"] = "memory"
        rank["waits"] = [[sec if step % 2 else 0.0 for step in range(STEPS)]] * BLOCKS
    return launch


def test_what_a_step_loads_itself_is_data_and_the_slowest_rank_counts() -> None:
    parts = parts_of(own_loading(two(slow=1.25), 0.0004, 0.001))
    assert parts is not None
    assert parts["data"] == pytest.approx(0.0005)
    assert parts["all_reduce"] == pytest.approx(0.0125 - 0.010)
    assert sum(parts.values()) == pytest.approx(0.013)
    # A rank that nobody waits for may load its batch meanwhile.
    hidden = parts_of(own_loading(two(slow=1.25), 0.001, 0.0))
    assert hidden is not None
    assert hidden["data"] == 0.0
    late = parts_of(own_loading(two(slow=1.25), 0.003, 0.0))
    assert late is not None
    assert late["data"] == pytest.approx((0.011 - 0.010) / 2)
    launch = own_loading(one(), 0.002)
    assert alone_seconds(launch) == pytest.approx(0.008)
    assert steps_of_one(launch)[:2] == pytest.approx([0.009, 0.007])
    parts = parts_of(launch)
    assert parts is not None
    assert (parts["data"], parts["host"]) == pytest.approx((0.001, 0.008 - 0.0071))


def test_the_interval_of_a_part_is_that_of_its_rounds() -> None:
    launches = [two(), two()]
    for launch in launches:
        for rank in launch["ranks"]:
            for number in range(BLOCKS):  # the length of a round stays the same
                more = 0.0002 * (number - 2)
                rank["blocks"]["full"][number] = [0.013 + more] * STEPS
                rank["blocks"]["ready"][number] = [0.012 - more] * STEPS
    [setup] = setups_of([(2, 0)], 64, ("strong",))
    [result] = results_of([(setup, launches)])
    data = [0.001 + 0.0004 * (number - 2) for number in range(BLOCKS)]
    used = [data[number] for number in usual_rounds(launches[0])] * 2
    expected = mean_of(used)
    assert result["parts_sec"]["data"] == pytest.approx(expected.value, rel=0.01)
    assert result["parts_half_sec"]["data"] == pytest.approx(
        expected.high - expected.value, rel=0.02
    )
    assert result["parts_half_sec"]["host"] == pytest.approx(0.0, abs=1e-9)


def test_launches_that_differ_make_the_interval_wider() -> None:
    [single, pair] = setups_of([(1, 0), (2, 0)], 64, ("strong",))
    pairs = [two(alone=0.008), two(alone=0.009)]
    [_, result] = results_of([(single, [one(), one()]), (pair, pairs)])
    spread = mean_of([0.0009, 0.0019])
    assert result["parts_half_sec"]["host"] == pytest.approx(spread.high - spread.value)
    assert [parts["host"] for parts in result["parts_sec_of_launches"]] == pytest.approx(
        [0.0009, 0.0019]
    )
    # One rank: 0.0009 in both launches; half the batch, half of that.
    assert result["lost_sec"]["strong"]["host"] == pytest.approx(0.0014 - 0.00045)
    assert result["lost_half_sec"]["strong"]["host"] == pytest.approx(spread.high - spread.value)
    assert result["lost_half_sec"]["strong"]["forward"] == pytest.approx(0.0, abs=1e-9)


def test_a_cost_that_is_sure_comes_before_a_larger_one_that_may_be_noise() -> None:
    [setup] = setups_of([(2, 0)], 64, ("strong",))
    [result] = results_of([(setup, [two(), two()])])
    parts = dict.fromkeys(PARTS, 0.001) | {"data": 0.0015, "host": 0.002}
    halves = dict.fromkeys(PARTS, 0.002) | {"data": 0.0001}
    unsure = result | {"parts_sec": parts, "parts_half_sec": halves}
    advice = advice_for(unsure)
    assert advice is not None
    assert advice["part"] == "data"
    assert "12% (± 1%) shorter" in advice["text"]
    for other in (dict.fromkeys(PARTS, 0.01), dict.fromkeys(PARTS, None)):  # nothing is sure
        advice = advice_for(unsure | {"parts_half_sec": other})
        assert advice is not None
        assert advice["part"] == "host"
        assert ("not sure (± 77%)" in advice["text"]) is (other["host"] is not None)


def test_one_rank_waits_for_nobody() -> None:
    parts = parts_of(one())
    assert parts is not None
    assert parts["waiting"] == parts["all_reduce"] == 0.0


def measured_setups() -> list[tuple[Setup, list[dict[str, Any]]]]:
    [single, pair] = setups_of([(1, 0), (2, 0)], 64, ("strong",))
    return [(single, [one(), one(full=0.0092)]), (pair, [two(), two(full=0.0132)])]


def test_speed_up_is_paired_by_round() -> None:
    [single, pair] = results_of(measured_setups())
    assert single["speedup"]["strong"]["value"] == pytest.approx(1.0)
    expected = (0.009 / 0.013 * 0.0092 / 0.0132) ** 0.5
    assert pair["speedup"]["strong"]["value"] == pytest.approx(expected)
    assert pair["efficiency"]["strong"]["value"] == pytest.approx(expected / 2)
    assert pair["images_per_sec"]["value"] == pytest.approx(64 / (0.013 * 0.0132) ** 0.5)
    # Half the batch: half of every part is no loss.
    assert pair["lost_sec"]["strong"]["forward"] == pytest.approx(0.002 - 0.001, rel=1e-3)
    json.dumps([single, pair], allow_nan=False)


def test_strong_and_weak_scaling_meet_at_the_largest_count() -> None:
    found = setups_of([(1, 0), (2, 0), (4, 0)], 64, ("strong", "weak"))
    points = [(s.num_ranks, s.global_batch_size, s.scalings) for s in found]
    assert points == [
        (1, 64, ("strong",)),
        (1, 16, ("weak",)),
        (2, 64, ("strong",)),
        (2, 32, ("weak",)),
        (4, 64, ("strong", "weak")),
    ]
    with pytest.raises(ConfigError, match="4 ranks cannot share"):
        setups_of([(4, 0)], 3, ("strong",))


@pytest.mark.parametrize(
    ("launches", "part", "words"),
    [
        ([two(full=0.030)], "data", "data.loader=memory"),
        ([own_loading(two(full=0.021), 0.018, 0.018)], "data", "data.crop_padding"),
        ([two(slow=1.9, ready=0.0162, full=0.0163)], "waiting", "Rank 1 on node1 takes 1.90 times"),
        ([two(ready=0.030, full=0.0301)], "all_reduce", "parallel.sync=ddp"),
        ([two(alone=0.020, ready=0.0202, full=0.0203)], "host", "Python needs"),
        ([two(alone=0.0071, ready=0.0072, full=0.0072)], "compute", "precision=bf16"),
        ([now_and_then(0.004, data=0.0018)], "data", "data.loader=memory"),  # they wait 0.0020
        ([now_and_then(0.008, data=0.0018)], "waiting", "each of them now and then"),
        ([now_and_then(0.0008, data=0.0001)], "waiting", "each of them now and then"),
    ],
)
def test_the_largest_loss_is_what_to_change_first(
    launches: list[dict[str, Any]], part: str, words: str
) -> None:
    [setup] = setups_of([(2, 0)], 64, ("strong",))
    [result] = results_of([(setup, launches)])
    advice = advice_for(result)
    assert advice is not None
    assert advice["part"] == part
    assert words in advice["text"]


@pytest.mark.parametrize(("sync", "hides"), [("flat", True), ("ddp", False), ("fixed", False)])
def test_ddp_is_advised_where_it_can_be_had(sync: str, hides: bool) -> None:
    [setup] = setups_of([(2, 0)], 64, ("strong",))
    [result] = results_of([(setup, [two(ready=0.030, full=0.0301)])])
    advice = advice_for(result | {"sync": sync, "gradient_bytes": 1320})
    assert advice is not None
    assert ("parallel.sync=ddp" in advice["text"]) == hides
    assert "0.00132 MB" in advice["text"]


def test_a_warm_up_is_found_where_it_ends() -> None:
    dice = random.Random(0)
    noise = [1 + 0.02 * dice.random() for _ in range(200)]
    assert warm_up_length(noise[:19]) is None
    found = warm_up_length([5.0, 4.0, 3.0, 2.0] * 5 + noise)
    assert found is not None
    assert 15 <= found <= 30
    assert warm_up_length([100 - i for i in range(60)]) is None, "it still falls"
    spike = [*noise[:50], 50.0, *noise[50:]]
    assert (warm_up_length(spike) or 0) < 60


def test_intervals_are_those_of_student() -> None:
    found = mean_of([1.0, 2.0, 3.0])
    assert (found.value, round(found.high - found.value, 3)) == (2.0, 2.484)
    ratio = geometric_mean_of([2.0, 2.0])
    assert (ratio.low, ratio.high) == pytest.approx((2.0, 2.0))


def test_a_link_is_found_again_from_its_own_times() -> None:
    link = Link(50e-6, 2e9)
    sizes = (4, 1 << 10, 64 << 10, 1 << 20, 16 << 20)
    sweep = [(size, 2 * 3 * 50e-6 + 1.5 * size / 2e9) for size in sizes]
    found = fitted_link(sweep, 4)
    assert found is not None
    assert found.latency_sec == pytest.approx(link.latency_sec)
    assert found.bytes_per_sec == pytest.approx(link.bytes_per_sec)
    assert fitted_link(sweep, 1) is None
    assert fitted_link([(1 << 10, 1.0), (1 << 20, 0.5)], 2) is None
    sweep[0] = (4, 2e-5)  # one number goes another way
    assert fitted_link(sweep, 4) == found
    assert fitted_link(sweep[:2], 4) is None


def test_the_model_of_scale_hides_what_the_backward_covers() -> None:
    sizes = tuple((1 << 20, (n + 1) / 8) for n in range(8))
    step = Step(0.01, 0.08, 0.01, 0.0, sizes, overlapped=False)
    link = Link(0.0, 1e9)

    def reduce(size: float, count: int) -> float:
        return all_reduce_sec(size, count, link)

    flat = step_sec(step, 2, reduce)
    assert flat == pytest.approx(0.1 + reduce(8 << 20, 2))
    hidden = step_sec(Step(0.01, 0.08, 0.01, 0.0, sizes, overlapped=True), 2, reduce)
    last = buckets(sizes)[-1][0]
    assert hidden == pytest.approx(0.1 + reduce(last, 2))
    assert step_sec(step, 1, reduce) == pytest.approx(0.1)
    late = step_sec(Step(0.01, 0.08, 0.01, 0.001, sizes, overlapped=False), 64, reduce)
    assert late > step_sec(step, 64, reduce)


@pytest.mark.parametrize(
    ("count", "deviations"),  # Harter 1961, Biometrika 48:151, table 1
    [(2, 0.56419), (3, 0.84628), (8, 1.42360), (20, 1.86748), (100, 2.50759)],
)
def test_the_slowest_of_some_ranks_is_as_late_as_the_largest_of_normal_values(
    count: int, deviations: float
) -> None:
    step = Step(0.01, 0.08, 0.01, 0.001, ((4, 1.0),), overlapped=False)
    late = step_sec(step, count, lambda size, count: 0.0) - step.alone_sec
    assert late / step.jitter_sec == pytest.approx(deviations, rel=0.05)


def test_goodput_falls_with_ranks_and_with_the_cost_of_a_save() -> None:
    usual = {"save_sec": 1.0, "restart_sec": 60.0, "mtbf_hours_of_one": 50_000.0}
    found = [goodput(count, **usual) for count in (8, 1024, 16384)]
    assert found == sorted(found, reverse=True)
    assert found[0] > 0.99
    assert goodput(1024, **usual | {"save_sec": 30.0}) < found[1]


def test_what_the_model_says_stands_beside_its_error() -> None:
    told = predictions(results_of(measured_setups()))
    assert told is not None
    [check] = told["checked"]
    assert check["error"] == pytest.approx(check["predicted_sec"] / check["measured_sec"] - 1)
    assert all(0 < share <= 1 for n in told["networks"] for _, share in n["efficiency"])
    shares = [share for _, share in told["goodput"]["shares"]]
    assert shares == sorted(shares, reverse=True)
    assert shares[-1] > 0.9, "16,384 ranks that save in 10 ms and restart in 4 s"


def check_of(result: dict[str, Any]) -> dict[str, Any]:
    told = predictions([result])
    assert told is not None
    [check] = told["checked"]
    return check


def test_the_checked_prediction_knows_nothing_of_the_run_s_residual() -> None:
    [_, pair] = results_of(measured_setups())
    parts = pair["parts_sec"]
    odd = pair | {"parts_sec": parts | {"residual": parts["residual"] + 0.005}}
    assert check_of(odd)["predicted_sec"] == check_of(pair)["predicted_sec"]
    link = fitted_link(pair["all_reduce"], 2)
    assert link is not None
    assert pair["alone_sec"] == pytest.approx(0.008, rel=1e-3)
    expected = pair["alone_sec"] + parts["data"] + 2 * link.latency_sec + 4e6 / link.bytes_per_sec
    assert check_of(pair)["predicted_sec"] == pytest.approx(expected)
    late = pair | {"parts_sec": parts | {"waiting": 0.003}}
    assert check_of(late)["predicted_sec"] == pytest.approx(expected + 0.003)


def test_the_checked_prediction_is_by_the_ring_that_was_fitted() -> None:
    """Where a tree, of less latency, would be much faster."""
    launch = two()
    launch["ranks"] = [rank | {"rank": n} for n, rank in enumerate(launch["ranks"] * 2)]
    for rank in launch["ranks"]:
        rank["all_reduce"] = [(n, 6 * 0.01 + 1.5 * n / 1e9) for n in (1 << 10, 1 << 20, 16 << 20)]
    [setup] = setups_of([(4, 0)], 128, ("strong",))
    [result] = results_of([(setup, [launch, launch])])
    expected = 0.008 + result["parts_sec"]["data"] + 6 * 0.01 + 1.5 * 4e6 / 1e9
    assert check_of(result)["predicted_sec"] == pytest.approx(expected)
    assert all_reduce_sec(4e6, 4, Link(0.01, 1e9)) == pytest.approx(4 * 0.01 + 2 * 4e6 / 1e9)


def test_more_ranks_than_cores_wait_for_the_cores() -> None:
    launch = two()
    assert crowded_seconds(launch) == 0.0  # a host for each
    for rank in launch["ranks"]:
        rank["host"] = "node0"
    assert crowded_seconds(launch) == 0.0  # two cores for two
    launch["ranks"] *= 4
    assert crowded_seconds(launch) == pytest.approx(8 * 0.002 / 2 - 0.002)
    for rank in launch["ranks"]:
        rank["threads"] = 2
    assert crowded_seconds(launch) == pytest.approx(8 * 0.002 / 2 - 0.002 / 2)
    [setup] = setups_of([(8, 0)], 256, ("strong",))
    [result] = results_of([(setup, [launch, launch])])
    less = (
        check_of(result)["predicted_sec"] - check_of(result | {"crowded_sec": 0.0})["predicted_sec"]
    )
    assert less == pytest.approx(0.007)
    for rank in launch["ranks"]:
        rank["alone_core_delay_sec"] = [0.006] * BLOCKS  # alone they were in each other's way, too
    assert crowded_seconds(launch) == pytest.approx(0.001)
    for number, rank in enumerate(launch["ranks"]):
        launch["ranks"][number] = rank | {"cores": [number]}
    assert crowded_seconds(launch) == 0.0  # a core for each
    for rank in launch["ranks"]:
        rank |= {"cores": [0, 1], "device": "NVIDIA H200"}
    assert crowded_seconds(launch) == 0.0


def report_of(setups: list[dict[str, Any]]) -> dict[str, Any]:
    machine = {"cpu": "c", "device": "cpu", "torch": "2", "python": "3"}
    return {
        "setups": setups,
        "created": "then",
        "command": "dist-train bench",
        "experiment": "e",
        "repeats": 2,
        "machine": machine,
        "advice": advice_for(setups[-1]),
        "scale": predictions(setups),
    }


def times(result: dict[str, Any], factor: float, machine: float = 1.0) -> dict[str, Any]:
    noise = [1.0, 1.004, 0.997, 1.001]
    step = [0.010 * n * factor * machine for n in noise]
    return result | {
        "step_sec_of_launches": step,
        "reference_sec_of_launches": [0.001 * machine for _ in noise],
        "relative_step_of_launches": [sec / (0.001 * machine) for sec in step],
    }


def test_a_slower_machine_is_no_slower_code() -> None:
    [single, _] = results_of(measured_setups())
    old = report_of([times(single, 1.0)])
    for factor, machine, changed in ((1.0, 1.2, False), (1.05, 1.0, True), (0.9, 1.1, True)):
        new = report_of([times(single, factor, machine)])
        [line] = compare.compare(old, new)
        assert line["changed"] is changed
        assert line["change"] == pytest.approx(factor - 1, abs=0.001)
        assert line["machine"] == pytest.approx(machine - 1, abs=0.001)
    told = compare.as_text(compare.compare(old, old), old, old)
    assert "no change of the step time beyond noise, which would hide one of 1.5%" in told


@pytest.mark.parametrize("change", [0.0, 0.5])
def test_a_comparison_of_two_noisy_launches_has_nothing_to_tell(change: float) -> None:
    [single, _] = results_of(measured_setups())
    old = report_of([times(single, 1.0) | {"relative_step_of_launches": [10.0, 17.0]}])
    noisy = [10.0 * (1 + change), 17.0 * (1 + change)]
    new = report_of([times(single, 1.0) | {"relative_step_of_launches": noisy}])
    lines = compare.compare(old, new)
    assert not lines[0]["changed"]
    assert lines[0]["hidden"] > 10
    assert "of over 1,000%; both" in compare.as_text(lines, old, new)
    assert "nothing can be told, as noise hides changes" in compare.as_text(lines, old, new)


@pytest.mark.parametrize(("more", "machine"), [(0.1, 0.7), (0.1, 1.6), (-0.1, 1.4), (-0.1, 0.6)])
def test_the_part_that_made_the_change_is_named_on_a_faster_and_a_slower_machine(
    more: float, machine: float
) -> None:
    """Of code with a slower data path and of one with a faster."""
    [single, _] = results_of(measured_setups())
    parts = single["parts_sec"]
    step = sum(parts.values())
    other = {name: machine * sec for name, sec in parts.items()}
    other["data"] += machine * more * step
    old = report_of([times(single, 1.0)])
    changed = {"parts_sec": other, "step_sec": {"value": machine * (1 + more) * step}}
    new = report_of([single])
    new["setups"] = [times(single, 1 + more, machine) | changed]
    [line] = compare.compare(old, new)
    assert line["part"] == "data"
    assert "most of it waiting for data" in compare.as_text([line], old, new)


def test_another_job_is_told_when_reports_are_compared() -> None:
    [single, _] = results_of(measured_setups())
    old = report_of([times(single, 1.0) | {"threads": 2}])
    del old["setups"][0]["micro_batch_size"]
    changed = {"threads": 1, "precision": "bf16", "memory_format": "contiguous"}
    changed |= {"dataset": "synthetic", "gradient_bytes": 8_000_000}
    changed["micro_batch_size"] = 32
    new = report_of([times(single, 1.0) | changed]) | {"experiment": "f"}
    [line] = compare.compare(old, new)
    formats = ["channels_last", "contiguous"]
    changes = {"precision": ["fp32", "bf16"], "memory_format": formats, "threads": [2, 1]}
    changes |= {"dataset": ["cifar10", "synthetic"], "gradient_bytes": [4_000_000, 8_000_000]}
    assert line["differs"] == changes
    told = compare.as_text([line], old, new)
    assert "not the same experiment: e then, f now" in told
    assert "1 rank, batch 64: not the same threads: 2 then, 1 now" in told
    assert "nothing can be told: the fixed net that both are divided by ran with another" in told
    assert "beyond noise" not in told
    assert "not the same" not in compare.as_text(compare.compare(old, old), old, old)


def test_the_report_shows_every_part_and_curve() -> None:
    text = as_text(report_of(results_of(measured_setups())))
    assert "MFU: of 0.1 TFLOP/s a rank (the fastest product of matrices seen here)" in text
    assert "strong scaling" in text
    assert "not explained" in text
    assert "NVLink" in text
    assert "(a failure of each GPU in 50,000 hours; a save stalls 10.0 ms" in text


def test_launches_that_have_little_in_common_are_told_to() -> None:
    setups = results_of(measured_setups())
    assert "***" not in as_text(report_of(setups))
    setups[1]["step_sec"] = {"value": 0.0247, "low": 1e-7, "high": 3507.0}
    text = as_text(report_of(setups))
    assert "24.70 ± over 100%" in text
    assert "*** the launches of 2 x 32 differ too much" in text
    assert "*** the launches of 1 x 64" not in text


def test_the_report_says_what_was_trained_on() -> None:
    assert as_text(report_of(results_of(measured_setups()))).startswith("e with cifar10 on cpu, ")
    setups = results_of(measured_setups())
    for result in setups:
        result |= {"dataset": "synthetic", "notice": "NOT CIFAR-10"}
    [head, notice, *_] = as_text(report_of(setups)).splitlines()
    assert head.startswith("e with synthetic on cpu, ")
    assert notice == "*** NOT CIFAR-10 ***"


def test_the_page_holds_all_of_the_report(tmp_path: Path) -> None:
    report = report_of(results_of(measured_setups()))
    page, picture = write_page(report, tmp_path / "report.html")
    text = page.read_text()
    assert "<svg" in text
    assert "http" not in text.split("<svg")[0], "it needs nothing from elsewhere"
    assert "parallel.sync=ddp" in text
    assert picture.read_bytes()[:4] == b"\x89PNG"


def test_what_efficiency_lacks_is_told_by_part() -> None:
    setups = results_of(measured_setups())
    [_, pair] = setups
    [_, table] = as_text(report_of(setups)).split("why efficiency was lost")
    [_, head, *rows] = table.split("\n\n")[0].splitlines()
    assert head.split("  ")[-1] == "strong, 2 x 32"
    names, told = zip(*(row.strip().split("  ", 1) for row in rows), strict=True)
    assert names == (*(MEANS[part] for part in PARTS), "together")
    assert told[names.index("backward")].strip() == "+2.00 (+15.3%)"
    assert told[names.index("not explained")].strip() == "+0.05 (+0.4%)"
    lacking = 1 - pair["efficiency"]["strong"]["value"]
    assert told[-1].strip() == f"+8.55 ({lacking:+.1%})"


def test_one_count_has_lost_nothing() -> None:
    [setup] = setups_of([(1, 0)], 64, ("strong",))
    report = report_of(results_of([(setup, [one(), one()])]))
    text = as_text(report)
    assert "why efficiency was lost" not in text
    assert "here: no all-reduce was measured" in text
    panels = panels_of(report)
    assert set(panels) == {"rates", "shares", "predicted", "parts"}
    assert "error: not measured" in panels["predicted"].get_title()


def panels_of(report: dict[str, Any]) -> dict[str, Any]:
    return {axes.get_label(): axes for axes in _figure(report).axes}


def curves_of(axes: Any) -> dict[str, tuple[list[float], list[float]]]:
    """Return what each entry of the legend draws: (x, y)."""
    handles, labels = axes.get_legend_handles_labels()
    lines = [getattr(handle, "lines", [handle])[0] for handle in handles]
    return {
        label: (list(line.get_xdata()), list(line.get_ydata()))
        for label, line in zip(labels, lines, strict=True)
    }


def test_the_measured_curves_have_an_ideal_and_intervals() -> None:
    setups = results_of(measured_setups())
    panels = panels_of(report_of(setups))
    for panel, ideals in (("rates", {"strong, ideal"}), ("shares", {"ideal"})):
        curves = curves_of(panels[panel])
        assert set(curves) == {"strong"} | ideals
        handles, labels = panels[panel].get_legend_handles_labels()
        assert handles[labels.index("strong")].has_yerr
    rate = setups[0]["images_per_sec"]["value"]
    assert curves_of(panels["rates"])["strong, ideal"][1] == pytest.approx([rate, 2 * rate])
    assert curves_of(panels["shares"])["ideal"][1] == [1.0, 1.0], "100 % at every count"


@pytest.mark.parametrize(
    ("rates", "low"),
    [((4000, 4400), 0.9), ((900, 1100), 1), ((3000, 24_000), 1), ((0.5, 1e6), 1), ((80, 90), 1e-6)],
)
def test_images_a_second_are_written_in_full(rates: tuple[float, float], low: float) -> None:
    setups = results_of(measured_setups())
    for result, rate in zip(setups, rates, strict=True):
        result["images_per_sec"] = {"value": rate, "low": low * rate, "high": rate / low}
    report = report_of(setups)
    figure = _figure(report)
    [axes] = [axes for axes in figure.axes if axes.get_label() == "rates"]
    least, most = axes.get_ylim()
    ticks = [tick for tick in axes.get_yticks() if least <= tick <= most]
    labels = axes.yaxis.get_major_formatter().format_ticks(ticks)
    assert len(ticks) >= 2
    assert [float(label.replace(",", "")) for label in labels] == pytest.approx(ticks)
    assert axes.yaxis.get_minorticklocs().size == 0


def test_the_predicted_efficiency_is_a_curve_with_its_error_beside_it() -> None:
    report = report_of(results_of(measured_setups()))
    scale = report["scale"]
    axes = panels_of(report)["predicted"]
    curves = curves_of(axes)
    assert curves.pop("ideal")[1] == [1.0, 1.0]
    assert list(curves) == [network["name"] for network in scale["networks"]]
    for network in scale["networks"]:
        counts, shares = map(list, zip(*network["efficiency"], strict=True))
        assert curves[network["name"]] == (counts, shares)
        assert (counts[0], counts[-1]) == (8, 16384)
    [check] = scale["checked"]
    assert f"2 x 32: {check['error']:+.1%}" in axes.get_title().replace("\xa0", " ")


def test_the_page_draws_what_was_lost_and_writes_what_is_not_explained() -> None:
    setups = results_of(measured_setups())
    panels = panels_of(report_of(setups))
    axes = panels["lost"]
    [lost] = [result["lost_sec"]["strong"] for result in setups if result["lost_sec"]]
    drawn = [patch.get_width() for patch in axes.patches]
    assert drawn == pytest.approx([1000 * lost[part] for part in PARTS])
    [name] = [label.get_text() for label in axes.get_yticklabels()]
    assert name.splitlines() == ["strong, 2 x 32", "not explained: +0.05 ms"]
    colours = [patch.get_facecolor() for patch in panels["parts"].patches[:: len(setups)]]
    assert [patch.get_facecolor() for patch in axes.patches] == colours, "one legend for both"


def test_a_page_without_parts_has_the_curves(tmp_path: Path) -> None:
    [single, pair] = measured_setups()
    for _, launches in (single, pair):
        for rank in (rank for launch in launches for rank in launch["ranks"]):
            rank["blocks"].pop("alone", None)
            del rank["blocks"]["bare"]
    report = report_of(results_of([single, pair]))
    assert set(panels_of(report)) == {"rates", "shares"}
    write_page(report, tmp_path / "report.html")


def test_the_bars_of_the_page_add_up_to_the_step(tmp_path: Path) -> None:
    parts = parts_of(two(alone=0.0065, ready=0.011, full=0.0105))
    assert parts is not None
    assert min(parts.values()) < 0
    bars = _bars(parts)
    assert sum(width for _, width in bars.values()) == pytest.approx(0.0105)
    spans = sorted((min(at, at + sec), max(at, at + sec)) for at, sec in bars.values() if sec)
    for (_, end), (start, _) in itertools.pairwise(spans):
        assert start == pytest.approx(end), "they neither overlap nor leave a gap"
    [setup] = setups_of([(2, 0)], 64, ("strong",))
    report = report_of(results_of([(setup, [two(alone=0.0065)] * 2)]))
    page, _ = write_page(report, tmp_path / "report.html")
    assert "came out negative" in page.read_text(), "matplotlib writes each text as a comment"


@pytest.mark.parametrize(
    ("name", "precision", "tera_flops", "told"),
    [
        ("NVIDIA A100-SXM4-80GB", "bf16", 312, "bf16"),
        ("NVIDIA A100-SXM4-80GB", "fp32", 156, "TF32"),
        ("NVIDIA H200", "fp32", 495, "TF32"),
        ("Tesla V100-SXM2-16GB", "fp32", 15.7, "fp32"),
    ],
)
def test_a_peak_is_that_of_the_units_in_use(
    name: str, precision: str, tera_flops: float, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = peak_of(name, precision)
    assert found is not None
    assert found[0] == pytest.approx(1e12 * tera_flops)
    assert found[1].startswith(told)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    without = peak_of(name, precision)
    assert without is not None
    assert "TF32" not in without[1]
    assert peak_of("a GPU of tomorrow", precision) is None


@pytest.mark.parametrize("form", [torch.channels_last, torch.contiguous_format])
def test_the_report_says_how_weights_lie(form: torch.memory_format) -> None:
    name = str(form).removeprefix("torch.").removesuffix("_format")
    net = torch.nn.Sequential(torch.nn.Conv2d(1, 8, 3), torch.nn.Conv2d(8, 8, 3), torch.nn.ReLU())
    net.to(memory_format=form)
    assert memory_format_of(net) == name
    results = [result | {"memory_format": name} for result in results_of(measured_setups())]
    assert f"fp32, {name};" in as_text(report_of(results))


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("Tesla T4", 65.0),
        ("Tesla V100-SXM2-16GB", 125.0),
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA A100 80GB PCIe", 312.0),
        ("NVIDIA H100 80GB HBM3", 989.0),
        ("NVIDIA H100 PCIe", 756.0),
        ("NVIDIA H200", 989.0),
        ("NVIDIA L40S", 362.0),
        ("NVIDIA GeForce RTX 4090", 165.0),
        *((f"NVIDIA {name}", None) for name in ("T400 4GB", "T400", "A10", "A10G", "A1000", "L4")),
        *((f"NVIDIA {name}", None) for name in ("L40", "GH200 480GB", "GB200", "H100 NVL")),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None),
        ("NVIDIA GeForce RTX 4090 D", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA GeForce RTX 3090 Ti", None),
    ],
)
def test_a_gpu_has_the_peak_of_its_own_name(name: str, peak: float | None) -> None:
    found = peak_of(name, "fp16")
    assert found == (None if peak is None else (1e12 * peak, "fp16"))


def test_the_report_says_which_peak_it_means() -> None:
    launch = one()
    launch["ranks"][0] |= {"peak_flops_per_sec": 156e12, "peak_of": "TF32"}
    [setup] = setups_of([(1, 0)], 64, ("strong",))
    text = as_text(report_of(results_of([(setup, [launch, launch])])))
    assert "MFU: of 156 TFLOP/s a rank (data sheet, dense, TF32)" in text


@pytest.mark.parametrize(
    ("words", "threads"), [([], 1), (["threads=3"], 3), (["train.order=fixed"], 1)]
)
def test_ranks_compute_with_as_many_threads_at_every_count(
    words: list[str], threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(16)))
    overrides = ["experiment=cifar10_tutorial", "train.global_batch_size=64", *words]
    options = argparse.Namespace(overrides=overrides, config=None, config_dir=None)
    for setup in setups_of([(1, 0), (2, 0), (16, 0)], 64, ("strong",)):
        config = compose(overrides).config
        config = compose(settings_of(setup, options, config, threads=1)).config
        launcher = "single" if setup.num_ranks == 1 else "torchrun"
        layout = Layout(
            launcher=launcher, world_size=setup.num_ranks, local_world_size=setup.num_ranks
        )
        environment = {"OMP_NUM_THREADS": "1"}
        assert threads_of(threads_asked(config), layout, environment) == threads


@pytest.mark.parametrize(
    ("launch_sec", "words", "rounds"),
    [(10.0, [], 8), (19.0, [], 5), (40.0, [], 4), (40.0, ["--repeats", "2"], 2)],
)
def test_as_many_launches_are_made_as_fit_into_five_minutes(
    launch_sec: float,
    words: list[str],
    rounds: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Of each setup as many, in turns, and the last one leaves none to go."""
    now, made = [0.0], list[tuple[int, int]]()
    results = {1: one(), 2: two()}

    def made_up(setup: Setup, *_: Any, number: int, **__: Any) -> dict[str, Any]:
        now[0] += launch_sec
        made.append((number, setup.num_ranks))
        return results[setup.num_ranks]

    monkeypatch.setattr(bench_main, "launch", made_up)
    monkeypatch.setattr(bench_main.time, "monotonic", lambda: now[0])
    assert main(["--nproc", "1,2", *words, "experiment=cifar10_tutorial"]) == 0
    for number in range(rounds):
        ranks = [ranks for launch, ranks in made if launch == number]
        assert sorted(ranks) == [1, 1, 2]
    assert len(made) == 3 * rounds
    said = capsys.readouterr()
    assert f"{rounds} launches of each" in said.out
    assert said.err.splitlines()[-1].endswith(" 0 s to go")
    assert f"launch {3 * rounds} of {3 * rounds}: " in said.err


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--nproc", "0"], "--nproc=0 must be numbers from 1 on"),
        (["--nodes", "1,2"], "--nodes needs an allocation of SLURM"),
        (["--repeats", "1"], "--repeats=1 must be 2 or more"),
        (["--compare", "README.md"], "README.md is no report of this benchmark"),
        (["--compare", "nowhere.json"], "nowhere.json is not there"),
        (["--nproc", "\N{SUPERSCRIPT TWO}"], "must be numbers from 1 on"),
        (["--json", "."], "--json=. is a folder"),
        (["--json", "nowhere/a.json"], "there is no folder nowhere"),
        (["--page", "/proc/a.html"], "--page=/proc/a.html: /proc: "),
        (["optim.lr=fast"], "optim.lr"),
    ],
)
def test_mistakes_are_one_line(
    words: list[str], told: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    assert main([*words, "experiment=cifar10_tutorial"]) == 2
    error = capsys.readouterr().err
    assert told in error
    assert len(error.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("[1]", "is no report of this benchmark"),
        (json.dumps({"schema": SCHEMA}), "is no whole report"),
        (json.dumps({"schema": SCHEMA, "setups": [{}]}), "is no whole report"),
        (json.dumps({"schema": "dist_train.bench/1"}), "is of schema 'dist_train.bench/1'"),
    ],
)
def test_a_file_that_cannot_be_compared_with_is_told_before_anything_is_measured(
    text: str, told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "old.json"
    path.write_text(text)
    assert main(["--compare", str(path), "experiment=cifar10_tutorial"]) == 2
    assert told in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "told"),
    [
        ("--dry-run", "from 4 to 8 launches of each"),
        ("--dry-run", "  1 rank, train.global_batch_size=128: weak scaling"),
        ("--dry-run", "  2 ranks, train.global_batch_size=256: strong and weak scaling"),
        ("--print-config", "global_batch_size: 256"),
    ],
)
def test_what_would_be_measured_is_told_without_measuring(
    option: str, told: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench_main, "launch", lambda *_, **__: pytest.fail("it is measured"))
    words = ["--nproc", "1,2", "experiment=cifar10_tutorial", "train.global_batch_size=256"]
    assert main([option, *words]) == 0
    assert told in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("count", ["1", "2"])
def test_what_only_a_rank_can_refuse_is_one_line(
    count: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """And the folder of folders is made."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    words = ["experiment=cifar10_tutorial", "data=synthetic", "precision=fp16"]
    work_dir = tmp_path / "a" / "b"
    assert main(["--nproc", count, "--work-dir", str(work_dir), *words]) == 2
    [*plan, refusal] = capsys.readouterr().err.splitlines()
    assert "precision=fp16" in refusal
    assert all("launch" in line or "scaling" in line for line in plan)
    assert list(work_dir.iterdir()) == []


def test_a_work_dir_that_cannot_be_made_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    words = ["--work-dir", str(tmp_path / "file" / "b"), "experiment=cifar10_tutorial"]
    assert main(["--nproc", "1", *words]) == 2
    assert "cannot hold the folder of a run: Not a directory" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize(("count", "kind"), [("1", "RuntimeError"), ("2", "MemoryError")])
def test_why_a_rank_failed_is_told(
    count: str,
    kind: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "broken_net.py").write_text(
        f"def net(num_classes):\n    raise {kind}('the net is broken')\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    words = ["experiment=cifar10_tutorial", "data=synthetic", "device=cpu"]
    code = main(["--nproc", count, *words, "model.factory=broken_net:net"])
    error = capsys.readouterr().err
    assert f"{kind}: the net is broken" in error
    if kind == "RuntimeError":  # the user's own mistake, told as such
        assert code == 2
        assert "Traceback" not in error
    else:
        assert code == 1
        assert f"the launch of {count} x {256 // int(count)} failed" in error
    assert "broken_net.py" in error


def test_no_file_of_a_benchmark_holds_a_secret(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench_main, "launch", lambda *_, **__: one())
    secret = "kept-from-all-others"
    words = ["--nproc", "1", "--repeats", "2", f"+model.args.api_key={secret}"]
    words += ["--json", str(tmp_path / "a.json"), "--page", str(tmp_path / "a.html")]
    assert main([*words, "experiment=cifar10_tutorial"]) == 0
    written = [tmp_path / "a.json", tmp_path / "a.html"]
    for text in (*(path.read_text() for path in written), *capsys.readouterr()):
        assert secret not in text
    assert "api_key=[redacted]" in written[0].read_text()


def test_a_file_that_cannot_be_written_costs_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(bench_main, "launch", lambda *_, **__: one())
    monkeypatch.setattr(bench_main, "write_atomically", full)
    words = ["--nproc", "1", "--repeats", "2", "experiment=cifar10_tutorial"]
    words += ["--json", str(tmp_path / "a.json"), "--page", str(tmp_path / "a.html")]
    assert main(words) == 1
    assert "a.json could not be written: No space left on device" in capsys.readouterr().err
    assert (tmp_path / "a.html").is_file()


def test_one_count_is_one_curve(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench_main, "launch", lambda *_, **__: one())
    assert main(["--nproc", "1", "--repeats", "2", "experiment=cifar10_tutorial"]) == 0
    said = capsys.readouterr().out
    assert "strong scaling" in said
    assert "weak scaling: " not in said
    assert "here: no all-reduce was measured that one rank would need" in said


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGKILL])
def test_a_benchmark_that_is_ended_leaves_nothing_behind(
    number: signal.Signals, tmp_path: Path
) -> None:
    """But for its folder, if it was killed."""
    command = [sys.executable, "-m", "dist_train.bench.main", "--nproc", "2"]
    command += ["--scaling", "strong", "--work-dir", str(tmp_path)]
    command += ["experiment=cifar10_tutorial", "data=synthetic", "device=cpu"]
    process = subprocess.Popen(
        command,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),  # as without nohup
    )

    def ranks() -> list[str]:
        found = []
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            with contextlib.suppress(OSError):
                words = path.read_text()
                if (
                    str(tmp_path) in words
                    and "bench.worker" in words
                    and "distributed" not in words
                ):
                    found.append(path.parent.name)
        return found

    while len(ranks()) < 2:
        assert process.poll() is None, "it has ended by itself"
        time.sleep(0.05)
    process.send_signal(number)
    code = process.wait(timeout=60)
    end = time.monotonic() + 60
    while ranks():  # what was killed is there until the kernel has taken it down
        assert time.monotonic() < end, "its ranks go on"
        time.sleep(0.1)
    if number == signal.SIGKILL:
        assert code == -number
        return
    assert code == 128 + number
    assert list(tmp_path.iterdir()) == []


@contextlib.contextmanager
def opened(config: Config) -> Iterator[tuple[Steps, Parts]]:
    """Make what a launch measures with."""
    with start_ranks(config) as ranks, open_run(config, ranks) as run:
        data = open_data(config, ranks)
        plan = make_plan(config, data.num_train, world_size=ranks.world_size)
        parts = build_parts(config, plan, data, run)
        throw_away_step(parts, data, step=0)
        yield Steps(parts, data), parts
        parts.replica.close()


def batches_of_full_blocks(config: Config, ways: list[tuple[str, int]]) -> tuple[list[int], int]:
    """Take blocks; returns the steps at which the loader was asked to begin, and its batches."""
    begun, taken = [], 0

    def noted(real: Any) -> Any:
        def train_batches(self: Any, sampler: Any, first: int, last: int) -> Iterator[Any]:
            nonlocal taken
            begun.append(first)
            for batch in real(self, sampler, first, last):
                taken += 1
                yield batch

        return train_batches

    with pytest.MonkeyPatch.context() as patch:
        for loader in (MemoryLoader, WorkerLoader):
            patch.setattr(loader, "train_batches", noted(loader.train_batches))
        with opened(config) as (steps, _):
            for way, count in ways:
                assert len(steps.block(way, count)) == count
    return begun, taken


@pytest.mark.slow
def test_other_blocks_do_not_start_the_loader_anew(tmp_path: Path) -> None:
    ways = [("full", 2), ("ready", 2), ("full", 2), ("alone", 2), ("bare", 2), ("full", 2)]
    assert run_ranks(batches_of_full_blocks, 0, small(tmp_path), ways) == [([0], 6)]


LATE_SEC = 1.0


def steps_behind_a_barrier(config: Config, lead: int) -> tuple[list[float], int, int, int]:
    """Take a full block of two steps that rank 1 begins late.

    Returns:
        The seconds of the steps, for how many of them there is a wait, how many were taken, and
        how many count for what is due now and then.
    """
    with opened(config) as (steps, _), pytest.MonkeyPatch.context() as patch:
        barrier = Ranks.barrier

        def late(ranks: Ranks) -> None:
            barrier(ranks)
            time.sleep(LATE_SEC * ranks.rank)

        patch.setattr(Ranks, "barrier", late)
        times = steps.block("full", 2, lead=lead)
        patch.undo()
        return times, len(steps.waits), steps._step, steps._loops["full"].progress.step


@pytest.mark.slow
@pytest.mark.parametrize(("lead", "late"), [(0, True), (1, False)])
def test_leaving_a_barrier_late_belongs_to_no_step(lead: int, late: bool, tmp_path: Path) -> None:
    """Without a lead the first step of rank 0 waits for rank 1."""
    [(times, *counts), _] = run_ranks(steps_behind_a_barrier, 2, small(tmp_path), lead)
    assert [len(times), *counts] == [2, 2, 2 + lead, 2]
    assert (sum(times) > LATE_SEC / 2) == late


def ways_of(config: Config) -> list[str]:
    with opened(config) as (steps, _):
        return steps.ways


@pytest.mark.slow
@pytest.mark.parametrize(
    ("world_size", "words", "ways"),
    [
        (0, (), ["full", "bare"]),
        (2, (), ["full", "alone", "bare"]),
        (2, ("data.loader=workers", "data.num_workers=1"), ["full", "ready", "alone", "bare"]),
    ],
)
def test_only_ways_that_tell_something_are_measured(
    world_size: int, words: tuple[str, ...], ways: list[str], tmp_path: Path
) -> None:
    for found in run_ranks(ways_of, world_size, small(tmp_path, *words)):
        assert found == ways


@pytest.mark.slow
def test_what_workers_loaded_ahead_is_taken_before_a_full_block(tmp_path: Path) -> None:
    words = ("data.loader=workers", "data.num_workers=1", "data.image_size=12")
    ways = [("full", 2), ("full", 2), ("ready", 1), ("bare", 1), ("full", 2), ("full", 2)]
    config = small(tmp_path, *words)
    found = run_ranks(batches_of_full_blocks, 0, config, ways)
    ahead = 2 + (config.device == "cuda")
    assert found == [([0], 8 + ahead)], "two batches a worker, and one on a GPU, once"


def meetings_alone(config: Config) -> int:
    count = 0
    meet = Meter.meet

    def counted(self: Meter, *args: Any, **options: Any) -> bool:
        nonlocal count
        count += 1
        return meet(self, *args, **options)

    with pytest.MonkeyPatch.context() as patch, opened(config) as (steps, _):
        patch.setattr("dist_train.metrics.AGREE_EVERY_SEC", 1e9)  # a line decides, not the clock
        patch.setattr(Meter, "meet", counted)
        steps.block("alone", 40)
    return count


@pytest.mark.slow
def test_ranks_alone_add_up_their_numbers_as_often_as_in_training(tmp_path: Path) -> None:
    """At the first step, and for every line."""
    config = small(tmp_path, *FIXED, "log_every=5")
    assert run_ranks(meetings_alone, 2, config) == [9, 9]


def wrong_alone(config: Config, how: str) -> tuple[int | None, float | None, int]:
    """Let a step of rank 1 go wrong in a block without the others; then take one with them.

    Returns:
        The micro-batch and the scale after it, and how often it went wrong.
    """
    fired = 0
    with pytest.MonkeyPatch.context() as patch:
        if how == "scaled":  # by fp16's scaler, though the step computes in fp32
            patch.setattr("dist_train.start.agreed_precision", lambda config, ranks: ("fp16", None))
        with opened(config) as (steps, parts):
            parts.precision = "fp32"
            from dist_train import step

            backward = step.backward

            def wrong(loss: Any, weight: Any) -> None:
                nonlocal fired
                fired += 1
                if how != "memory":
                    backward(loss, weight * math.nan)
                elif fired == 1:
                    raise torch.OutOfMemoryError("out of memory")
                else:
                    backward(loss, weight)

            with pytest.MonkeyPatch.context() as fault:
                if parts.replica.ranks.rank == 1:
                    fault.setattr(step, "backward", wrong)
                steps.block("alone", 1)
            steps.block("full", 2)
            scale = None if parts.scaler is None else parts.scaler.get_scale()
            return parts.recovery.micro_batch_size, scale, fired


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "words", "alike", "fired"),
    [
        ("memory", (), (6, None), 3),  # the first try, then both halves
        ("not finite", ("guards.lag=1",), (None, None), 1),
        ("scaled", (), (None, 65536.0), 1),
    ],
)
def test_a_step_that_goes_wrong_alone_concerns_no_other_rank(
    how: str, words: tuple[str, ...], alike: tuple[Any, ...], fired: int, tmp_path: Path
) -> None:
    short = ("parallel.start_timeout_sec=20", *words)
    first, second = run_ranks(wrong_alone, 2, small(tmp_path, *short), how)
    assert (first, second) == ((*alike, 0), (*alike, fired))


def forwarded(config: Config) -> dict[str, list[int]]:
    """Return how many pictures are forwarded at once in a step, by way."""
    sizes: dict[str, list[int]] = {"alone": [], "bare": []}
    with opened(config) as (steps, parts):
        for way, found in sizes.items():
            hook = parts.replica.module.register_forward_pre_hook(
                lambda module, inputs, found=found: found.append(len(inputs[0]))
            )
            steps.block(way, 1)
            hook.remove()
    return sizes


@pytest.mark.parametrize(
    ("words", "sizes"),
    [
        (("train.order=fixed", "train.num_shards=4"), [6, 6, 6, 6]),
        (("train.micro_batch_size=10",), [8, 8, 8]),
    ],
)
def test_a_bare_step_computes_in_the_pieces_of_a_whole_one(
    words: tuple[str, ...], sizes: list[int], tmp_path: Path
) -> None:
    [found] = run_ranks(forwarded, 0, small(tmp_path, *words))
    assert found == {"alone": sizes, "bare": sizes}


def measured_with_matrices(config: Config, own_bytes: int) -> tuple[dict[str, Any], float, Any]:
    """Measure with a benchmark that takes memory itself; notes the phases of what comes last."""
    phases: dict[str, str] = {}
    kept: list[torch.Tensor] = []
    save, product = once._save_sec, worker.product_rate
    flops = once.flops_of_a_sample

    with pytest.MonkeyPatch.context() as patch:
        pulses: list[Any] = []

        def build(*args: Any) -> Parts:
            parts = build_parts(*args)
            pulses.append(parts.replica.ranks.pulse)
            return parts

        def with_phase(name: str, real: Any) -> Any:
            def noted(*args: Any) -> Any:
                phases[name] = pulses[0].phase
                return real(*args)

            return noted

        def large(*args: Any) -> float:
            if not kept:
                kept.append(torch.ones(own_bytes // 4))
            return product(*args)

        patch.setattr(worker, "build_parts", build)
        patch.setattr(worker, "product_rate", large)
        patch.setattr(once, "_save_sec", with_phase("save", save))
        patch.setattr(once, "flops_of_a_sample", with_phase("flops", flops))
        spec = worker.Spec(folder="", seconds=0.1, number=0, begun=time.time())
        found = worker.measure(config, spec)
    assert found is not None
    peak = 1024.0 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return found["ranks"][0], peak, phases


@pytest.mark.slow
def test_a_launch_measures_the_training_and_not_itself(tmp_path: Path) -> None:
    config = small(tmp_path, "train.steps=1000000000", "eval.every_epochs=null")
    size = 256 << 20
    [(rank, peak, phases)] = run_ranks(measured_with_matrices, 0, config, size)
    assert 0 < rank["memory_bytes"] < peak - size / 2, "its own matrices are no part of training"
    assert phases == {"flops": "start", "save": "checkpoint"}, "what the watchdog waits for"
    assert rank["memory_format"] == "channels_last"
    for block, waits, beside in zip(
        rank["blocks"]["full"], rank["waits"], rank["reference_sec"], strict=True
    ):
        assert len(block) == len(waits) == rank["block_steps"]
        assert len(block) % len(beside) == 0
        assert len(beside) == worker.pieces_of_block(len(block), workers=False)


def measured(config: Any, trouble: str) -> dict[str, Any] | None:
    """Measure with a fault: late batches, a slow rank, or a slow all-reduce."""
    from dist_train.gradients import FlatGradients

    late = 0.05
    with pytest.MonkeyPatch.context() as patch:
        augmented, reduce = MemoryLoader._augmented, FlatGradients.reduce

        def slow_batch(self: Any, *args: Any) -> Any:
            time.sleep(late)
            return augmented(self, *args)

        def slow_sum(self: Any, *, poison: bool) -> None:
            if self._ranks.control is not None:
                time.sleep(late)
            reduce(self, poison=poison)

        if trouble == "data":
            patch.setattr(MemoryLoader, "_augmented", slow_batch)
        if trouble == "all_reduce":
            patch.setattr(FlatGradients, "reduce", slow_sum)
        if trouble == "waiting" and os.environ["RANK"] == "1":
            relu = torch.nn.functional.relu

            def slow_relu(*args: Any, **kwargs: Any) -> Any:
                time.sleep(late)
                return relu(*args, **kwargs)

            patch.setattr(torch.nn.functional, "relu", slow_relu)
            patch.setattr(torch.nn.ReLU, "forward", lambda self, x: slow_relu(x))
        spec = worker.Spec(folder="", seconds=0.5, number=0, begun=time.time())
        return worker.measure(config, spec)


@pytest.mark.slow
@pytest.mark.parametrize("trouble", ["data", "waiting", "all_reduce"])
def test_what_slows_the_ranks_is_named(trouble: str, tmp_path: Path) -> None:
    config = small(tmp_path, "train.steps=1000000000", "eval.every_epochs=null", "log_every=1000")
    [launch, _] = run_ranks(measured, 2, config, trouble)
    size = config.train.global_batch_size
    [result] = results_of([(setups_of([(2, 0)], size, ("strong",))[0], [launch, launch])])
    advice = advice_for(result)
    assert advice is not None
    assert advice["part"] == trouble, result["parts_sec"]
    if trouble == "waiting":
        assert result["slowest_rank"]["rank"] == 1
