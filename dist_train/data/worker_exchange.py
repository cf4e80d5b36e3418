"""What goes to worker processes and what comes back: pickles, and errors in words, not traces.

torch tells an error of a worker as the text of its traceback; here it is told as in the rank.
"""

import ast
import contextlib
import pickle
import sys
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset
from torch.utils.data import default_collate as stacked

from dist_train.config.schema import ConfigError
from dist_train.config.user_code import UserCodeError, told
from dist_train.data.worker_dataset import WorkerPictures
from dist_train.pinned import pinned

NO_WORKERS = "set data.num_workers=0"


@dataclass(frozen=True, kw_only=True, slots=True)
class Trouble:
    """An error of a worker, as text: sent instead of an item."""

    kind: Literal["mistake", "user", "memory", "file", "other"]
    text: str
    trace: str
    number: int | None = None  # errno

    def error(self) -> Exception:
        """Return the error as the rank would have met it; the worker's traceback is a note."""
        kinds = {"mistake": ConfigError, "user": UserCodeError, "memory": MemoryError}
        error: Exception = kinds.get(self.kind, RuntimeError)(self.text)
        if self.kind == "file":
            error = OSError(self.number, self.text)
        error.add_note(f"In a worker process:\n{self.trace}")
        return error


class InWorker(Dataset[Any]):
    """The pictures as a worker opens them: what goes wrong is returned, never raised."""

    def __init__(self, pictures: WorkerPictures) -> None:
        self._pictures = pictures

    def __len__(self) -> int:
        return len(self._pictures)

    def __getitem__(self, key: tuple[int, int | None]) -> tuple[Tensor, int] | Trouble:
        try:
            return self._pictures[key]
        except Exception as error:
            return _trouble(error, key[0])


class Loaded(NamedTuple):
    """A batch of items."""

    images: Tensor
    labels: Tensor

    def pin_memory(self) -> "Loaded":
        """Do what the DataLoader asks for; where no more can be pinned, nothing."""
        return Loaded(pinned(self.images), pinned(self.labels))


def collate(items: list[Any]) -> Loaded | Trouble:
    """Stack items as torch does; the first trouble among them counts for all."""
    trouble = next((item for item in items if isinstance(item, Trouble)), None)
    return trouble or Loaded(*stacked(items))


def received(batches: Iterator[Any]) -> Iterator[Loaded]:
    """Yield what workers send; raise what went wrong in one."""
    for batch in batches:
        if isinstance(batch, Trouble):
            raise batch.error()
        yield batch


@dataclass(frozen=True, kw_only=True, slots=True)
class Parcel:
    """What sending a data set to a worker takes."""

    num_bytes: int  # that each worker gets of its own: all but tensors, which are shared
    needs_script: bool  # the user's own, which a worker would import


def check_sendable(pictures: WorkerPictures, name: str) -> Parcel:
    """Check that a data set can be sent to a worker. Arrays and tensors are not copied for it.

    Raises:
        ConfigError: it cannot be pickled, or a worker would train when it imports the script.
    """
    sink = _Sink()
    try:
        _Pickler(sink, protocol=5, buffer_callback=sink.pass_by).dump(pictures)
    except Exception as error:
        part = _unpicklable_part(pictures.items)
        inside = "" if part is None else f" (its attribute {part})"
        raise ConfigError(
            f"{name} cannot be sent to the worker processes of data.num_workers{inside}: "
            f"{type(error).__name__}: {error}: {NO_WORKERS}, or define functions and classes at "
            "the top of a module (no lambda) and open files in __getitem__, left out by "
            "__getstate__"
        ) from error
    if sink.needs_script:
        _check_guarded()
    return Parcel(num_bytes=sink.num_bytes, needs_script=sink.needs_script)


@contextlib.contextmanager
def script_hidden(*, hide: bool) -> Iterator[None]:
    """Let processes that start meanwhile not run the user's script again, as they else would."""
    if not hide:
        yield
        return
    main = sys.modules["__main__"]
    kept = {key: vars(main)[key] for key in ("__file__", "__spec__") if key in vars(main)}
    for key in kept:
        setattr(main, key, None)  # what multiprocessing reads to find the script
    try:
        yield
    finally:
        for key, value in kept.items():
            setattr(main, key, value)


class _Sink:
    """Takes a pickle's bytes and keeps none."""

    def __init__(self) -> None:
        self.needs_script = False
        self.num_bytes = 0

    def pass_by(self, buffer: pickle.PickleBuffer) -> None:
        """Count an array's memory, which nobody has to look through."""
        self.num_bytes += buffer.raw().nbytes

    def write(self, data: Any) -> int:
        self.num_bytes += len(data)
        if len(data) < 1 << 20:  # larger ones are somebody's bytes, no names
            self.needs_script = self.needs_script or b"__main__" in bytes(data)
        return len(data)


class _Pickler(pickle.Pickler):
    def reducer_override(self, obj: Any) -> Any:
        return (bool, ()) if isinstance(obj, Tensor | torch.UntypedStorage) else NotImplemented


def _unpicklable_part(items: object) -> str | None:
    for name, value in getattr(items, "__dict__", {}).items():
        try:
            _Pickler(_Sink(), protocol=5, buffer_callback=lambda _: None).dump(value)
        except Exception:  # whatever its own reducers raise
            return f"{name}, a {type(value).__name__}"
    return None


def _check_guarded() -> None:
    """Raise ConfigError if the script's call of train() would be made again by its workers."""
    for frame, line in traceback.walk_stack(None):
        if frame.f_globals.get("__name__") != "__main__" or frame.f_code.co_name != "<module>":
            continue
        path = Path(frame.f_code.co_filename)
        if not path.is_file() or _is_guarded(path.read_text(errors="replace"), line):
            return
        raise ConfigError(
            f"{path}:{line}: worker processes import this script, as its own data set is defined "
            'in it, and would train, too: put this line under if __name__ == "__main__":, or move '
            f"the data set to a module of its own, or {NO_WORKERS}"
        )


def _is_guarded(source: str, line: int) -> bool:
    for part in ast.parse(source).body:
        if isinstance(part, ast.If) and part.lineno <= line <= (part.end_lineno or line):
            return any(isinstance(n, ast.Name) and n.id == "__name__" for n in ast.walk(part.test))
    return False


def _trouble(error: Exception, index: int) -> Trouble:
    trace = "".join(traceback.format_exception(error))
    if isinstance(error, ConfigError):
        return Trouble(kind="mistake", text=str(error), trace=trace)
    if isinstance(error, UserCodeError):
        return Trouble(kind="user", text=str(error), trace=trace)
    what = f"item {index} of the data set"
    if isinstance(error, MemoryError):
        return Trouble(kind="memory", text=f"{what}: {error}", trace=trace)
    if isinstance(error, OSError):
        text = f"{what}: {error.strerror or error}"
        return Trouble(kind="file", text=text, trace=trace, number=error.errno)
    return Trouble(kind="other", text=told(what, error), trace=trace)
