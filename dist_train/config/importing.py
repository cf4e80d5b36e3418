"""Find what `package.module:callable` means, or say in one line why it cannot be found."""

import difflib
import importlib
import pkgutil
import sys
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

from dist_train.config.schema import ConfigError


def import_callable(path: str, key: str) -> Callable[..., Any]:
    """Import `package.module:callable`; the current folder is importable, as for `python -m`.

    Args:
        path: what the user gave.
        key: the setting that it was given for.

    Raises:
        ConfigError: it is not of that form, there is no such module, importing it fails, or it
            has no such callable.
    """
    module_name, colon, name = path.partition(":")
    if (
        not colon
        or not name.isidentifier()
        or not all(part.isidentifier() for part in module_name.split("."))
    ):
        raise ConfigError(f"{key}={path} must have the form package.module:callable")
    if not {"", str(Path.cwd())} & set(sys.path):
        # In safe mode (a job with a copy of the code) what PYTHONPATH names comes first.
        sys.path.insert(len(sys.path) if sys.flags.safe_path else 0, str(Path.cwd()))
    module = _import_module(module_name, f"{key}={path}")
    found = getattr(module, name, None)
    if callable(found):
        return found
    if found is not None:
        raise ConfigError(f"{key}={path} is a {type(found).__name__}: name a function or a class")
    public = [n for n in dir(module) if not n.startswith("_") and callable(getattr(module, n))]
    raise ConfigError(
        f"{key}={path}: {module.__file__ or module_name} has no {name!r}{nearest(name, public)}"
    )


def nearest(name: str, known: Iterable[str]) -> str:
    """Return `; did you mean 'x'?`, or nothing if no name is near."""
    found = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {found[0]!r}?" if found else ""


def raised_where(error: Exception) -> str:
    """Return the error and the innermost place it comes from, in one line."""
    if isinstance(error, SyntaxError):  # the innermost frame is the importer's
        return f"SyntaxError: {error.msg} ({error.filename}:{error.lineno})"
    frames = traceback.extract_tb(error.__traceback__)
    places = [f"{f.filename}:{f.lineno}" for f in frames if not f.filename.startswith("<frozen")]
    lines = str(error).strip().splitlines() or ["no message"]
    return f"{type(error).__name__}: {lines[0]} ({places[-1]})"


def _import_module(module_name: str, given: str) -> ModuleType:
    try:
        return importlib.import_module(module_name)
    except Exception as error:  # the user's module may raise anything while it is imported
        missing = error.name or "" if isinstance(error, ModuleNotFoundError) else ""
        if not missing or not f"{module_name}.".startswith(f"{missing}."):
            raise ConfigError(
                f"{given}: importing {module_name} fails: {raised_where(error)}"
            ) from error
        parent, _, last = missing.rpartition(".")
        folders = getattr(sys.modules.get(parent), "__path__", None) if parent else None
        known = [module.name for module in pkgutil.iter_modules(folders)]
        raise ConfigError(
            f"{given}: there is no module {missing!r} in {parent or Path.cwd()} "
            f"or on PYTHONPATH{nearest(last, known)}"
        ) from error
