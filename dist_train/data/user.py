"""A data set of the user's own, by import path, under torchvision's contract."""

import dataclasses
import inspect
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from dist_train.config.importing import import_callable
from dist_train.config.schema import ConfigError, DataConfig
from dist_train.config.user_code import user_code
from dist_train.data.pictures import Pictures
from dist_train.data.splits import Source
from dist_train.data.torchvision_sets import FOLDERS, NUM_CLASSES, SPLITS, own_name
from dist_train.data.user_checks import check_kept_labels, check_map_style, num_classes_of
from dist_train.data.user_item import form, whole_number
from dist_train.data.whole_arrays import whole_arrays
from dist_train.data.worker_dataset import WorkerPictures


def load_user_source(config: DataConfig) -> Source:
    """Call `data.name` as callable(root=, download=, train=, **data.args) for each split.

    `root` and `download` are passed only if the callable names them; one that names `split` and no
    `train`, as some of torchvision's, gets the splits' names. Pictures are taken into memory as
    whole_arrays says; anything else goes through workers, both splits alike.

    Raises:
        ConfigError: it does not import, cannot be called so, fails, or returns no data set.
    """
    config = _from_here(config)
    factory = import_callable(config.name, "data.name")
    splits, remarks = _splits(factory, config)
    train, test = (_call(factory, config, split) for split in splits)
    classes = _classes(train, config.name)
    if list(_classes_given(test) or classes) != list(classes):
        raise ConfigError(
            f"data.name={config.name}: .classes differ between train=True and train=False: "
            "give both the same list"
        )
    pictures, told = _pictures(train, test, config, num_classes=len(classes))
    return Source(
        name=config.name,
        classes=classes,
        remarks=(*remarks, f"{config.name}: {told}"),
        train=pictures["train"],
        test=pictures["test"],
    )


def _from_here(config: DataConfig) -> DataConfig:
    """Name a root that exists by its whole path: the user's module may change the folder."""
    if config.root is None or not Path(config.root).exists():
        return config
    return dataclasses.replace(config, root=str(Path(config.root).absolute()))


def _splits(
    factory: Callable[..., Any], config: DataConfig
) -> tuple[tuple[dict[str, Any], dict[str, Any]], tuple[str, ...]]:
    """Return what chooses each split in a call, and what to say of it."""
    parameters = inspect.signature(factory).parameters
    own = own_name(factory)
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    if "train" in parameters or "split" not in parameters or (takes_any and own not in SPLITS):
        return ({"train": True}, {"train": False}), ()
    if "split" in config.args:
        raise ConfigError(
            f"data.args.split={config.args['split']} would be the split of training and test: "
            "remove it, both are chosen here"
        )
    train, test = SPLITS.get(own or "", ("train", "test"))
    remark = f"{config.name}: split={train} is trained on, split={test} is the test"
    return ({"split": train}, {"split": test}), (remark,)


def _call(factory: Callable[..., Any], config: DataConfig, split: dict[str, Any]) -> Any:
    """Make one split, passing what the signature asks for."""
    arguments: dict[str, Any] = {**split, **config.args}
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
        cure = "change data.args, or name a function of your own that takes train=True or False"
        if own_name(factory) in FOLDERS:
            cure = "data.name=image_folder reads folders of class folders"
        raise ConfigError(
            f"data.name={config.name} cannot be called with ({shown}): {error}: {cure}"
        ) from error
    call = f"data.name={config.name} called with ({shown})"
    with user_code(f"{call} fails"):
        dataset = factory(**arguments)
    check_map_style(dataset, call)
    return dataset


def _classes_given(dataset: Any) -> list[str] | None:
    classes = getattr(dataset, "classes", None)
    if classes is not None and not isinstance(classes, Iterable):
        raise ConfigError(
            f".classes of the data set is {form(classes)}: give a list of names, or num_classes"
        )
    return None if classes is None else [str(name) for name in classes]


def _classes(dataset: Any, name: str) -> tuple[str, ...]:
    given = _classes_given(dataset)
    if given is not None:
        return tuple(given)
    known = NUM_CLASSES.get(own_name(type(dataset)) or "")
    num_classes = getattr(dataset, "num_classes", known)
    if num_classes is None:
        num_classes = num_classes_of(dataset, name)
    elif whole_number(num_classes) is None:
        raise ConfigError(
            f"data.name={name}: .num_classes is {form(num_classes)}: give a whole number"
        )
    if num_classes is None:
        raise ConfigError(
            f"data.name={name}: the number of classes is unknown: give the data set an attribute "
            "num_classes (or classes, a list of names)"
        )
    return tuple(str(label) for label in range(num_classes))


def _pictures(
    train: Any, test: Any, config: DataConfig, *, num_classes: int
) -> tuple[dict[str, Pictures | WorkerPictures], str]:
    """Return both splits, in memory or through workers, and a sentence that says which and why."""
    whole = {"train": whole_arrays(train), "test": whole_arrays(test)}
    for split, found in whole.items():
        if isinstance(found, Pictures):
            continue
        reason = f"the {split} split {found}"
        if config.loader == "memory":
            raise ConfigError(
                f"data.loader=memory cannot take {config.name}, because {reason}: use "
                "data.loader=workers"
            )
        pair = {
            name: WorkerPictures(split, config, num_classes=num_classes)
            for name, split in (("train", train), ("test", test))
        }
        check_kept_labels(train, pair["train"], num_classes=num_classes)
        check_kept_labels(test, pair["test"], num_classes=num_classes)
        return {**pair}, (f"images go through workers, because {reason}")
    arrays = {name: found for name, found in whole.items() if isinstance(found, Pictures)}
    return {
        **arrays
    }, "images in memory, taken whole from .data and .targets: item i is their row i"
