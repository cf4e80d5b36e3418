"""Wide residual networks, WRN-depth-widen_factor, with pre-activation blocks.

Source: Zagoruyko and Komodakis 2016, https://arxiv.org/abs/1605.07146
"""

from torch import Tensor, nn

from dist_train.config import ConfigError


class WideResNet(nn.Module):
    """A stem, three stages of `num_blocks` blocks, a last norm and a linear layer."""

    def __init__(
        self,
        num_classes: int,
        *,
        num_blocks: int,
        widen_factor: int,
        dropout: float,
        in_channels: int,
    ) -> None:
        super().__init__()
        widths = (16, 16 * widen_factor, 32 * widen_factor, 64 * widen_factor)
        self.conv1 = nn.Conv2d(in_channels, widths[0], 3, padding=1, bias=False)
        self.layer1 = _stage(widths[0], widths[1], num_blocks, stride=1, dropout=dropout)
        self.layer2 = _stage(widths[1], widths[2], num_blocks, stride=2, dropout=dropout)
        self.layer3 = _stage(widths[2], widths[3], num_blocks, stride=2, dropout=dropout)
        self.bn = nn.BatchNorm2d(widths[3])
        self.relu = nn.ReLU(inplace=True)
        self.fc = nn.Linear(widths[3], num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        nn.init.zeros_(self.fc.bias)

    def forward(self, images: Tensor) -> Tensor:
        x = self.layer3(self.layer2(self.layer1(self.conv1(images))))
        return self.fc(self.relu(self.bn(x)).mean(dim=(2, 3)))


class PreActivationBlock(nn.Module):
    """shortcut(x) + conv2(dropout(relu(bn2(conv1(relu(bn1(x)))))))."""

    def __init__(self, in_channels: int, out_channels: int, *, stride: int, dropout: float) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.relu = nn.ReLU(inplace=True)
        self.shortcut = None
        if in_channels != out_channels or stride != 1:
            self.shortcut = nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        active = self.relu(self.bn1(x))
        # A projection sees the activated input, the identity the raw one, as in the authors' code.
        shortcut = x if self.shortcut is None else self.shortcut(active)
        return shortcut + self.conv2(self.dropout(self.relu(self.bn2(self.conv1(active)))))


def wide_resnet(
    num_classes: int,
    *,
    depth: int = 28,
    widen_factor: int = 10,
    dropout: float = 0.3,
    in_channels: int = 3,
) -> WideResNet:
    """Build WRN-depth-widen_factor.

    Shapes: images (batch, in_channels, height, width) float -> logits (batch, num_classes);
    any height and width.

    Args:
        num_classes: logits per image.
        depth: convolutional layers, 6 n + 4 for n blocks a stage.
        widen_factor: stages have 16, 32 and 64 times this many channels.
        dropout: inside each block, between its convolutions.
        in_channels: channels of the images.

    Raises:
        ConfigError: depth is not 6 n + 4.
    """
    num_blocks, rest = divmod(depth - 4, 6)
    if num_blocks < 1 or rest:
        raise ConfigError(
            f"depth={depth} is not 6 n + 4: set model.args.depth to 10, 16, 22, 28, 34, 40 ..."
        )
    return WideResNet(
        num_classes,
        num_blocks=num_blocks,
        widen_factor=widen_factor,
        dropout=dropout,
        in_channels=in_channels,
    )


def _stage(
    in_channels: int, out_channels: int, num_blocks: int, *, stride: int, dropout: float
) -> nn.Sequential:
    first = PreActivationBlock(in_channels, out_channels, stride=stride, dropout=dropout)
    rest = [
        PreActivationBlock(out_channels, out_channels, stride=1, dropout=dropout)
        for _ in range(num_blocks - 1)
    ]
    return nn.Sequential(first, *rest)
