"""Shapes, sizes, names and gradients of the networks."""

from collections.abc import Callable

import pytest
import torch
from torch import nn

from dist_train.config import ConfigError
from dist_train.models import resnet9, resnet18_cifar, tutorial_cnn, wide_resnet


def small_wide_resnet(num_classes: int, *, in_channels: int = 3) -> nn.Module:
    return wide_resnet(num_classes, depth=10, widen_factor=2, in_channels=in_channels)


FACTORIES = [tutorial_cnn, resnet9, resnet18_cifar, small_wide_resnet]


@pytest.mark.parametrize("factory", FACTORIES)
@pytest.mark.parametrize("in_channels", [1, 3])
@pytest.mark.parametrize(("height", "width"), [(32, 32), (28, 28), (8, 8), (40, 25)])
def test_logits_have_one_row_per_image(
    factory: Callable[..., nn.Module], in_channels: int, height: int, width: int
) -> None:
    model = factory(7, in_channels=in_channels)
    assert model(torch.randn(2, in_channels, height, width)).shape == (2, 7)


@pytest.mark.parametrize("factory", FACTORIES)
def test_gradients_reach_every_parameter(factory: Callable[..., nn.Module]) -> None:
    torch.manual_seed(0)
    model = factory(10)
    loss = nn.functional.cross_entropy(model(torch.randn(8, 3, 32, 32)), torch.arange(8))
    loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize(
    ("build", "num_parameters"),
    [
        (lambda: tutorial_cnn(), 94_538),
        (lambda: tutorial_cnn(in_channels=1), 93_962),
        (lambda: resnet9(10, width=48), 3_699_504),
        (lambda: resnet9(10), 6_573_120),
        (lambda: resnet18_cifar(10), 11_173_962),
        (lambda: wide_resnet(10), 36_479_194),
        (lambda: wide_resnet(10, depth=40, widen_factor=4), 8_949_210),
    ],
)
def test_number_of_parameters(build: Callable[[], nn.Module], num_parameters: int) -> None:
    with torch.device("meta"):
        model = build()
    assert sum(parameter.numel() for parameter in model.parameters()) == num_parameters


@pytest.mark.parametrize(
    ("factory", "names"),
    [
        (tutorial_cnn, ["0.0.weight", "0.6.bias", "4.weight"]),
        (resnet9, ["prep.0.weight", "layer1.1.branch.2.1.running_mean", "head.weight"]),
        (resnet18_cifar, ["conv1.weight", "layer2.0.downsample.1.bias", "fc.bias"]),
        (small_wide_resnet, ["layer3.0.shortcut.weight", "layer1.0.bn2.running_var", "fc.bias"]),
    ],
)
def test_names_in_a_checkpoint_stay(factory: Callable[..., nn.Module], names: list[str]) -> None:
    assert set(names) <= set(factory(10).state_dict())


def test_the_tutorial_cnn_treats_each_sample_alone() -> None:
    model, images = tutorial_cnn(), torch.randn(4, 3, 32, 32)
    assert not any("running_mean" in name for name in model.state_dict())
    torch.testing.assert_close(model(images)[1:2], model(images[1:2]), rtol=1e-5, atol=1e-6)


def test_the_first_loss_of_resnet9_is_near_that_of_a_guess() -> None:
    torch.manual_seed(0)
    logits = resnet9(10)(torch.randn(64, 3, 32, 32))
    loss = nn.functional.cross_entropy(logits, torch.randint(10, (64,)))
    assert abs(loss.item() - torch.tensor(10.0).log().item()) < 0.3


@pytest.mark.parametrize("depth", [4, 27, 18])
def test_a_depth_that_is_not_6n_plus_4_is_refused(depth: int) -> None:
    with pytest.raises(ConfigError, match=rf"depth={depth} is not 6 n \+ 4: set model.args.depth"):
        wide_resnet(10, depth=depth)
