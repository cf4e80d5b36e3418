"""Find what `package.module:callable` means, or say in one line why it cannot be found."""

import contextlib
import difflib
import importlib
import pkgutil
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from dist_train.config.schema import ConfigError

PACKAGES = {  # that are called otherwise than their modules
    "PIL": "pillow",
    "cv2": "opencv-python",
    "skimage": "scikit-image",
    "sklearn": "scikit-learn",
    "yaml": "pyyaml",
    "pytorch_lightning": "lightning",
}


def import_callable(path: str, key: str) -> Callable[..., Any]:
    """Import `package.module:callable`; the current folder is importable, as for `python -m`.

    Args:
        path: what the user gave.
        key: the setting that it was given for.

    Raises:
        ConfigError: it is not of that form, there is no such module, importing it fails, or it
            has no such callable.
    """
    check_import_path(path, key)
    module_name, _, name = path.partition(":")
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


def check_import_path(path: str, key: str) -> None:
    """Raise ConfigError if the value of setting `key` has not the form package.module:callable."""
    module_name, colon, name = path.partition(":")
    if (
        not colon
        or module_name.endswith(".py")  # a file
        or not name.isidentifier()
        or not all(part.isidentifier() for part in module_name.split("."))
    ):
        meant = as_import_path(path)
        hint = f": did you mean {key}={meant}?" if meant else ""
        raise ConfigError(f"{key}={path} must have the form package.module:callable{hint}")


def as_import_path(typed: str) -> str | None:
    """Return the import path that a dotted name, or one with a file's path, means; None: none."""
    path, colon, name = typed.removeprefix("./").partition(":")
    path = path.removesuffix(".py").replace("/", ".") if "/" in path or colon else path
    if not colon:
        path, _, name = path.rpartition(".")
    words = [*path.split("."), name]
    return f"{path}:{name}" if all(word.isidentifier() for word in words) else None


def nearest(name: str, known: Iterable[str]) -> str:
    """Return `; did you mean 'x'?`, or nothing if no name is near; capitals do not matter."""
    spelt = {word.lower(): word for word in known}
    found = difflib.get_close_matches(name.lower(), list(spelt), n=1)
    return f"; did you mean {spelt[found[0]]!r}?" if found else ""


def raised_where(error: BaseException) -> str:
    """Return the error and the innermost place it comes from, in one line."""
    if isinstance(error, SyntaxError):  # the innermost frame is the importer's
        return f"SyntaxError: {error.msg} ({error.filename}:{error.lineno})"
    frames = traceback.extract_tb(error.__traceback__)
    places = [f"{f.filename}:{f.lineno}" for f in frames if not f.filename.startswith("<frozen")]
    lines = str(error).strip().splitlines() or ["no message"]
    return f"{type(error).__name__}: {lines[0]} ({places[-1]})"


def _import_module(module_name: str, given: str) -> ModuleType:
    try:
        with _as_if_alone(module_name):
            return importlib.import_module(module_name)
    except (Exception, SystemExit) as error:  # the user's module may raise anything
        missing = error.name or "" if isinstance(error, ModuleNotFoundError) else ""
        if not missing or not f"{module_name}.".startswith(f"{missing}."):
            cure = _package_of(missing) if missing else ""
            if isinstance(error, SystemExit):
                cure = "; put what is to run as a program under `if __name__ == '__main__':`"
            raise ConfigError(
                f"{given}: importing {module_name} fails: {raised_where(error)}{cure}"
            ) from error
        parent, _, last = missing.rpartition(".")
        folders = getattr(sys.modules.get(parent), "__path__", None) if parent else None
        known = [module.name for module in pkgutil.iter_modules(folders)]
        cure = nearest(last, known)
        if not cure and not parent:
            cure = f"{_package_of(missing)}; or give the command in the folder of {missing}.py"
        raise ConfigError(
            f"{given}: there is no module {missing!r} in {parent or Path.cwd()} "
            f"or on PYTHONPATH{cure}"
        ) from error


def _package_of(module: str) -> str:
    """Return how to install what a module is missing from, if it is a package."""
    first = module.partition(".")[0]
    return f"; if it is a package, pip install {PACKAGES.get(first, first)}"


@contextlib.contextmanager
def _as_if_alone(module_name: str) -> Iterator[None]:
    """Hide this process's arguments from a module that parses its own while it is imported."""
    words = sys.argv
    sys.argv = [module_name]
    try:
        yield
    finally:
        sys.argv = words
