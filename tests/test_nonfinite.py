"""Steps that are not finite are skipped on all ranks together, and told where they began."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dist_train.config import Config, GuardConfig, OptimConfig
from dist_train.gradients import Buffers
from dist_train.nonfinite import NonFiniteError, NonFiniteGuard
from dist_train.optim import build_optimizer
from tests.nets import NanAt, noisy_net
from tests.ranks import run_ranks, start_ranks_of
from tests.settings import metrics, small


def poisoned_net(num_classes: int, *, calls: list[int], rank: int) -> nn.Module:
    """noisy_net whose input turns to NaN on one rank in chosen forwards (0: the throw-away)."""
    import os

    mine = set(calls) if int(os.environ.get("RANK", "0")) == rank else set()
    return nn.Sequential(NanAt(mine), noisy_net(num_classes))


def poisoned(run_dir: Path, calls: list[int], *options: str) -> Config:
    return small(
        run_dir,
        "model.factory=tests.test_nonfinite:poisoned_net",
        f"model.args.calls={calls}",
        "model.args.rank=1",
        "train.steps=6",
        "log_every=1",
        "optim.lr=0.05",
        *options,
    )


def weights_after(config: Config) -> tuple[dict[str, Any], list[Tensor]]:
    from dist_train import train as loop

    kept: list[Tensor] = []
    with pytest.MonkeyPatch.context() as patch:
        real = loop._final_evaluation

        def keep(parts: Any, *args: Any) -> Any:
            kept.extend(t.detach().clone() for t in parts.replica.module.state_dict().values())
            return real(parts, *args)

        patch.setattr(loop, "_final_evaluation", keep)
        return loop.train(config), kept


@pytest.mark.slow
@pytest.mark.parametrize("lag", [0, 1])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("sync", ["flat", "ddp"])
def test_a_first_step_that_is_not_finite_on_one_rank_is_skipped_on_all(
    lag: int, precision: str, sync: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = (f"guards.lag={lag}", f"precision={precision}", f"parallel.sync={sync}")
    config = poisoned(tmp_path, [1], *options)  # call 0 is the throw-away step's
    outcomes = run_ranks(weights_after, 2, config)
    (summary, first), (_, second) = outcomes
    assert summary["skipped_steps"] == 1
    assert all(torch.equal(a, b) for a, b in zip(first[:1], second[:1], strict=True))
    assert all(torch.isfinite(t.double()).all() and t.double().abs().max() < 100 for t in first)
    events = [json.loads(x) for x in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert [e["step"] for e in events if e["event"] == "skipped_step"] == [0]
    logged = {m["step"]: m for m in metrics(tmp_path) if "train/loss" in m}
    assert logged[1]["train/loss"] == "NaN", "a non-finite loss must stay visible"
    assert logged[6]["train/skipped_steps"] == 1


@pytest.mark.slow
@pytest.mark.parametrize("lag", [0, 1])
def test_a_skipped_step_leaves_the_weights_of_a_run_without_it(lag: int, tmp_path: Path) -> None:
    # every forward of steps 0..5 is poisoned, and the one that looks for the cause
    config = poisoned(
        tmp_path / "a", [1, 2, 3, 4, 5, 6, 7], f"guards.lag={lag}", "optim.ema_decay=0.9"
    )
    summary, weights = run_ranks(weights_after, 2, config)[0]
    assert summary["skipped_steps"] == 6
    clean = poisoned(tmp_path / "b", [], "optim.lr=1e-30", "optim.weight_decay=0")
    _, initial = run_ranks(weights_after, 2, clean)[0]
    parameters = [t.is_floating_point() and t.ndim != 1 for t in weights]
    assert any(parameters)
    for kept, before, is_weight in zip(weights, initial, parameters, strict=True):
        assert not is_weight or torch.equal(kept, before)


def test_too_many_in_a_row_end_the_run_with_step_rank_and_layer(tmp_path: Path) -> None:
    config = poisoned(tmp_path, list(range(1, 50)), "guards.max_consecutive=2")
    outcomes = start_ranks_of(weights_after, 2, config)
    texts = {str(o.error) for o in outcomes}
    assert len(texts) == 1
    [text] = texts
    assert isinstance(outcomes[0].error, NonFiniteError)
    assert "at step 2, 3 steps in a row, 1 rollback did not help" in text
    assert "rank 1: the output of layer '0' is not finite" in text
    status = json.loads((tmp_path / "status.json").read_text())
    assert (status["state"], status["exit_code"]) == ("failed", 93)


@pytest.mark.parametrize("name", ["sgd", "adamw"])
@pytest.mark.parametrize("lag", [0, 1])
@pytest.mark.parametrize("scaled", [False, True], ids=["plain", "loss scaling"])
def test_a_fused_optimizer_whose_first_step_is_skipped_stays_sane(
    name: str, lag: int, scaled: bool
) -> None:
    torch.manual_seed(0)
    # A bias before a normalisation has no gradient but rounding: on some CPUs it never moves.
    model = nn.Sequential(nn.Linear(8, 8, bias=False), nn.BatchNorm1d(8), nn.Linear(8, 2))
    optimizer = build_optimizer(model, OptimConfig(name=name, lr=0.1))  # pyright: ignore[reportArgumentType] # a literal
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0) if scaled else None
    guards = GuardConfig(lag=lag)  # pyright: ignore[reportArgumentType] # a literal
    buffers = Buffers(model)
    guard = NonFiniteGuard(buffers, optimizer, scaler, guards, torch.device("cpu"))
    before = [p.detach().clone() for p in model.parameters()]
    skipped: list[int] = []
    for step in range(4):
        optimizer.zero_grad()
        buffers.remember()
        x = torch.randn(16, 8)
        if step == 0:
            x[3, 3] = math.inf
        loss = model(x).square().mean()
        (loss if scaler is None else scaler.scale(loss)).backward()
        if scaler is not None:
            scaler.unscale_(optimizer)
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        known = guard.read(norm, step)
        skipped += [at for at, finite in known if not finite]
        if (step, False) in known:
            buffers.restore()
        else:
            optimizer.step() if scaler is None else scaler.step(optimizer)
        guard.after_step()
        if step == 0:
            for param, old in zip(model.parameters(), before, strict=True):
                assert torch.equal(param, old)
            assert all(torch.isfinite(b.double()).all() for b in model.buffers())
    assert skipped == [0]
    assert all(finite for _, finite in guard.settle())
    for param, old in zip(model.parameters(), before, strict=True):
        assert not torch.equal(param, old), "the later steps were not taken"
        assert (param - old).abs().max() < 1.0
    if scaler is not None:
        assert scaler.get_scale() == 512.0


@pytest.mark.slow
def test_a_restart_of_a_chain_that_diverged_ends_at_once(tmp_path: Path) -> None:
    config = poisoned(tmp_path, list(range(1, 50)), "guards.max_consecutive=2")
    chain = {"DIST_TRAIN_CHAIN": "one start"}
    start_ranks_of(weights_after, 2, config, env=chain)
    restarted = chain | {"TORCHELASTIC_RESTART_COUNT": "1"}
    for outcome in start_ranks_of(weights_after, 2, config, env=restarted):
        assert "ended before" in str(outcome.error)
    status = json.loads((tmp_path / "status.json").read_text())
    assert (status["attempt"], status["exit_code"]) == (0, 93), "the restart left a trace"
