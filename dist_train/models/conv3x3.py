"""A 3x3 convolution whose gradients cost less on CPUs with AMX where feature maps are narrow."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dist_train.device import has_amx

# AMX multiplies rows of 32 bf16 numbers, and oneDNN sums the gradient of a weight along the
# rows of a feature map: of 32 numbers it uses 7 where the map is 7 wide.
WIDEST = 15
COLUMNS = 64  # of the rows that are made of narrow ones: twice 32
LEAST_BATCH = 32


class Conv3x3(nn.Conv2d):
    """nn.Conv2d of 3x3 with padding 1, stride 1 and no bias: (n, c, h, w) to (n, out, h, w).

    Under bf16 autocast on a CPU with AMX the gradient of the weight is computed from pictures laid
    side by side, which sums the same products in another order and makes whole nets 1.2 to 1.5
    times as fast (benchmarks/RESULTS.md); everywhere else it is nn.Conv2d.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, 3, padding=1, bias=False)

    def forward(self, input: Tensor) -> Tensor:
        if not self._gains(input):
            return super().forward(input)
        convolved = _SideBySide.apply(input.to(torch.bfloat16), self.weight.to(torch.bfloat16))
        assert isinstance(convolved, Tensor)
        return convolved

    def _gains(self, images: Tensor) -> bool:
        return (
            images.device.type == "cpu"
            and torch.is_grad_enabled()
            and self.weight.requires_grad
            and torch.is_autocast_enabled("cpu")
            and torch.get_autocast_dtype("cpu") == torch.bfloat16
            and images.shape[-1] <= WIDEST
            and len(images) >= LEAST_BATCH
            and images.is_contiguous(memory_format=torch.channels_last)
            and not torch.compiler.is_compiling()
            and has_amx()
        )


class _SideBySide(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, images: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(images, weight)
        return F.conv2d(images, weight, padding=1)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, Tensor | None]:
        (grad,) = grad_outputs
        images, weight = ctx.saved_tensors
        to_images, to_weight = ctx.needs_input_grad
        of_images = of_weight = None
        if to_images:
            of_images = _gradient(0, images, weight, grad)
        if to_weight:
            of_weight = _gradient(1, side_by_side(images), weight, side_by_side(grad))
        return of_images, of_weight


def side_by_side(maps: Tensor) -> Tensor:
    """Lay feature maps next to each other: (n, c, h, w) to (n / k, c, h, k * (w + 1)).

    A column of zeros follows each, which is the padding of its neighbours, too; k * (w + 1) is at
    most COLUMNS. The last group is filled up with maps of zeros.
    """
    number, channels, height, width = maps.shape
    side = min(number, max(1, COLUMNS // (width + 1)))
    groups = -(-number // side)
    laid = maps.new_empty(groups, height, side, width + 1, channels)
    laid[:, :, :, width].zero_()
    rows = maps.permute(0, 2, 3, 1)
    whole = number // side
    laid[:whole, :, :, :width] = rows[: whole * side].unflatten(0, (whole, side)).transpose(1, 2)
    if whole < groups:
        left = number - whole * side
        laid[whole, :, :left, :width] = rows[whole * side :].transpose(0, 1)
        laid[whole, :, left:].zero_()
    return laid.flatten(2, 3).permute(0, 3, 1, 2)


def _gradient(number: int, images: Tensor, weight: Tensor, grad: Tensor) -> Tensor:
    """Return the gradient of the images (0) or of the weight (1)."""
    wanted = [number == 0, number == 1, False]
    stride = padding = dilation = [1, 1]
    return torch.ops.aten.convolution_backward(
        grad, images, weight, None, stride, padding, dilation, False, [0, 0], 1, wanted
    )[number]
