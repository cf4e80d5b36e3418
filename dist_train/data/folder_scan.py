"""List ROOT/{train,test}/<class>/*, refusing what does not fit. Imports no torch."""

import os
from dataclasses import dataclass
from pathlib import Path

from dist_train.config.schema import ConfigError

EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".tif", ".tiff")


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


def scan_folder(root: str | None) -> Folder:
    """List the pictures under `root` without opening them.

    Raises:
        ConfigError: a folder is missing or empty, or a file is empty or no picture by its name.
    """
    if root is None:
        raise ConfigError(
            "data.name=image_folder needs data.root: give the folder that holds train/ and test/"
        )
    base = Path(root).expanduser().resolve()
    if not base.is_dir():
        raise ConfigError(
            f"data.root={root} is not a folder: give the one that holds train/ and test/"
        )
    try:
        classes = _class_folders(base, "train")
        test_classes = _class_folders(base, "test")
        unknown = [name for name in test_classes if name not in classes]
        if unknown:
            raise ConfigError(
                f"{base / 'test' / unknown[0]} is a class that {base / 'train'} lacks: "
                f"add training pictures of {unknown[0]!r}, or remove the folder"
            )
        label_of = {name: label for label, name in enumerate(classes)}
        splits = {
            split: [
                file
                for name in names
                for file in _class_files(base, f"{split}/{name}", label=label_of[name])
            ]
            for split, names in (("train", classes), ("test", test_classes))
        }
    except OSError as error:
        raise ConfigError(
            f"cannot read {error.filename} ({error.strerror}): check its permissions, or that "
            "a link there leads somewhere"
        ) from error
    return Folder(root=base, classes=tuple(classes), train=splits["train"], test=splits["test"])


def _class_folders(base: Path, split: str) -> list[str]:
    folder = base / split
    if not folder.is_dir():
        raise ConfigError(
            f"{folder} is missing: data.root must hold train/<class>/ and test/<class>/"
        )
    with os.scandir(folder) as entries:
        names = sorted(e.name for e in entries if e.is_dir() and not e.name.startswith("."))
    if not names:
        raise ConfigError(
            f"{folder} has no class folders: put the pictures of each class into "
            f"{split}/<class>/ of their own"
        )
    return names


def _class_files(base: Path, folder: str, *, label: int) -> list[PictureFile]:
    """The pictures of one class, by name; hidden files are passed over."""
    files = []
    with os.scandir(base / folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if not entry.name.lower().endswith(EXTENSIONS) or entry.is_dir():
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
