"""Networks: each factory takes num_classes and returns a module from images to logits."""

from dist_train.models.activation import checkpoint_activations
from dist_train.models.resnet9 import resnet9
from dist_train.models.resnet18 import resnet18_cifar
from dist_train.models.speed_net import speed_net
from dist_train.models.tutorial import tutorial_cnn
from dist_train.models.wide_resnet import wide_resnet

__all__ = [
    "checkpoint_activations",
    "resnet9",
    "resnet18_cifar",
    "speed_net",
    "tutorial_cnn",
    "wide_resnet",
]
