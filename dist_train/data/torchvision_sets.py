"""What is known of torchvision's own data sets: of these very classes, as a subclass may differ.

Imports no torchvision: a class of it can only be met where that has been imported.
"""

import sys
from collections.abc import Callable
from typing import Any

MODULE = "torchvision.datasets"

# Names of the splits to train and to test on, where split= is not train and test.
SPLITS = {
    "FGVCAircraft": ("trainval", "test"),
    "ImageNet": ("train", "val"),
    "Imagenette": ("train", "val"),
    "OxfordIIITPet": ("trainval", "test"),
    "Places365": ("train-standard", "val"),
}
NUM_CLASSES = {"FER2013": 7, "GTSRB": 43}  # of those that do not say
FOLDERS = ("DatasetFolder", "ImageFolder")

# Attributes of which item i is row i, if there is no transform.
ARRAYS = {
    "CIFAR10": ("data", "targets"),
    "CIFAR100": ("data", "targets"),
    "EMNIST": ("data", "targets"),
    "FashionMNIST": ("data", "targets"),
    "KMNIST": ("data", "targets"),
    "MNIST": ("data", "targets"),
    "STL10": ("data", "labels"),
    "SVHN": ("data", "labels"),
    "USPS": ("data", "targets"),
}
CHANNELS_FIRST = ("STL10", "SVHN")


def own_name(kind: Callable[..., Any]) -> str | None:
    """Return the name of a class in torchvision.datasets; None: it is another."""
    name = getattr(kind, "__name__", "")
    datasets = sys.modules.get(MODULE)
    return name if name and getattr(datasets, name, None) is kind else None
