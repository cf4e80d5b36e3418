"""Muon against its definition; the rest of the parameters against SGD."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from dist_train.config import OptimConfig
from dist_train.muon import COEFFICIENTS, Muon, orthogonal
from dist_train.optim import build_optimizer, set_learning_rate


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(32, 5)
    )


@pytest.mark.parametrize("shape", [(4, 16, 100), (2, 100, 16), (1, 8, 8)])
def test_updates_are_nearly_orthogonal(shape: tuple[int, int, int]) -> None:
    torch.manual_seed(0)
    made = orthogonal(torch.randn(shape), 5).float()
    assert made.shape == shape
    values = torch.linalg.svdvals(made)
    assert values.min() > 0.4
    assert values.max() < 1.3
    # Its direction is that of U V^T.
    for number, matrix in enumerate(torch.randn(shape, generator=torch.manual_seed(0))):
        u, _, v = torch.linalg.svd(matrix, full_matrices=False)
        cosine = torch.nn.functional.cosine_similarity(
            (u @ v).flatten(), made[number].flatten(), dim=0
        )
        assert cosine > 0.9


@pytest.mark.parametrize("steps", [3, 5])
def test_a_step_is_that_of_its_definition(steps: int) -> None:
    torch.manual_seed(1)
    weight = nn.Parameter(torch.randn(6, 2, 3, 3))
    bias = nn.Parameter(torch.randn(6))
    groups = [
        {"params": [weight], "orthogonal": True, "steps": steps, "momentum": 0.6, "unit": True},
        {"params": [bias], "orthogonal": False, "momentum": 0.8, "weight_decay": 0.01},
    ]
    optimizer = Muon(groups, lr=0.1)
    expected_w, expected_b = weight.detach().clone(), bias.detach().clone()
    held_w, held_b = torch.zeros_like(expected_w), torch.zeros_like(expected_b)
    for _ in range(3):
        weight.grad, bias.grad = torch.randn_like(weight), torch.randn_like(bias)
        held_w = 0.6 * held_w + weight.grad
        update = weight.grad + 0.6 * held_w
        x = update.flatten(1).bfloat16()
        x = x / (x.norm() + 1e-7)
        a, b, c = COEFFICIENTS
        for _ in range(steps):
            square = x @ x.T
            x = a * x + (b * square + c * square @ square) @ x
        expected_w *= 6**0.5 / expected_w.norm()
        expected_w -= 0.1 * x.float().view_as(expected_w)
        grad = bias.grad + 0.01 * expected_b
        held_b = 0.8 * held_b + grad
        expected_b -= 0.1 * (grad + 0.8 * held_b)
        optimizer.step()
    torch.testing.assert_close(weight.detach(), expected_w, rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(bias.detach(), expected_b)


def test_filters_are_orthogonalised_and_the_head_is_not() -> None:
    model = net()
    config = OptimConfig(name="muon", lr=0.2, rest_lr=0.05, rest_momentum=0.5)
    optimizer = build_optimizer(model, config)
    filters, rest, kept = optimizer.param_groups
    assert [tuple(p.shape) for p in filters["params"]] == [(8, 3, 3, 3)]
    assert [tuple(p.shape) for p in rest["params"]] == [(5, 32)]
    assert [tuple(p.shape) for p in kept["params"]] == [(8,), (8,), (5,)]
    assert (rest["weight_decay"], kept["weight_decay"]) == (config.weight_decay, 0.0)
    decayed = build_optimizer(model, replace(config, decay_norms_and_biases=True)).param_groups
    assert [tuple(p.shape) for p in decayed[1]["params"]] == [(8,), (8,), (5, 32), (5,)]
    fewer = build_optimizer(model, replace(config, orthogonal_steps=3)).param_groups
    assert (filters["steps"], fewer[0]["steps"]) == (5, 3)
    set_learning_rate(optimizer, 0.1)
    assert filters["lr"] == 0.1
    assert rest["lr"] == pytest.approx(0.025)


def test_its_state_survives_a_checkpoint() -> None:
    config = OptimConfig(name="muon", lr=0.2)
    runs = []
    for stop in (None, 2):
        model = net()
        optimizer = build_optimizer(model, config)
        for step in range(4):
            if step == stop:
                saved = optimizer.state_dict()
                optimizer = build_optimizer(model, config)
                optimizer.load_state_dict(saved)
            optimizer.zero_grad()
            torch.manual_seed(step)
            model(torch.randn(4, 3, 4, 4)).square().sum().backward()
            optimizer.step()
        runs.append([p.detach().clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
