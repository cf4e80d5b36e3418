"""A data set of the user's own, by import path, under torchvision's contract."""

import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from dist_train.config.importing import import_callable, raised_where
from dist_train.config.schema import ConfigError, DataConfig
from dist_train.data.pictures import Pictures
from dist_train.data.splits import Source
from dist_train.data.worker_dataset import WorkerPictures


def load_user_source(config: DataConfig) -> Source:
    """Call `data.name` as callable(root=, download=, train=, **data.args) for each split.

    `root` and `download` are passed only if the callable names them. uint8 pictures that the
    data set keeps whole in `.data` and `.targets`, as torchvision's CIFAR10 and MNIST do, are
    taken into memory if it has no transform; anything else goes through workers.

    Raises:
        ConfigError: it does not import, cannot be called so, fails, or returns no data set.
    """
    factory = import_callable(config.name, "data.name")
    train, test = (_call(factory, config, train=train) for train in (True, False))
    classes = _classes(train, config.name)
    if list(_classes_given(test) or classes) != list(classes):
        raise ConfigError(
            f"data.name={config.name}: .classes differ between train=True and train=False: "
            "give both the same list"
        )
    return Source(
        name=config.name,
        classes=classes,
        train=_split(train, config, num_classes=len(classes)),
        test=_split(test, config, num_classes=len(classes)),
        root=config.root,
    )


def _call(factory: Callable[..., Any], config: DataConfig, *, train: bool) -> Any:
    """Make one split, passing what the signature asks for."""
    arguments: dict[str, Any] = {"train": train, **config.args}
    signature = inspect.signature(factory)
    root = signature.parameters.get("root")
    if root is not None and config.root is not None:
        arguments["root"] = config.root
    elif root is not None and root.default is root.empty and "root" not in arguments:
        raise ConfigError(f"data.name={config.name} needs a root: set data.root to its folder")
    if "download" in signature.parameters:
        arguments.setdefault("download", config.download)
    shown = ", ".join(f"{name}={value!r}" for name, value in arguments.items())
    try:
        signature.bind(**arguments)
    except TypeError as error:
        raise ConfigError(
            f"data.name={config.name} cannot be called with ({shown}): {error}: "
            "change data.args, or let it take train=True or False"
        ) from error
    try:
        dataset = factory(**arguments)
    except Exception as error:  # whatever the user's function raises
        raise ConfigError(
            f"data.name={config.name} called with ({shown}) fails: {raised_where(error)}"
        ) from error
    if not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")):
        raise ConfigError(
            f"data.name={config.name} returns a {type(dataset).__name__}, no map-style data set: "
            "return an object with __len__ and __getitem__(index) -> (picture, label)"
        )
    if len(dataset) == 0:
        raise ConfigError(
            f"data.name={config.name} called with ({shown}) returns an empty data set"
        )
    return dataset


def _classes_given(dataset: Any) -> list[str] | None:
    classes = getattr(dataset, "classes", None)
    return None if classes is None else [str(name) for name in classes]


def _classes(dataset: Any, name: str) -> tuple[str, ...]:
    given = _classes_given(dataset)
    if given is not None:
        return tuple(given)
    num_classes = getattr(dataset, "num_classes", None)
    targets = getattr(dataset, "targets", None)
    if num_classes is None and targets is not None:
        num_classes = int(np.max(np.asarray(targets))) + 1
    if num_classes is None:
        raise ConfigError(
            f"data.name={name}: the number of classes is unknown: give the data set an attribute "
            "num_classes (or classes, a list of names)"
        )
    return tuple(str(label) for label in range(num_classes))


def _split(dataset: Any, config: DataConfig, *, num_classes: int) -> Pictures | WorkerPictures:
    pictures = _in_memory(dataset)
    if pictures is not None:
        return pictures
    if config.loader == "memory":
        raise ConfigError(
            f"data.loader=memory needs uint8 pictures in .data, labels in .targets and no "
            f"transform, which {config.name} lacks: use data.loader=workers"
        )
    return WorkerPictures(dataset, config, num_classes=num_classes)


def _in_memory(dataset: Any) -> Pictures | None:
    """Take .data and .targets, if they are what the data set's items are made of."""
    if any(
        getattr(dataset, name, None) is not None
        for name in ("transform", "transforms", "target_transform")
    ):
        return None
    data, targets = getattr(dataset, "data", None), getattr(dataset, "targets", None)
    if not isinstance(data, np.ndarray | Tensor) or targets is None:
        return None
    images, labels = np.asarray(data), np.asarray(targets)
    if images.ndim == 3:
        images = images[..., None]
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] > 4:
        return None
    if len(images) == len(labels) == len(dataset):
        for index in (0, len(dataset) - 1):
            if not _is_item(dataset[index], images[index], labels[index]):
                return None  # __getitem__ does something of its own
    return Pictures(images=images, labels=labels)


def _is_item(item: Any, image: np.ndarray, label: np.integer) -> bool:
    picture = item[0]
    return (
        isinstance(picture, Image.Image | np.ndarray | Tensor)
        and np.array_equal(np.asarray(picture).reshape(-1), image.reshape(-1))
        and bool(item[1] == label)
    )
