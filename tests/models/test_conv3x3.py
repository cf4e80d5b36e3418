"""Gradients from pictures laid side by side are those of nn.Conv2d; others are nn.Conv2d's own."""

import pytest
import torch
from torch import Tensor, nn

from dist_train.models import conv3x3
from dist_train.models.conv3x3 import LEAST_BATCH, WIDEST, Conv3x3, side_by_side


@pytest.mark.parametrize("shape", [(32, 3, 3), (33, 7, 7), (50, 5, 15), (7, 4, 2), (1, 9, 9)])
def test_maps_side_by_side_give_the_same_gradient_of_the_weight(
    shape: tuple[int, int, int],
) -> None:
    number, height, width = shape
    torch.manual_seed(0)
    images = torch.randn(number, 4, height, width, dtype=torch.float64)
    grad = torch.randn(number, 6, height, width, dtype=torch.float64)
    images, grad = (t.contiguous(memory_format=torch.channels_last) for t in (images, grad))
    weight = torch.randn(6, 4, 3, 3, dtype=torch.float64, requires_grad=True)
    (expected,) = torch.autograd.grad(nn.functional.conv2d(images, weight, padding=1), weight, grad)
    laid = side_by_side(images), side_by_side(grad)
    assert laid[0].shape[0] * laid[0].shape[3] >= number * (width + 1)
    assert laid[0].is_contiguous(memory_format=torch.channels_last)
    (found,) = torch.autograd.grad(
        nn.functional.conv2d(laid[0], weight, padding=1), weight, laid[1]
    )
    assert torch.allclose(found, expected, rtol=1e-12, atol=1e-12)


class Case:
    """One convolution with a batch, and whether its gradient came from maps side by side."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, amx: bool = True) -> None:
        self.laid = 0
        monkeypatch.setattr(conv3x3, "has_amx", lambda: amx)
        monkeypatch.setattr(conv3x3, "side_by_side", self._lay)
        torch.manual_seed(0)
        self.ours = Conv3x3(8, 16)
        self.plain = nn.Conv2d(8, 16, 3, padding=1, bias=False)
        self.plain.load_state_dict(self.ours.state_dict())

    def _lay(self, maps: Tensor) -> Tensor:
        self.laid += 1
        return side_by_side(maps)

    def gradients(
        self, number: int, width: int, *, autocast: bool = True
    ) -> list[tuple[Tensor, Tensor]]:
        """Return (ours, nn.Conv2d's) of the output and the gradients of weight and images."""
        images = torch.randn(number, 8, 5, width).contiguous(memory_format=torch.channels_last)
        towards = torch.randn(number, 16, 5, width)
        self.exact = self._exact(images, towards)
        found = []
        for conv in (self.ours, self.plain):
            leaf = images.clone().requires_grad_()
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                out = conv(leaf)
            out.backward(towards.to(out.dtype))
            assert conv.weight.grad is not None
            assert leaf.grad is not None
            found.append((out, conv.weight.grad, leaf.grad))
        return list(zip(*found, strict=True))

    def _exact(self, *maps: Tensor) -> Tensor:
        """Return the gradient of the weight of these bf16 numbers, summed in float64."""
        images, towards = (part.bfloat16().double() for part in maps)
        weight = self.plain.weight.detach().bfloat16().double().requires_grad_()
        out = nn.functional.conv2d(images, weight, padding=1)
        return torch.autograd.grad(out, weight, towards)[0]


def test_bf16_gradients_are_as_exact_as_those_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch sums in fp32 where the CPU has such instructions, elsewhere in bf16 now and then."""
    case = Case(monkeypatch)
    output, of_weight, of_images = case.gradients(LEAST_BATCH + 1, 7)
    assert case.laid == 2, "images and gradient"
    assert torch.equal(*output)
    assert torch.equal(*of_images)
    ours, torchs = of_weight
    assert ours.dtype == torch.float32
    error, torchs_error = ((found - case.exact).abs().max() for found in (ours, torchs))
    assert error <= max(torchs_error, 2**-8 * case.exact.abs().max())


@pytest.mark.parametrize(
    ("number", "width", "autocast", "amx"),
    [
        (LEAST_BATCH - 1, 7, True, True),
        (LEAST_BATCH, WIDEST + 1, True, True),
        (LEAST_BATCH, 7, False, True),
        (LEAST_BATCH, 7, True, False),
    ],
)
def test_elsewhere_it_is_the_convolution_of_torch(
    number: int, width: int, autocast: bool, amx: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = Case(monkeypatch, amx=amx)
    for ours, torchs in case.gradients(number, width, autocast=autocast):
        assert torch.equal(ours, torchs)
    assert case.laid == 0


def test_without_a_gradient_nothing_is_kept_for_one(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(monkeypatch)
    images = torch.randn(64, 8, 7, 7).contiguous(memory_format=torch.channels_last)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(case.ours(images), case.plain(images))
    case.ours.weight.requires_grad_(False)
    with torch.autocast("cpu", torch.bfloat16):
        assert not case.ours(images).requires_grad
