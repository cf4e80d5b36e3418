"""Tell what a folder holds by its shape: splits of class folders, CIFAR-10, torchvision's others.

Only names are looked at, and of few folders. Imports no torch.
"""

import os
from collections.abc import Iterable
from pathlib import Path

from dist_train.config.schema import ConfigError, DataConfig

EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".tif", ".tiff")
TRAIN = ("train", "training")
TEST = ("test", "testing", "val", "valid", "validation")  # `test` comes first where it is there
CIFAR10 = ("cifar-10-batches-py", "cifar-10-python.tar.gz")
UNSPLIT = (
    "it holds images or class folders that belong to no split: move most of each class into "
    "train/<class>/, the rest into test/<class>/"
)
LOOKED_AT = 50  # folders in which a picture is looked for

# What torchvision's data sets leave in their root.
TORCHVISION = {
    "MNIST/raw": "MNIST",
    "FashionMNIST/raw": "FashionMNIST",
    "KMNIST/raw": "KMNIST",
    "EMNIST/raw": "EMNIST data.args.split=letters",
    "cifar-100-python": "CIFAR100",
    "cifar-100-python.tar.gz": "CIFAR100",
    "usps.bz2": "USPS",
    "train_32x32.mat": "SVHN",
    "stl10_binary": "STL10",
    "flowers-102": "Flowers102",
    "food-101": "Food101",
    "gtsrb": "GTSRB",
    "fgvc-aircraft-2013b": "FGVCAircraft",
    "dtd": "DTD",
    "pcam": "PCAM",
    "country211": "Country211",
    "oxford-iiit-pet": "OxfordIIITPet",
    "rendered-sst2": "RenderedSST2",
    "stanford_cars": "StanfordCars",
    "fer2013": "FER2013",
    "imagenette2": "Imagenette",
    "imagenette2-320": "Imagenette",
    "imagenette2-160": "Imagenette",
}


def source_of(config: DataConfig) -> str:
    """Return the source that data.name means: `auto` is that whose shape data.root has.

    Without a data.root, and with one of no known shape, `auto` is CIFAR-10.

    Raises:
        ConfigError: data.root holds something else that has to be named.
    """
    if config.name != "auto":
        return config.name
    base = Path(config.root or ".").expanduser()
    if config.root is None or any((base / name).exists() for name in CIFAR10):
        return "cifar10"
    if has_splits(base):
        return "image_folder"
    hint = what_else(base) or (UNSPLIT if has_classes(base) else None)
    if hint is not None:
        raise ConfigError(
            f"data.root={config.root} holds neither CIFAR-10 nor train/ and test/, but {hint}; or "
            "data.name=cifar10 to have CIFAR-10 there"
        )
    return "cifar10"


def what_else(base: Path) -> str | None:
    """Say which source a folder that is no image_folder fits, with the setting to give."""
    below = split_folders_below(base)
    if below is not None:
        return f"{below} has them: set data.root={below}"
    if base.name.lower() in (*TRAIN, *TEST) and has_splits(base.parent):
        if any(name.lower() in TEST for name in folders_in(base.parent)):
            return f"its parent has them: set data.root={base.parent}"
        return (
            f"it is such a folder itself: set data.root={base.parent}, and move a part of the "
            f"images to {base.parent}/test/<class>/"
        )
    if any((base / name).exists() for name in CIFAR10):
        return "it holds CIFAR-10: set data.name=cifar10"
    if (found := torchvision_name(base)) is not None:
        return f"it holds a data set of torchvision: set data.name=torchvision.datasets:{found}"
    return None


def has_splits(base: Path) -> bool:
    """Say whether there is a folder for training in it."""
    return any(name.lower() in TRAIN for name in folders_in(base))


def has_classes(base: Path) -> bool:
    """Say whether the folder holds pictures, or folders that do: classes without a split."""
    return any(_has_pictures(folder) for folder in (base, *_some_below(base)))


def split_folders_below(base: Path) -> Path | None:
    """Return the one folder in it that holds a folder for training, as an unpacked archive does."""
    found = [folder for folder in _some_below(base) if has_splits(folder)]
    return found[0] if len(found) == 1 else None


def torchvision_name(base: Path) -> str | None:
    """Return the data set of torchvision whose files are there, with the settings it needs."""
    return next((name for path, name in TORCHVISION.items() if (base / path).exists()), None)


def folders_in(base: Path) -> list[str]:
    """Return the names of a folder's folders, sorted, without hidden ones; of no folder: none."""
    try:
        with os.scandir(base) as entries:
            return sorted(e.name for e in entries if e.is_dir() and not e.name.startswith("."))
    except OSError:
        return []


def _some_below(base: Path) -> Iterable[Path]:
    return (base / name for name in folders_in(base)[:LOOKED_AT])


def _has_pictures(folder: Path) -> bool:
    try:
        with os.scandir(folder) as entries:
            return any(entry.name.lower().endswith(EXTENSIONS) for entry in entries)
    except OSError:
        return False
