"""The tables of this repository's own measurements, from made-up findings."""

import os
import socket
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from benchmarks import __main__ as benchmarks_main
from benchmarks import bench_truth, checkpoint_cost, scaling, speedrun
from benchmarks.__main__ import MEASURED
from benchmarks.intervals import RESULTS
from benchmarks.reliability.cable import Cable, why_no_cable
from dist_train.bench.results import results_of
from tests.test_bench import measured_setups

CHECK = {"predicted_sec": 0.02, "measured_sec": 0.021, "error": -0.048}
LINE = {"changed": True, "change": 0.05}
PART = {name: 0.001 for name in scaling.PARTS}
FOUND: dict[str, Any] = {
    "data_path": {
        "loading": {"here": {"images_per_sec_and_core": [146300, 16300], "times_pil": [56.6, 6.9]}},
        "training": {"share_of_ready_speed": [0.994, 0.023], "pairs": 25, "precision": "bf16"},
    },
    "guards": {
        "cases": [
            {
                "case": "a net",
                "step_ms_without": 30.1,
                "overhead": [0.002, 0.01],
                "pairs": 4,
                "one_by_one_us": {"12 heartbeats": 10.0, "the norm": 20.1},
            }
        ]
    },
    "checkpoint": {
        "saving": {
            "bytes": 90e6,
            "rounds": 15,
            "verified_and_loaded_ms": 80.0,
            "ways": {
                checkpoint_cost.COPY: {"ms": [15.0, 0.5], "times_copy": [1.0, 0.0]},
                checkpoint_cost.STALL: {"ms": [17.0, 0.5], "times_copy": [1.13, 0.04]},
            },
        },
        "training": {
            "share_of_speed": [0.991, 0.004],
            "cost_ms": [150.0, 60.0],
            "saves": 120,
            "step_ms": 812.0,
            "every_steps": 20,
            "precision": "bf16",
        },
    },
    "scaling": {
        "command": "dist-train bench --nproc 1,2 --json x",
        "setups": [
            {
                "num_ranks": 2,
                "batch_size": 128,
                "images_per_sec": {"value": 2470.0, "low": 2259.0, "high": 2681.0},
                "speedup": {"strong": {"value": 1.84, "low": None, "high": None}},
                "step_sec": {"value": 0.1},
                "start_to_first_step_sec": 3.2,
                "parts_sec": PART,
                "all_reduce": [[4, 0.0002], [1 << 20, 0.001]],
            }
        ],
        "scale": {"checked": [{"num_ranks": 2, "batch_size": 128, "error": 0.005}]},
    },
    "sync_forms": {
        "cases": [
            {
                "case": "a net",
                "precision": "bf16",
                "forms": {
                    "flat": {"step_ms": 88.2, "times_flat": [1.0, 0.0], "apart": 0.0},
                    "ddp": {"step_ms": 90.1, "times_flat": [1.02, 0.01], "apart": 1.2e-7},
                },
                "rounds": 20,
            }
        ]
    },
    "fixed_order": {
        "cases": [
            {
                "case": "a net",
                "precision": "bf16",
                "fast_ms": 88.2,
                "times": [1.31, 0.02],
                "pairs": 20,
            }
        ]
    },
    "memory_format": {
        "nets": [
            {
                "net": "a net, 8, 64",
                "precision": "bf16",
                "channels_last_ms": 88.2,
                "times": [1.31, 0.02],
                "pairs": 5,
                "auto": "channels_last",
            }
        ]
    },
    "narrow_conv": {
        "nets": [
            {
                "net": "a net",
                "images_per_sec_here": 740.2,
                "images_per_sec_torch": 584.1,
                "times": [1.27, 0.03],
                "pairs": 15,
            }
        ]
    },
    "causes": [
        {"fault": "data 0.005", "wanted": "data", "named": "data", "text": "Wait (\u00b1 1%)."},
        {"fault": "slow 1.5", "wanted": "waiting", "named": "host", "text": "Python."},
        {"fault": "link 0.005", "not_run": "needs root"},
    ],
    "predictions": [{"case": "4 ranks that sleep"} | CHECK, {"case": "x", "not_run": "needs root"}],
    "compare": {
        "tries": 10,
        "slower_by": 0.05,
        "same": [LINE],
        "slower": [LINE],
        "same_told": 1,
        "slower_told": 9,
    },
}
SHOWN = {
    "data_path": ("146,300 +- 16,300", "56.6 +- 6.9", "99.4 +- 2.3 %"),
    "guards": ("| a net | 30.1 | +0.20 +- 1.00 % | 4 | 30 us | 0.10 % |", "12 heartbeats 10.0 us"),
    "checkpoint": ("90 MB", "1.13 +- 0.04", "99.1 +- 0.4 %"),
    "scaling": ("2,470 +- 211", "1.84", "+1.0%", "4 B 200 us, 1 MiB 1,000 us", "+0.5%"),
    "sync_forms": (
        "| a net | bf16 | flat | 88.2 | 1.00 +- 0.00 | the same | 20 |",
        "| a net | bf16 | ddp | 90.1 | 1.02 +- 0.01 | 1.2e-07 apart | 20 |",
    ),
    "fixed_order": ("| a net | bf16 | 88.2 | 1.31 +- 0.02 times | 20 |",),
    "memory_format": ("| a net, 8, 64 | bf16 | 88 | 1.31 +- 0.02 times | 5 | channels_last |",),
    "narrow_conv": ("| a net | 584 | 740 | 1.27 +- 0.03 | 15 |",),
    "causes": ("| data | Wait (+- 1%)", "**wanted waiting**", "not run: needs root"),
    "predictions": ("-4.8%", "not run: needs root"),
    "compare": ("in 9 of 10",),
}


@pytest.mark.parametrize("name", MEASURED)
def test_a_table_says_what_was_found(name: str) -> None:
    text = MEASURED[name][1](FOUND[name])
    assert text.isascii()
    for words in SHOWN[name]:
        assert words in text, text


@pytest.mark.parametrize("name", MEASURED)
def test_every_table_has_its_place_in_the_results(name: str) -> None:
    text = RESULTS.read_text()
    assert text.count(f"<!-- {name}: made by `make bench` -->") == 1
    assert text.count(f"<!-- {name}: end -->") == 1


def test_a_launch_that_hangs_is_told_with_what_its_ranks_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench_truth, "LIMIT_SEC", 1.0)
    words = ["sh", "-c", "echo I am rank 0; exec sleep 60"]
    work = partial(bench_truth._launch, (), [words], {}, tmp_path / "run", 0)
    told = bench_truth.attempted(work)["not_run"]
    assert "did not come to an end" in told
    assert "I am rank 0" in told


def test_what_could_be_measured_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    pair = results_of(measured_setups())[1]
    odd = pair | {"all_reduce": [(1 << 10, 0.002), (1 << 20, 0.001)]}

    def here(words: tuple[str, ...], count: int, fault: str | None = None) -> dict[str, Any]:
        if fault == "slow 1.5":
            raise RuntimeError("rank 1 failed:\nOSError | no")
        return odd if count == 8 else pair

    monkeypatch.setattr(bench_truth, "here", here)
    monkeypatch.setattr(bench_truth, "why_no_cable", lambda: "needs root")
    monkeypatch.setattr(bench_truth.main, "main", lambda words: 1)
    named = bench_truth.causes()
    assert [case.get("not_run") for case in named] == [
        None,
        "rank 1 failed:\nOSError | no",
        "needs root",
    ]
    assert [case.get("not_run", "")[:13] for case in bench_truth.scale()] == [
        *["needs root"] * 3,
        "",
        "no prediction",
    ]
    compared = bench_truth.compare()
    assert compared["tries"] == 0
    told = "| slow 1.5 | not run: rank 1 failed: OSError / no | |"
    assert told in bench_truth.causes_table(named)
    told = "No more tries: dist-train bench failed (exit code 1) in 0."
    assert told in bench_truth.compare_table(compared)


def test_a_measurement_that_fails_is_told_and_the_others_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken() -> Any:
        raise ZeroDivisionError("no rounds")

    monkeypatch.setattr(benchmarks_main, "FOLDER", tmp_path)
    monkeypatch.setitem(MEASURED, "guards", (broken, MEASURED["guards"][1]))
    monkeypatch.setitem(MEASURED, "compare", (lambda: FOUND["compare"], MEASURED["compare"][1]))
    monkeypatch.setattr("sys.argv", ["benchmarks", "run", "guards", "compare"])
    assert benchmarks_main.main() == 1
    assert [path.name for path in tmp_path.iterdir()] == ["compare.json"]
    told = capsys.readouterr()
    assert "failed: guards" in told.err
    assert "ZeroDivisionError: no rounds" in told.err
    assert "in 9 of 10" in told.out


def test_the_speed_runs_figures_are_means_with_intervals(tmp_path: Path) -> None:
    facts = {"world_size": 2, "steps": 200, "eval_samples": 10000, "dataset": "cifar10"}
    runs = [
        {key: value for key in speedrun.SHOWN}
        | facts
        | {"eval_views_accuracy": None, "seed": value}
        for value in (1, 2)
    ]
    found = speedrun.result_of(runs, ["train.epochs=1"])
    assert "eval_views_accuracy" not in found["means"], "eval.views=1 has none"
    mean, half = found["means"]["record_sec"]
    assert mean == 1.5
    assert half == pytest.approx(12.706 * 0.5, rel=1e-3), "Student's t of two values"
    told = speedrun.table(found)
    assert "| training steps alone, s | 1 | 2 | 2 |" in told
    assert "| accuracy | 1.0000 | 2.0000 | 1.5000 |" in told
    assert "views" not in told


def test_a_cable_survives_a_device_that_takes_no_packet() -> None:
    cable = Cable(seed=0)
    first, far_first = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    second, far_second = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    with first, second, far_first, far_second:
        cable._ends = [first.fileno(), second.fileno()]
        second.shutdown(socket.SHUT_WR)
        cable._thread.start()
        far_first.send(b"refused")
        end = time.monotonic() + 60.0
        while cable.num_refused == 0 and cable._thread.is_alive() and time.monotonic() < end:
            time.sleep(0.01)
        far_second.send(b"carried")
        far_first.settimeout(60.0)
        assert far_first.recv(100) == b"carried"
        cable._closing = True
        cable._thread.join()
    assert cable.num_refused == 1


def test_no_cable_is_laid_without_the_program_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    reason = why_no_cable()
    assert reason is not None
    assert "`ip`" in reason
