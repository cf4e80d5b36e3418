"""ResNet-18 for small pictures: torchvision's basic blocks behind a stem that keeps 32 x 32.

Source: He et al. 2015, https://arxiv.org/abs/1512.03385; the stem (3 x 3, stride 1, no pooling)
is that of section 4.2.
"""

from torch import Tensor, nn


class ResNet18Cifar(nn.Module):
    """Four stages of two basic blocks; parameter names are those of torchvision's resnet18."""

    def __init__(self, num_classes: int, *, in_channels: int, width: int, dropout: float) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.layer1 = _stage(width, width, stride=1)
        self.layer2 = _stage(width, 2 * width, stride=2)
        self.layer3 = _stage(2 * width, 4 * width, stride=2)
        self.layer4 = _stage(4 * width, 8 * width, stride=2)
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(8 * width, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(images)))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(self.dropout(x.mean(dim=(2, 3))))


def resnet18_cifar(
    num_classes: int, *, in_channels: int = 3, width: int = 64, dropout: float = 0.0
) -> ResNet18Cifar:
    """Build a ResNet-18 with the CIFAR stem.

    Shapes: images (batch, in_channels, height, width) float -> logits (batch, num_classes);
    any height and width.

    Args:
        num_classes: logits per image.
        in_channels: channels of the images.
        width: channels of the first stage; 2, 4 and 8 times that follow.
        dropout: of the averaged features, before the linear layer.
    """
    return ResNet18Cifar(num_classes, in_channels=in_channels, width=width, dropout=dropout)


def _stage(in_channels: int, out_channels: int, *, stride: int) -> nn.Sequential:
    from torchvision.models.resnet import BasicBlock

    downsample = None
    if stride != 1 or in_channels != out_channels:
        downsample = nn.Sequential(
            nn.Conv2d(in_channels, out_channels, 1, stride=stride, bias=False),
            nn.BatchNorm2d(out_channels),
        )
    return nn.Sequential(
        BasicBlock(in_channels, out_channels, stride, downsample),
        BasicBlock(out_channels, out_channels),
    )
