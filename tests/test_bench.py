"""The benchmark: its arithmetic on made-up launches, and what it names in real ones."""

import json
import random
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from dist_train.bench import compare
from dist_train.bench.advice import advice_for
from dist_train.bench.breakdown import PARTS, parts_of, slowest_rank
from dist_train.bench.intervals import geometric_mean_of, mean_of
from dist_train.bench.launches import Setup, setups_of
from dist_train.bench.main import main
from dist_train.bench.page import write_page
from dist_train.bench.report import as_text
from dist_train.bench.results import results_of
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
from dist_train.config import ConfigError
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
        "reference_sec": [0.001] * BLOCKS,
        "product_flops_per_sec": [1e11] * BLOCKS,
        "flops_per_sample": 1e6,
        "peak_flops_per_sec": None,
        "memory_bytes": 1e9,
        "warm_up_steps": 5,
        "steady": True,
        "start_to_first_step_sec": 4.0,
        "save_sec": 0.01,
        "all_reduce": [(1000, 0.001), (1_000_000, 0.002)],
        "batch_size": batch,
        "precision": "fp32",
        "sync": "flat",
        "gradient_bytes": 4_000_000,
        "gradient_times": [(1_000_000, 0.001), (3_000_000, 0.004)],
        "micro_batch_size": None,
        "threads": 1,
        "device": "cpu",
    }


ALONE = {"forward": 0.002, "backward": 0.004, "optimizer": 0.001, "bare": 0.0071}


def one(**more: float) -> dict[str, Any]:
    sec = {"full": 0.009, "ready": 0.008, "alone": 0.008, **ALONE, **more}
    return {"ranks": [made_up_rank(0, 64, **sec)]}


def two(slow: float = 1.0, **more: float) -> dict[str, Any]:
    sec = {"full": 0.013, "ready": 0.012, "alone": 0.008, **ALONE, **more}
    late = {name: slow * value for name, value in sec.items() if name not in ("full", "ready")}
    return {"ranks": [made_up_rank(0, 32, **sec), made_up_rank(1, 32, **sec | late)]}


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
    assert pair["lost_sec"]["strong"]["forward"] == pytest.approx(0.002 - 0.001)
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
        ([two(slow=1.9, ready=0.0162, full=0.0163)], "waiting", "Rank 1 on node1 takes 1.90 times"),
        ([two(ready=0.030, full=0.0301)], "all_reduce", "parallel.sync=overlap"),
        ([two(alone=0.020, ready=0.0202, full=0.0203)], "host", "Python needs"),
        ([two(alone=0.0071, ready=0.0072, full=0.0072)], "compute", "precision=bf16"),
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
    assert fitted_link([(4, 1.0), (1 << 20, 0.5)], 2) is None


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
    assert "no change of the step time beyond noise" in told


def test_the_report_shows_every_part_and_curve() -> None:
    text = as_text(report_of(results_of(measured_setups())))
    assert "strong scaling" in text
    assert "not explained" in text
    assert "NVLink" in text
    assert "(a failure of each GPU in 50,000 hours; a save stalls 10 ms" in text


def test_the_page_holds_all_of_the_report(tmp_path: Path) -> None:
    report = report_of(results_of(measured_setups()))
    page, picture = write_page(report, tmp_path / "report.html")
    text = page.read_text()
    assert "<svg" in text
    assert "http" not in text.split("<svg")[0], "it needs nothing from elsewhere"
    assert "parallel.sync=overlap" in text
    assert picture.read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--nproc", "0"], "--nproc=0 must be numbers from 1 on"),
        (["--nodes", "1,2"], "--nodes needs an allocation of SLURM"),
        (["--repeats", "1"], "--repeats=1 must be 2 or more"),
        (["--compare", "README.md"], "is no report of this benchmark"),
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


def measured(config: Any, trouble: str) -> dict[str, Any] | None:
    """Measure with a fault: late batches, a slow rank, or a slow all-reduce."""
    import os

    from dist_train.bench import worker
    from dist_train.data.memory_loader import MemoryLoader
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
        spec = worker.Spec(out="", seconds=0.5, seed=0, begun=time.time())
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
