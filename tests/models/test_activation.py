"""Activation checkpointing changes memory and nothing else."""

import copy
from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from dist_train.config import ConfigError
from dist_train.models import (
    checkpoint_activations,
    resnet9,
    resnet18_cifar,
    tutorial_cnn,
    wide_resnet,
)

pytestmark = pytest.mark.slow


class Wrapper(nn.Module):
    """A user's net around a backbone, with a head of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = torchvision.models.resnet18()
        self.head = nn.Sequential(nn.ReLU(), nn.Linear(1000, 10))

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.backbone(images))


def resnet9_with_dropout() -> nn.Module:
    return resnet9(10, width=16, dropout=0.3)


def wide_resnet_with_dropout() -> nn.Module:
    return wide_resnet(10, depth=16, widen_factor=1)


def train_steps(model: nn.Module) -> int:
    """Take two steps; return the bytes that the second forward saved for backward."""
    torch.manual_seed(3)
    images = torch.randn(2, 8, 3, 64, 64)
    labels = torch.randint(10, (2, 8))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    for step in range(2):
        optimizer.zero_grad()
        saved.clear()
        with saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = nn.functional.cross_entropy(model(images[step]), labels[step])
        loss.backward()
        optimizer.step()
    return sum(saved.values())


@pytest.mark.parametrize(
    ("build", "num_segments"),
    [
        (resnet9_with_dropout, 6),
        (wide_resnet_with_dropout, 6),
        (torchvision.models.resnet18, 8),
        (Wrapper, 9),
    ],
)
def test_gradients_weights_and_buffers_keep_their_bits_in_less_memory(
    build: Callable[[], nn.Module], num_segments: int
) -> None:
    torch.manual_seed(0)
    plain = build()
    checkpointed = copy.deepcopy(plain)
    assert checkpoint_activations(checkpointed) == num_segments
    bytes_plain, bytes_checkpointed = train_steps(plain), train_steps(checkpointed)
    assert list(plain.state_dict()) == list(checkpointed.state_dict())
    for name, tensor in plain.state_dict().items():
        assert torch.equal(tensor, checkpointed.state_dict()[name]), name
    for (name, a), b in zip(plain.named_parameters(), checkpointed.parameters(), strict=True):
        assert a.grad is not None, name
        assert b.grad is not None, name
        assert torch.equal(a.grad, b.grad), name
    assert bytes_checkpointed < bytes_plain / 2


def test_running_statistics_would_be_updated_twice_without_the_spared_buffers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("dist_train.models.activation._buffers_spared", nullcontext)
    plain = resnet9(10, width=8)
    checkpointed = copy.deepcopy(plain)
    checkpoint_activations(checkpointed)
    train_steps(plain)
    train_steps(checkpointed)
    name = "prep.1.num_batches_tracked"
    assert (plain.state_dict()[name], checkpointed.state_dict()[name]) == (2, 4)


@pytest.mark.parametrize(
    ("build", "num_segments"),
    [
        (lambda: tutorial_cnn(), 1),
        (lambda: resnet18_cifar(10), 8),
        (lambda: torchvision.models.resnet50(), 16),
        (lambda: torchvision.models.densenet121(), 7),
        (lambda: torchvision.models.vit_b_16(), 13),
    ],
)
def test_number_of_segments(build: Callable[[], nn.Module], num_segments: int) -> None:
    with torch.device("meta"):
        assert checkpoint_activations(build()) == num_segments


def test_a_copy_computes_with_its_own_weights() -> None:
    model = resnet9_with_dropout()
    checkpoint_activations(model)
    clone = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in clone.parameters():
            parameter.zero_()
    assert clone(torch.randn(2, 3, 32, 32)).abs().sum() == 0


def test_eval_mode_is_left_alone() -> None:
    model = resnet9_with_dropout().eval()
    images = torch.randn(2, 3, 32, 32)
    before = model(images)
    checkpoint_activations(model)
    assert torch.equal(model(images), before)
    model(images).sum().backward()


def test_a_model_of_single_layers_is_refused() -> None:
    with pytest.raises(ConfigError, match="finds no block in Sequential"):
        checkpoint_activations(nn.Sequential(nn.Flatten(), nn.Linear(12, 10)))
