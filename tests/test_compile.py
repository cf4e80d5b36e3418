"""Training through torch.compile: the same learning, the same guards."""

import json
import time
from pathlib import Path
from typing import Any

import pytest

from dist_train import build
from dist_train.config import Config, ConfigError
from tests.ranks import run_ranks, start_ranks_of
from tests.settings import metrics, small


def trained(config: Config, backend: str, spoilt_step: int = -1) -> tuple[dict[str, Any], int]:
    """Train; return the summary and how many graphs were made. One batch of rank 1 may be NaN."""
    import os

    import torch._dynamo
    from torch._dynamo.utils import counters

    from dist_train import train as loop
    from dist_train.data.feed import Feed

    def broken(*_: Any) -> Any:
        raise RuntimeError("no compiler on this machine")

    def slow(graph: Any, inputs: Any) -> Any:
        time.sleep(2.5)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    own: dict[str, Any] = {"broken": broken, "slow": slow}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "BACKEND", own.get(backend, backend))
        take = Feed.take

        def spoilt(self: Feed, step: int) -> Any:
            batch = take(self, step)
            if step == spoilt_step and os.environ.get("RANK") == "1":
                batch.images[3] = torch.nan
            return batch

        patch.setattr(Feed, "take", spoilt)
        summary = loop.train(config)
    return summary, counters["stats"]["unique_graphs"]


def config_of(run_dir: Path, *options: str) -> Config:
    net = "model.factory=tests.nets:noisy_net"
    return small(run_dir, net, "train.steps=9", "log_every=1", "optim.ema_decay=0.9", *options)


@pytest.mark.slow
@pytest.mark.parametrize("sync", ["flat", "ddp"])
def test_compiled_steps_learn_as_the_others(sync: str, tmp_path: Path) -> None:
    words = (f"parallel.sync={sync}", "train.micro_batch_size=7", "model.compile=true")
    [(compiled, graphs), _] = run_ranks(trained, 2, config_of(tmp_path / "a", *words), "aot_eager")
    [(plain, none), _] = run_ranks(trained, 2, config_of(tmp_path / "b", *words[:2]), "aot_eager")
    assert graphs > 0
    assert none == 0
    losses = [
        [line["train/loss"] for line in metrics(tmp_path / name) if "train/loss" in line]
        for name in ("a", "b")
    ]
    assert len(losses[0]) == 9
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert compiled["eval_loss"] == pytest.approx(plain["eval_loss"], rel=1e-4)


@pytest.mark.slow
def test_a_compiled_models_nan_is_traced_to_its_layer_and_sample(tmp_path: Path) -> None:
    config = config_of(tmp_path / "run", "model.compile=true")
    [(summary, graphs), _] = run_ranks(trained, 2, config, "aot_eager", 4)
    assert graphs > 0
    assert summary["skipped_steps"] == 1
    lines = (tmp_path / "run" / "events.jsonl").read_text().splitlines()
    [event] = [e for e in map(json.loads, lines) if e["event"] == "not_finite"]
    assert event["step"] == 4
    [told] = event["culprits"]
    assert told.startswith("rank 1: the input of layer '0' is not finite (training samples ")


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", pytest.param("bf16", marks=pytest.mark.exhaustive)])
def test_a_graph_made_late_is_not_taken_for_a_hang(precision: str, tmp_path: Path) -> None:
    # The last batch of the epoch, at step 9, has a shape of its own; so have two in evaluations.
    words = ("model.compile=true", "data.args.num_train=250", "train.drop_last=false")
    words += (f"precision={precision}", "train.steps=12", "guards.hang_sec=0.5")
    for summary, graphs in run_ranks(trained, 2, config_of(tmp_path, *words), "slow"):
        assert summary["state"] == "finished"
        assert graphs >= 3
    text = (tmp_path / "events.jsonl").read_text()
    assert '"hang"' not in text
    assert json.loads((tmp_path / "status.json").read_text())["state"] == "finished"


@pytest.mark.exhaustive
def test_a_compiled_run_is_resumed_to_the_bit(tmp_path: Path) -> None:
    words = ("model.compile=true", "train.micro_batch_size=7", "eval.every_steps=3")
    words += ("optim.schedule=constant", "parallel.start_timeout_sec=600")  # C++ is compiled

    def trained_on(folder: str, *more: str) -> tuple[dict[str, Any], int]:
        config = config_of(tmp_path / folder, *words, *more)
        return run_ranks(trained, 1, config, "inductor", timeout_sec=600)[0]

    whole, graphs = trained_on("a")
    trained_on("b", "train.steps=4")
    resumed, _ = trained_on("b")
    assert graphs > 0
    assert resumed["weights_sha256"] == whole["weights_sha256"]


@pytest.mark.slow
def test_a_model_that_cannot_be_compiled_is_told_in_a_line(tmp_path: Path) -> None:
    outcomes = start_ranks_of(trained, 2, config_of(tmp_path, "model.compile=true"), "broken")
    for outcome in outcomes:
        assert isinstance(outcome.error, ConfigError)
        assert "model.compile=true: torch cannot compile tests.nets:noisy_net" in str(outcome.error)
        assert "no compiler on this machine" in str(outcome.error)
