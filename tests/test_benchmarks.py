"""The tables of this repository's own measurements, from made-up findings."""

from typing import Any

import pytest

from benchmarks import checkpoint_cost, scaling
from benchmarks.__main__ import MEASURED
from benchmarks.intervals import RESULTS

CHECK = {"predicted_sec": 0.02, "measured_sec": 0.021, "error": -0.048}
LINE = {"changed": True, "change": 0.05}
PART = {name: 0.001 for name in scaling.PARTS}
FOUND: dict[str, dict[str, Any]] = {
    "data_path": {
        "loading": {"here": {"images_per_sec_and_core": [146300, 16300], "times_pil": [56.6, 6.9]}},
        "training": {"share_of_ready_speed": [0.994, 0.023], "pairs": 25, "precision": "bf16"},
    },
    "guards": {
        "cases": [{"case": "a net", "step_ms_without": 30.1, "overhead": [0.002, 0.01], "pairs": 4}]
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
            "pairs": 12,
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
    "truth": {
        "causes": [
            {"fault": "data 0.005", "wanted": "data", "named": "data", "text": "Steps wait."},
            {"fault": "slow 1.5", "wanted": "waiting", "named": "host", "text": "Python."},
            {"fault": "link 0.005", "not_run": "needs root"},
        ],
        "scale": [{"case": "4 ranks that sleep"} | CHECK, {"case": "x", "not_run": "needs root"}],
        "compare": {
            "tries": 10,
            "slower_by": 0.05,
            "same": [LINE],
            "slower": [LINE],
            "same_told": 1,
            "slower_told": 9,
        },
    },
}
SHOWN = {
    "data_path": ("146,300 +- 16,300", "56.6 +- 6.9", "99.4 +- 2.3 %"),
    "guards": ("| a net | 30.1 | +0.20 +- 1.00 % | 4 |",),
    "checkpoint": ("90 MB", "1.13 +- 0.04", "99.1 +- 0.4 %"),
    "scaling": ("2,470 +- 211", "1.84", "+1.0%", "4 B 200 us, 1 MiB 1,000 us", "+0.5%"),
    "truth": ("| data | Steps", "**wanted waiting**", "not run: needs root", "-4.8%", "in 9 of 10"),
}


@pytest.mark.parametrize("name", MEASURED)
def test_a_table_says_what_was_found(name: str) -> None:
    text = MEASURED[name].table(FOUND[name])
    assert text.isascii()
    for words in SHOWN[name]:
        assert words in text, text


@pytest.mark.parametrize("name", MEASURED)
def test_every_table_has_its_place_in_the_results(name: str) -> None:
    text = RESULTS.read_text()
    assert text.count(f"<!-- {name}: made by `make bench` -->") == 1
    assert text.count(f"<!-- {name}: end -->") == 1
