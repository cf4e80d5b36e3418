"""List ROOT/{train,test}/<class>/*, refusing what does not fit. Imports no torch."""

import os
from dataclasses import dataclass
from pathlib import Path

from dist_train.config.schema import ConfigError
from dist_train.data.layouts import (
    EXTENSIONS,
    TEST,
    TRAIN,
    UNSPLIT,
    folders_in,
    has_classes,
    what_else,
)

LEFT_BEHIND = ("thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r", "__macosx", "@eadir")


@dataclass(frozen=True, slots=True)
class PictureFile:
    """One file, and what tells that it has changed."""

    path: str  # relative to the root
    label: int
    num_bytes: int
    mtime_ns: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Folder:
    """All files in a fixed order: by class, then by name."""

    root: Path
    classes: tuple[str, ...]
    train: list[PictureFile]
    test: list[PictureFile]
    remarks: tuple[str, ...] = ()  # on what was taken for what


def scan_folder(root: str) -> Folder:
    """List the pictures under `root` without opening them.

    Raises:
        ConfigError: a folder is missing or empty, or a file is empty or no picture by its name.
    """
    base = Path(root).expanduser().resolve()
    if not base.is_dir():
        raise ConfigError(
            f"data.root={root} is not a folder: give the one that holds train/ and test/"
        )
    try:
        splits = _split_folders(base)
        classes, test_classes = (_class_folders(base, name) for name in splits)
        unknown = [name for name in test_classes if name not in classes]
        if unknown:
            raise ConfigError(
                f"{base / splits[1] / unknown[0]} is a class that {base / splits[0]} lacks: "
                f"add training pictures of {unknown[0]!r}, or remove the folder"
            )
        label_of = {name: label for label, name in enumerate(classes)}
        train, test = (
            [
                file
                for name in names
                for file in _class_files(base, f"{split}/{name}", label=label_of[name])
            ]
            for split, names in zip(splits, (classes, test_classes), strict=True)
        )
    except OSError as error:
        raise ConfigError(
            f"cannot read {error.filename} ({error.strerror}): check its permissions, or that "
            "a link there leads somewhere"
        ) from error
    remarks = _remarks(base, splits)
    return Folder(root=base, classes=tuple(classes), train=train, test=test, remarks=remarks)


def _split_folders(base: Path) -> tuple[str, str]:
    """Return the folders for training and for the test: the one that is named so, or can be it."""
    there, found = folders_in(base), []
    for split, names in (("train", TRAIN), ("test", TEST)):
        fit = [name for name in there if name.lower() in names]
        exact = [name for name in fit if name.lower() == split]
        fit = exact or fit
        if len(fit) > 1:
            raise ConfigError(
                f"{base} has no {split}/, and both {fit[0]}/ and {fit[1]}/ could be it: rename "
                f"one of them to {split}"
            )
        found.append(fit[0] if fit else None)
    train, test = found
    if train is not None and test is not None:
        return train, test
    missing = base / ("train" if train is None else "test")
    rule = "data.root must hold train/<class>/ and test/<class>/"
    hint = what_else(base)
    if hint is None and train is None and test is None and has_classes(base):
        hint = UNSPLIT
    if hint is not None:
        raise ConfigError(f"{missing} is missing ({rule}), but {hint}")
    raise ConfigError(
        f"{missing} is missing: {rule}"
        + (", or val/<class>/: move a part of the images there" if train is not None else "")
    )


def _remarks(base: Path, splits: tuple[str, str]) -> tuple[str, ...]:
    train, test = splits
    remarks = [
        f"{base / name} is taken for {split}/"
        for name, split in ((train, "train"), (test, "test"))
        if name.lower() != split
    ]
    for split in splits:
        hidden = [name for name in os.listdir(base / split) if name.startswith(".")]
        folders = sorted(name for name in hidden if (base / split / name).is_dir())
        if folders:
            remarks.append(f"{base / split}: hidden folders are no classes: {', '.join(folders)}")
    unused = [name for name in folders_in(base) if name.lower() in TEST and name != test]
    remarks += [
        f"{base / name} is not used: the test is {test}/, and what is validated on is split off "
        f"{train}/ (data.val_fraction)"
        for name in unused
    ]
    return tuple(remarks)


def is_passed_over(name: str) -> bool:
    """Say whether a file or folder is hidden, or one that file managers and archives leave."""
    return name.startswith(".") or name.lower() in LEFT_BEHIND


def _class_folders(base: Path, split: str) -> list[str]:
    with os.scandir(base / split) as entries:
        names = sorted(e.name for e in entries if e.is_dir() and not is_passed_over(e.name))
    if not names:
        raise ConfigError(
            f"{base / split} has no class folders: put the pictures of each class into "
            f"{split}/<class>/ of their own"
        )
    return names


def _class_files(base: Path, folder: str, *, label: int) -> list[PictureFile]:
    """The pictures of one class, by name; files that no picture is are told, unless hidden."""
    files = []
    with os.scandir(base / folder) as entries:
        for entry in entries:
            if is_passed_over(entry.name):
                continue
            if entry.is_dir():
                raise ConfigError(
                    f"{entry.path} is a folder inside the class folder {folder}: a class is one "
                    "folder with nothing but its pictures: move them up into it, or the inner "
                    "folder beside it as a class of its own"
                )
            if not entry.name.lower().endswith(EXTENSIONS):
                raise ConfigError(
                    f"{entry.path} is no picture ({' '.join(EXTENSIONS)}): "
                    "remove it from the class folder"
                )
            stat = entry.stat()
            if stat.st_size == 0:
                raise ConfigError(f"{entry.path} is empty (0 bytes): copy it again or remove it")
            path = f"{folder}/{entry.name}"
            files.append(PictureFile(path, label, stat.st_size, stat.st_mtime_ns))
    if not files:
        raise ConfigError(
            f"{base / folder} is an empty class folder: add pictures or remove the folder"
        )
    return sorted(files, key=lambda file: file.path)
