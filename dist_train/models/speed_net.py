"""A net for the shortest time to 94 % on CIFAR-10: a whitening layer and three wide groups.

After Jordan 2024, "94% on CIFAR-10 in 3.29 Seconds on a Single GPU", arXiv:2404.00498, and the
README of https://github.com/KellerJordan/cifar10-airbench.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dist_train.models.conv3x3 import Conv3x3

PATCH = 2  # side of the whitening filters
LEAST_VARIANCE = 5e-4
STATISTICS_MOMENTUM = 0.4  # of the running statistics: a run is only a few hundred steps
# The head's output counts so much: under one learning rate for biases and head, the head's should
# be (3.55)^2 times as high.
HEAD_SCALE = 3.55
RECORD_WIDTH = 256  # of the last group: for narrower ones a step of the head is as long as there


class SpeedNet(nn.Module):
    """Whitening, then groups of two convolutions without residuals; 32 x 32 pictures."""

    def __init__(self, num_classes: int, *, widths: tuple[int, int, int], in_channels: int) -> None:
        super().__init__()
        whitened = 2 * in_channels * PATCH**2
        self.whiten = nn.Conv2d(in_channels, whitened, PATCH, bias=True)
        self.whiten.weight.requires_grad_(False)
        nn.init.zeros_(self.whiten.bias)  # type: ignore[arg-type] # it has one
        first, second, third = widths
        self.groups = nn.Sequential(
            Group(whitened, first), Group(first, second), Group(second, third)
        )
        self.head = nn.Linear(third, num_classes, bias=False)
        with torch.no_grad():
            self.head.weight /= HEAD_SCALE * self.head.weight.std()

    def forward(self, images: Tensor) -> Tensor:
        features = self.groups(F.gelu(self.whiten(images)))
        pooled = features.amax(dim=(2, 3))
        kind = "cuda" if images.is_cuda else "cpu"
        with torch.autocast(kind, enabled=False):  # in bf16 many logits are ties
            logits = self.head(pooled.float())
        return logits * (HEAD_SCALE / (RECORD_WIDTH * pooled.shape[1]) ** 0.5)

    @torch.no_grad()
    def initialise_from(self, images: Tensor) -> None:
        """Set the whitening filters from pictures as they come into the net, (n, c, h, w).

        They are the eigenvectors of the patches' covariance, divided by the standard deviations
        along them, each once with either sign.
        """
        channels = images.shape[1]
        patches = F.unfold(images.float(), PATCH)  # (n, c * PATCH * PATCH, positions)
        flat = patches.transpose(1, 2).reshape(-1, patches.shape[1])
        values, vectors = torch.linalg.eigh(flat.T @ flat / len(flat))
        filters = vectors.T / (values[:, None] + LEAST_VARIANCE).sqrt()
        filters = filters.reshape(-1, channels, PATCH, PATCH)
        self.whiten.weight.copy_(torch.cat([filters, -filters]))


class Group(nn.Module):
    """Convolution, pooling, convolution; a normalisation and GELU after each."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.first = _conv(in_channels, out_channels)
        self.first_norm = _norm(out_channels)
        self.second = _conv(out_channels, out_channels)
        self.second_norm = _norm(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.first_norm(F.max_pool2d(self.first(x), 2)))
        return F.gelu(self.second_norm(self.second(x)))


def speed_net(
    num_classes: int,
    *,
    widths: Sequence[int] = (64, 256, 256),
    in_channels: int = 3,
) -> SpeedNet:
    """Build the net: images (batch, in_channels, 32, 32) float -> logits (batch, num_classes)."""
    first, second, third = widths
    return SpeedNet(num_classes, widths=(first, second, third), in_channels=in_channels)


def _conv(in_channels: int, out_channels: int) -> nn.Conv2d:
    conv = Conv3x3(in_channels, out_channels)
    nn.init.dirac_(conv.weight[:in_channels])  # hands its input on, where there is one
    return conv


def _norm(channels: int) -> nn.BatchNorm2d:
    norm = nn.BatchNorm2d(channels, momentum=STATISTICS_MOMENTUM, eps=1e-12)
    norm.weight.requires_grad_(False)
    return norm
