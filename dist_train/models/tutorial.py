"""The CNN of many tutorials: three convolutions and a linear layer, no BatchNorm.

A sample's logits depend on that sample alone, so losses can be compared across rank counts.
"""

from torch import nn

CHANNELS = (32, 64, 128)


def tutorial_cnn(
    num_classes: int = 10, *, in_channels: int = 3, dropout: float = 0.0
) -> nn.Sequential:
    """Build the 32-64-128 CNN.

    Shapes: images (batch, in_channels, height, width) float -> logits (batch, num_classes);
    height and width at least 8, of any size: the features are averaged over the picture, where
    the usual text flattens them and fits one picture size only.
    """
    layers: list[nn.Module] = []
    channels = in_channels
    for width in CHANNELS:
        layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
        channels = width
    return nn.Sequential(
        nn.Sequential(*layers),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Dropout(dropout),
        nn.Linear(channels, num_classes),
    )
