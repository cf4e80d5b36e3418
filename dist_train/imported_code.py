"""Which code a run is trained with: digests of the user's own modules, and one of this toolkit."""

import hashlib
import importlib.util
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dist_train import __version__
from dist_train.config.schema import Config

TOOLKIT = Path(__file__).parent
DIGITS = 16  # of a digest: a change is to be noticed, nobody attacks


def imported_code(config: Config) -> dict[str, Any]:
    """Return digests of the code in use, as plain values.

    Call it once the data are open and the model is built: what they import is there then. Code
    of an installed package is left out, its version stands for it.

    Returns:
        `toolkit`: of all files of dist_train; `files`: {path below its import root: digest} of
        every module that was imported from where `model.factory` or `data.name` come from.
    """
    return {"toolkit": _toolkit(), "files": _files(_roots(config))}


def code_on_disk(config: Config, before: dict[str, Any]) -> dict[str, Any]:
    """Return the same without importing anything: of the files that `before` names."""
    roots = _roots(config)
    files: dict[str, str] = {}
    for name in before.get("files", {}):
        found = next((root / name for root in roots if (root / name).is_file()), None)
        if found is not None:
            files[name] = _digest(found)
    return {"toolkit": _toolkit(), "files": files}


def changes_of_code(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Return what has changed, each in a few words; nothing, if nothing is known of before."""
    if not before:
        return []
    old, new = before.get("files", {}), now["files"]
    told = [f"{name} has changed" for name in new if old.get(name, new[name]) != new[name]]
    told += [f"{name} is new" for name in new if name not in old]
    told += [f"{name} is gone" for name in old if name not in new]
    if before.get("toolkit") != now["toolkit"]:
        told.append("dist_train itself has changed")
    return told


def _toolkit() -> str:
    if _is_installed(TOOLKIT):
        return __version__
    whole = hashlib.sha256()
    for path in sorted(TOOLKIT.rglob("*.py")):
        whole.update(f"{path.relative_to(TOOLKIT)} {_digest(path)}\n".encode())
    return whole.hexdigest()[:DIGITS]


def _files(roots: list[Path]) -> dict[str, str]:
    found: dict[str, str] = {}
    for path in _imported_files():
        root = next((root for root in roots if path.is_relative_to(root)), None)
        if root is None or _is_installed(path) or path.is_relative_to(TOOLKIT):
            continue
        if path.is_file():
            name = str(path.relative_to(root)).encode(errors="backslashreplace").decode()
            found[name] = _digest(path)
    return dict(sorted(found.items()))


def _imported_files() -> Iterator[Path]:
    for module in list(sys.modules.values()):
        name = getattr(module, "__file__", None)
        if isinstance(name, str):
            yield Path(name).resolve()


def _roots(config: Config) -> list[Path]:
    """Return the folders from which the user's modules are imported; without importing them."""
    roots: list[Path] = []
    for path in (config.model.factory, config.data.name):
        if ":" not in path:
            continue
        package = path.partition(":")[0].partition(".")[0]
        try:
            spec = importlib.util.find_spec(package)
        except (ImportError, ValueError):  # a module that a program made has no spec
            continue
        if spec is None:  # the current folder is made importable with the first import
            roots.append(Path.cwd())
            continue
        places = [Path(place) for place in spec.submodule_search_locations or ()]
        if not places and spec.origin is not None:
            places = [Path(spec.origin)]
        roots += [r for r in (place.resolve().parent for place in places) if r not in roots]
    return roots


def _is_installed(path: Path) -> bool:
    """Say whether a file belongs to Python or to an installed package."""
    if {"site-packages", "dist-packages"} & set(path.parts):
        return True
    return path.is_relative_to(Path(sysconfig.get_path("stdlib")).resolve())


def _digest(path: Path) -> str:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()[:DIGITS]
    except OSError:
        return "unreadable"
