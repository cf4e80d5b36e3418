"""ResNet-9: the small fast net of the DAWNBench CIFAR-10 entries.

Source: David Page, "How to Train Your ResNet", https://github.com/davidcpage/cifar10-fast
"""

from torch import Tensor, nn

from dist_train.models.conv3x3 import Conv3x3

# Max-pooled features after ReLU are large, and so would be the first logits: Page's factor keeps
# the first losses near log(num_classes) under a high peak learning rate.
LOGIT_SCALE = 0.125


class ResNet9(nn.Module):
    """Prep, three pooled stages, residual branches in the first and the last."""

    def __init__(self, num_classes: int, *, width: int, in_channels: int, dropout: float) -> None:
        super().__init__()
        self.prep = _conv(in_channels, width)
        self.layer1 = nn.Sequential(
            _conv(width, 2 * width, pool=True), Residual(2 * width, dropout=dropout)
        )
        self.layer2 = nn.Sequential(_conv(2 * width, 4 * width, pool=True))
        self.layer3 = nn.Sequential(
            _conv(4 * width, 8 * width, pool=True), Residual(8 * width, dropout=dropout)
        )
        self.head = nn.Linear(8 * width, num_classes, bias=False)

    def forward(self, images: Tensor) -> Tensor:
        features = self.layer3(self.layer2(self.layer1(self.prep(images))))
        # amax: AdaptiveMaxPool2d has no deterministic backward on CUDA.
        return self.head(features.amax(dim=(2, 3))) * LOGIT_SCALE


class Residual(nn.Module):
    """x + conv(conv(x)) at constant width: (batch, width, height, width) in and out."""

    def __init__(self, width: int, *, dropout: float) -> None:
        super().__init__()
        self.branch = nn.Sequential(_conv(width, width), nn.Dropout(dropout), _conv(width, width))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch(x)


def resnet9(
    num_classes: int, *, width: int = 64, in_channels: int = 3, dropout: float = 0.0
) -> ResNet9:
    """Build a ResNet-9.

    Shapes: images (batch, in_channels, height, width) float -> logits (batch, num_classes);
    height and width at least 8, of any size.

    Args:
        num_classes: logits per image.
        width: channels of the first convolution; 2, 4 and 8 times that follow.
        in_channels: channels of the images.
        dropout: inside the residual branches, between the two convolutions.
    """
    return ResNet9(num_classes, width=width, in_channels=in_channels, dropout=dropout)


def _conv(in_channels: int, out_channels: int, *, pool: bool = False) -> nn.Sequential:
    layers: list[nn.Module] = [
        Conv3x3(in_channels, out_channels),
        nn.BatchNorm2d(out_channels),
        nn.ReLU(inplace=True),
    ]
    if pool:
        layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers)
