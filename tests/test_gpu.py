"""What only a GPU can show; `make gpu-check` runs these."""

import json
import os
import warnings
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from dist_train.config import Config, ConfigError
from dist_train.data.loaders import open_data
from dist_train.distributed import start_ranks
from tests.ranks import run_ranks, start_ranks_of
from tests.settings import metrics, small
from tests.test_step_failures import Ended, follow

pytestmark = pytest.mark.gpu

GPU = ("device=cuda", "model.factory=tests.nets:noisy_net", "data.args.num_train=2000")


def trained(config: Config) -> dict[str, Any]:
    from dist_train.train import train

    return train(config)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("sync", ["flat", "ddp"])
def test_one_rank_on_nccl_learns(precision: str, sync: str, tmp_path: Path) -> None:
    options = (f"precision={precision}", f"parallel.sync={sync}", "train.epochs=8", "optim.lr=0.05")
    summary = run_ranks(trained, 1, small(tmp_path, *GPU, *options))[0]
    losses = [m["train/loss"] for m in metrics(tmp_path) if "train/loss" in m]
    assert losses[-1] < losses[0]
    assert summary["precision"] == precision
    assert summary["eval_samples"] == 70


def waits(config: Config) -> list[int]:
    """Return how many times the host waited for the device in each of ten steps, with loading."""
    from dist_train import train as loop
    from dist_train.claim import open_run
    from dist_train.metrics import Meter
    from dist_train.plan import make_plan
    from dist_train.start import build_parts, open_feed
    from dist_train.trial import throw_away_step

    counts = []
    with start_ranks(config) as ranks, open_run(config, ranks) as run:
        data = open_data(config, ranks)
        plan = make_plan(config, data.num_train, world_size=ranks.world_size)
        parts = build_parts(config, plan, data, run)
        throw_away_step(parts, data, step=0)
        feed = open_feed(parts, data, last_step=13)
        meter = Meter(ranks, plan)
        for step in range(13):
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                torch.cuda.set_sync_debug_mode("warn")
                try:
                    sums = loop.train_step(parts, feed, step=step)
                    meter.add(sums)
                finally:
                    torch.cuda.set_sync_debug_mode("default")
            counts.append(sum("synchronizing" in str(w.message) for w in caught))
    return counts[3:]


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("mixing", [(), ("data.mixup=0.4",), ("data.cutmix=1",)])
@pytest.mark.parametrize(("lag", "expected"), [(0, 1), (1, 0)])
def test_a_step_waits_for_the_device_only_where_it_says(
    precision: str, mixing: tuple[str, ...], lag: int, expected: int, tmp_path: Path
) -> None:
    options = (f"precision={precision}", f"guards.lag={lag}", "optim.clip_norm=1", *mixing)
    assert run_ranks(waits, 1, small(tmp_path, *GPU, *options))[0] == [expected] * 10


@pytest.mark.parametrize("factory", ["resnet9", "resnet18_cifar", "tutorial_cnn"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_deterministic_runs_end_with_the_same_bits(
    factory: str, precision: str, tmp_path: Path
) -> None:
    options = (
        *GPU[:1],
        f"model.factory=dist_train.models:{factory}",
        "deterministic=true",
        f"precision={precision}",
        "train.steps=12",
    )
    found = {
        run_ranks(trained, 1, small(tmp_path / name, *options))[0]["weights_sha256"]
        for name in ("first", "second")
    }
    assert len(found) == 1


def test_a_resumed_run_has_the_bits_of_an_unbroken_one(tmp_path: Path) -> None:
    options = (*GPU, "deterministic=true", "optim.schedule=constant", "data.mixup=0.3")
    clean = run_ranks(trained, 1, small(tmp_path / "a", *options, "train.steps=30"))[0]
    run_ranks(trained, 1, small(tmp_path / "b", *options, "train.steps=17"))
    resumed = run_ranks(trained, 1, small(tmp_path / "b", *options, "train.steps=30"))[0]
    assert resumed["weights_sha256"] == clean["weights_sha256"]


LARGE = (
    "device=cuda",
    "model.factory=dist_train.models:resnet18_cifar",
    "data.args.num_train=2400",
    "data.args.image_size=32",
    "train.global_batch_size=512",
    "train.steps=4",
    "data.val_fraction=0",
    "log_every=1",
    "deterministic=true",
)


def squeezed(config: Config) -> Ended:
    """Train; from step 2 on the GPU has room for 0.6 of what a step takes beyond the weights."""
    from dist_train import train as loop

    real = loop.train_step

    def train_step(parts: Any, feed: Any, *, step: int, generation: int) -> Any:
        if step == 2:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
            step_bytes = torch.cuda.max_memory_allocated() - torch.cuda.memory_allocated()
            _allow(torch.cuda.memory_reserved() + 0.6 * step_bytes)
        return real(parts, feed, step=step, generation=generation)

    with mock.patch.object(loop, "train_step", train_step):
        return follow(config, (), {})


def _allow(num_bytes: float) -> None:
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(num_bytes / total)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_real_shortage_of_memory_costs_a_repeated_step(precision: str, tmp_path: Path) -> None:
    options = (*LARGE, f"precision={precision}")
    [short] = run_ranks(squeezed, 1, small(tmp_path / "short", *options))
    lines = [json.loads(x) for x in (tmp_path / "short" / "events.jsonl").read_text().splitlines()]
    told = [line for line in lines if line["event"] == "out_of_memory"]
    assert told, "memory was not short"
    assert (told[0]["step"], told[0]["from"], told[0]["to"]) == (2, 512, 256)
    assert "CUDA out of memory" in told[0]["reason"]
    assert short.sizes[:2] == [None, None]
    assert short.sizes[2] == short.sizes[3] == told[-1]["to"]
    plan = {2: short.sizes[2], 3: short.sizes[3]}
    [clean] = run_ranks(follow, 1, small(tmp_path / "clean", *options), (), plan)
    for name, weight in clean.weights.items():  # short of memory cuDNN may choose another way
        torch.testing.assert_close(short.weights[name], weight, rtol=0.02, atol=0.005)


def trained_with(config: Config, num_bytes: float | None) -> tuple[dict[str, Any], int]:
    """Train with so much memory of the GPU; returns the summary, and the most that was in use."""
    if num_bytes is not None:
        _allow(num_bytes)
    return trained(config), torch.cuda.max_memory_allocated()


def test_auto_finds_a_micro_batch_that_fits(tmp_path: Path) -> None:
    [(_, peak)] = run_ranks(trained_with, 1, small(tmp_path / "free", *LARGE), None)
    config = small(tmp_path / "auto", *LARGE, "train.micro_batch_size=auto")
    [(summary, most)] = run_ranks(trained_with, 1, config, 0.5 * peak)
    assert summary["state"] == "finished"
    assert most <= 0.5 * peak
    lines = [json.loads(x) for x in (tmp_path / "auto" / "events.jsonl").read_text().splitlines()]
    [found] = [line for line in lines if line["event"] == "micro_batch_size"]
    assert 64 <= found["sizes"][0] < 512
    assert not [line for line in lines if line["event"] == "out_of_memory"], "it did not fit"


def test_more_local_ranks_than_gpus_are_refused_on_all_ranks(tmp_path: Path) -> None:
    count = torch.cuda.device_count() + 1
    outcomes = start_ranks_of(trained, count, small(tmp_path, *GPU))
    assert all(isinstance(o.error, ConfigError) for o in outcomes), outcomes
    told = "are both on GPU" if count == 2 else f"local rank {count - 1} has no GPU"
    assert told in str(outcomes[0].error)


def test_two_ranks_on_one_gpu_are_refused(tmp_path: Path) -> None:
    outcomes = start_ranks_of(on_first_gpu, 2, small(tmp_path, *GPU))
    assert all("are both on GPU" in str(o.error) for o in outcomes), outcomes


@pytest.mark.parametrize("kind", ["same", "shared"])
def test_parameters_that_share_memory_would_part_on_a_gpu_and_are_refused(
    kind: str, tmp_path: Path
) -> None:
    net = ("model.factory=tests.odd_nets:Cut", f"model.args.kind={kind}")
    [outcome] = start_ranks_of(trained, 1, small(tmp_path, *GPU[:1], *net))
    assert isinstance(outcome.error, ConfigError), outcome
    assert "'first.weight' and 'second.weight' share numbers" in str(outcome.error)


@pytest.mark.parametrize("kind", ["tied", "apart"])
def test_what_does_not_part_trains(kind: str, tmp_path: Path) -> None:
    net = ("model.factory=tests.odd_nets:Cut", f"model.args.kind={kind}", "train.steps=2")
    run_ranks(trained, 1, small(tmp_path, *GPU[:1], *net))


def with_one_visible_gpu(config: Config, numbers: tuple[str, ...]) -> str:
    os.environ["CUDA_VISIBLE_DEVICES"] = numbers[int(os.environ["RANK"])]
    return trained(config)["weights_sha256"]


@pytest.mark.multi_gpu
def test_ranks_that_each_see_one_gpu_of_their_own_train(tmp_path: Path) -> None:
    config = small(tmp_path, *GPU, "train.steps=3")
    first, second = run_ranks(with_one_visible_gpu, 2, config, ("1", "0"))
    assert first == second


def test_ranks_that_each_see_the_same_gpu_are_refused(tmp_path: Path) -> None:
    outcomes = start_ranks_of(with_one_visible_gpu, 2, small(tmp_path, *GPU), ("0", "0"))
    assert all("rank 0 and rank 1 are both on GPU" in str(o.error) for o in outcomes), outcomes


def on_first_gpu(config: Config) -> dict[str, Any]:
    os.environ["LOCAL_RANK"] = "0"
    return trained(config)
