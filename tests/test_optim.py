"""Learning rates are functions of the step; the optimizer and the average do what they say."""

import copy
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import nn

from dist_train.config import Config, ConfigError, OptimConfig, ParallelConfig, TrainConfig
from dist_train.optim import (
    Ema,
    build_optimizer,
    lean_step,
    learning_rate,
    load_optimizer,
    peak_learning_rate,
    set_learning_rate,
)
from dist_train.plan import Plan, make_plan
from tests.settings import small


def plan(total: int, warmup: int = 0) -> Plan:
    return Plan(
        num_train=1000,
        global_batch_size=512,
        steps_per_epoch=10,
        total_steps=total,
        warmup_steps=warmup,
        log_every=10,
        eval_every=None,
        save_every=10,
    )


def curve(config: OptimConfig, total: int, warmup: int = 0) -> list[float]:
    return [learning_rate(step, config, plan(total, warmup)) for step in range(total)]


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_the_warm_up_rises_by_equal_amounts_to_the_peak(schedule: str) -> None:
    config = OptimConfig(lr=0.6, schedule=schedule)  # pyright: ignore[reportArgumentType] # a literal
    rates = curve(config, 20, warmup=5)
    assert rates[:6] == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5, 0.6])
    assert max(rates) == rates[5]


def test_cosine_is_half_way_down_in_the_middle_and_ends_near_its_fraction() -> None:
    rates = curve(OptimConfig(lr=1.0, schedule="cosine", final_lr_fraction=0.1), 1001)
    assert rates[0] == 1.0
    assert rates[500] == pytest.approx(0.55, abs=1e-3)
    assert rates[-1] == pytest.approx(0.1, abs=1e-4)
    assert all(a > b for a, b in pairwise(rates))


def test_linear_falls_by_equal_amounts() -> None:
    rates = curve(OptimConfig(lr=1.0, schedule="linear"), 10)
    assert rates == pytest.approx([1 - i / 10 for i in range(10)])


def test_one_cycle_starts_low_peaks_and_ends_lower() -> None:
    rates = curve(OptimConfig(lr=1.0, schedule="one_cycle"), 100)
    assert rates[0] == pytest.approx(1 / 25)
    assert max(rates) == rates[30] == 1.0
    assert rates[-1] < 0.001


def test_no_warm_up_is_none_in_any_schedule() -> None:
    for schedule in ("one_cycle", "cosine", "linear", "constant"):
        optim = OptimConfig(lr=1.0, schedule=schedule, warmup_steps=0)
        rates = curve(optim, 100)
        assert rates[0] == max(rates) == 1.0, schedule
    words = ("optim.schedule=one_cycle", "train.steps=100", "optim.warmup_epochs=0")
    assert make_plan(small("unused", *words), 216, world_size=1).warmup_steps == 30
    words += ("optim.warmup_steps=0",)
    assert make_plan(small("unused", *words), 216, world_size=1).warmup_steps == 0


def test_a_resumed_step_has_the_rate_of_an_unbroken_run() -> None:
    config = OptimConfig(lr=0.3)
    whole = curve(config, 50, warmup=7)
    assert [learning_rate(s, config, plan(50, 7)) for s in (49, 8, 3)] == [
        whole[49],
        whole[8],
        whole[3],
    ]


@pytest.mark.parametrize(("rule", "factor"), [("none", 1.0), ("linear", 4.0), ("sqrt", 2.0)])
def test_the_peak_scales_with_the_global_batch(rule: str, factor: float) -> None:
    config = OptimConfig(lr=0.1, lr_scaling=rule, lr_base_batch_size=128)  # pyright: ignore[reportArgumentType] # a literal
    assert peak_learning_rate(config, 512) == pytest.approx(0.1 * factor)


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 2))


def test_norms_and_biases_are_not_decayed_unless_asked() -> None:
    groups = build_optimizer(net(), OptimConfig(weight_decay=0.1)).param_groups
    assert [(len(g["params"]), g["weight_decay"]) for g in groups] == [(2, 0.1), (4, 0.0)]
    config = OptimConfig(weight_decay=0.1, decay_norms_and_biases=True)
    assert [len(g["params"]) for g in build_optimizer(net(), config).param_groups] == [6]


def test_momentum_exists_as_zeros_before_the_first_step_and_changes_no_bit() -> None:
    ours, theirs = net(), net()
    mine = build_optimizer(ours, OptimConfig(lr=0.1, weight_decay=0.0))
    assert all((s["momentum_buffer"] == 0).all() for s in mine.state.values())
    plain = torch.optim.SGD(theirs.parameters(), lr=0.1, momentum=0.9, nesterov=True, fused=True)
    for step in range(3):
        for model, optimizer in ((ours, mine), (theirs, plain)):
            optimizer.zero_grad()
            torch.manual_seed(step)
            model(torch.randn(5, 3, 4, 4)).square().sum().backward()
            optimizer.step()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    "config",
    [
        OptimConfig(lr=0.1),
        OptimConfig(lr=0.1, nesterov=False, decay_norms_and_biases=True),
        OptimConfig(lr=0.1, momentum=0.0, nesterov=False),
        OptimConfig(name="adamw", lr=0.01),
    ],
    ids=["two groups", "one group", "no momentum", "adamw"],
)
def test_the_lean_step_has_the_bits_of_the_optimizers_own(config: OptimConfig) -> None:
    models = [net(), net()]
    optimizers = [build_optimizer(model, config) for model in models]
    steps = [lean_step(optimizers[0]), optimizers[1].step]
    for number in range(6):
        for model, optimizer, step in zip(models, optimizers, steps, strict=True):
            optimizer.zero_grad()
            torch.manual_seed(number)
            model(torch.randn(5, 3, 4, 4)).square().sum().backward()
            if number == 2:
                list(model.parameters())[-1].grad = None  # one that was not used
            if number == 4:  # as a run that goes back to a checkpoint does
                load_optimizer(optimizer, copy.deepcopy(optimizer.state_dict()))
            set_learning_rate(optimizer, 0.1 / (1 + number))
            step()
    for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(a, b)


def test_the_average_follows_its_formula_and_swaps_back_to_the_bit() -> None:
    model = net()
    average = Ema(model, decay=0.9)
    before = [p.detach().clone() for p in model.parameters()]
    with torch.no_grad():
        for param in model.parameters():
            param.add_(1.0)
    average.update(step=1000)
    for now, old in zip(average.average, before, strict=True):
        torch.testing.assert_close(now, old * 0.9 + (old + 1) * 0.1)
    weights = [p.detach().clone() for p in model.parameters()]
    average.swap()
    assert not torch.equal(next(model.parameters()), weights[0])
    average.swap()
    assert all(torch.equal(p, w) for p, w in zip(model.parameters(), weights, strict=True))


def test_a_skipped_step_leaves_the_average_alone() -> None:
    model = net()
    average = Ema(model, decay=0.5)
    held = [t.clone() for t in average.average]
    with torch.no_grad():
        for param in model.parameters():
            param.add_(1.0)
    average.update(step=10, keep=torch.tensor(1.0))
    assert all(torch.equal(a, b) for a, b in zip(average.average, held, strict=True))
    average.update(step=10, keep=torch.tensor(0.0))
    assert not torch.equal(average.average[0], held[0])


def test_the_plan_knows_its_periods_and_its_end() -> None:
    config = small("unused", "train.epochs=3", "eval.every_epochs=2", "log_every=4")
    made = make_plan(config, 216, world_size=1)
    assert (made.steps_per_epoch, made.total_steps, made.eval_every) == (9, 27, 18)
    assert [s for s in range(30) if made.eval_due(s)] == [18, 27]
    assert [s for s in range(30) if made.save_due(s)] == [9, 18, 27]
    assert [s for s in range(28) if made.log_due(s)] == [4, 8, 12, 16, 20, 24, 27]
    assert [made.next_event(s) for s in (0, 4, 8, 17, 26)] == [4, 8, 9, 18, 27]
    assert replace(made, eval_every=None).eval_due(27)
    assert make_plan(small("unused", "train.steps=5"), 216, world_size=1).total_steps == 5


@pytest.mark.parametrize("world_size", [5, 8])
def test_a_last_step_with_fewer_samples_than_ranks_is_refused(world_size: int) -> None:
    words = ["train.global_batch_size=53", "train.epochs=1"]  # 216 = 4 x 53 + 4
    kept = small("unused", *words, "train.drop_last=false")
    with pytest.raises(ConfigError) as raised:
        make_plan(kept, 216, world_size=world_size)
    told = str(raised.value)
    assert told.startswith("the last step of an epoch has 4 samples (216 of training, ")
    assert f"fewer than world_size (= {world_size}): set train.drop_last=true, or" in told
    assert told.endswith("or start at most 4 ranks")
    assert make_plan(kept, 216, world_size=4).steps_per_epoch == 5
    assert make_plan(kept, 212, world_size=world_size).steps_per_epoch == 4
    assert make_plan(small("unused", *words), 216, world_size=world_size).steps_per_epoch == 4


def test_a_last_step_that_sync_batchnorm_would_hang_in_is_refused() -> None:
    def config(*, drop_last: bool) -> Config:
        train = TrainConfig(epochs=1, global_batch_size=60, micro_batch_size=5, drop_last=drop_last)
        return Config(train=train, parallel=ParallelConfig(sync_batchnorm=True))

    with pytest.raises(ConfigError, match=r"5 or 6 of 16 samples.*, or train\.drop_last=true$"):
        make_plan(config(drop_last=False), 76, world_size=3)
    make_plan(config(drop_last=False), 78, world_size=3)  # 6 of 18 on each
    make_plan(config(drop_last=False), 60, world_size=3)
    make_plan(config(drop_last=True), 76, world_size=3)


def test_a_warm_up_as_long_as_the_run_is_said() -> None:
    made = make_plan(small("unused", "train.steps=5", "optim.warmup_steps=5"), 216, world_size=1)
    assert made.notice is not None
    assert "never reaches its peak" in made.notice


def test_a_resumed_optimizer_keeps_the_configurations_settings() -> None:
    model = net()
    before = build_optimizer(model, OptimConfig(momentum=0.0, nesterov=False, weight_decay=0.1))
    after = build_optimizer(model, OptimConfig(momentum=0.8, weight_decay=0.2))
    load_optimizer(after, copy.deepcopy(before.state_dict()))
    assert [g["momentum"] for g in after.param_groups] == [0.8, 0.8]
    assert after.param_groups[0]["weight_decay"] == 0.2
    model(torch.randn(5, 3, 4, 4)).square().sum().backward()
    lean_step(after)()  # with momentum from zeros
    assert all(after.state[p]["momentum_buffer"].abs().sum() > 0 for p in model.parameters())


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_a_state_that_was_saved_in_other_strides_is_that_of_the_same_weights(name: str) -> None:
    """Fused kernels take weights and momentum as rows of numbers, whatever their strides."""
    config = OptimConfig(name=name)  # type: ignore[arg-type] # of the two
    plain = nn.Conv2d(3, 4, 3, bias=False)
    wide = nn.Conv2d(3, 4, 3, bias=False)
    optimizer, other = build_optimizer(plain, config), build_optimizer(wide, config)
    grad = torch.randn(4, 3, 3, 3)

    def step(net: nn.Conv2d, taken: torch.optim.Optimizer) -> None:
        net.weight.grad = torch.empty_like(net.weight).copy_(grad)  # in the weight's strides
        lean_step(taken)()

    step(plain, optimizer)
    wide.load_state_dict(plain.state_dict())
    wide.to(memory_format=torch.channels_last)
    load_optimizer(other, copy.deepcopy(optimizer.state_dict()))
    step(plain, optimizer)
    step(wide, other)
    assert torch.equal(plain.weight, wide.weight)
