"""Tell what a user's own code raised: what was done, what was said, where, and the fix if known.

A mistake of the user's gets a few lines instead of a traceback; what a machine did (memory, disks,
devices) is no mistake, and stays what it is. Imports no torch.
"""

import contextlib
import errno
import sysconfig
import traceback
from collections.abc import Iterator
from pathlib import Path
from traceback import FrameSummary

from dist_train.config.schema import ConfigError

NEXT_LINE = "\n  "  # what a told error keeps of its lines: see arguments.print_error
MOST_LINES, MOST_LETTERS = 6, 500  # of a message

_PACKAGE = str(Path(__file__).parents[1])
_LIBRARIES = tuple({sysconfig.get_path("stdlib"), sysconfig.get_path("platstdlib")})
_INSTALLED = ("site-packages", "dist-packages")

# What a disk, a network file system or a full machine says: another try may find it well.
_OF_THE_MACHINE = (
    errno.EAGAIN,
    errno.EBUSY,
    errno.EDQUOT,
    errno.EIO,
    errno.EMFILE,
    errno.ENFILE,
    errno.ENODEV,
    errno.ENOMEM,
    errno.ENOSPC,
    errno.ENXIO,
    errno.EREMOTEIO,
    errno.EROFS,
    errno.ESTALE,
)
_DEVICE_ERRORS = ("OutOfMemoryError", "AcceleratorError", "DistError")  # torch's
_DEVICE_WORDS = (
    "CUDA error",
    "CUDA driver",
    "HIP error",
    "CUBLAS_STATUS",
    "CUDNN_STATUS",
    "cuDNN error",
    "CUSOLVER_STATUS",
    "Triton Error",
    "NCCL",
    "out of memory",
    "can't allocate memory",
    "gloo",
    "ProcessGroup",
    "Connection closed by peer",
    "Connection reset",
)
# By name, so that none of these packages is imported here.
_DOWNLOADS = {
    "builtins": ("ConnectionError", "TimeoutError"),
    "socket": ("gaierror",),
    "urllib.error": ("URLError", "HTTPError", "ContentTooShortError"),
    "requests.exceptions": ("ConnectionError", "HTTPError", "Timeout"),
    "huggingface_hub.errors": ("LocalEntryNotFoundError", "OfflineModeIsEnabled"),
}
_OWN_FACTORY = (
    "pretrained weights have a last layer for their own classes: give a factory of your own, like "
    "def net(num_classes): m = torchvision.models.resnet18(weights='DEFAULT'); "
    "m.fc = torch.nn.Linear(m.fc.in_features, num_classes); return m"
)


class UserCodeError(RuntimeError):
    """The user's own code raised in the middle of things; its text is told as it is."""

    exit_code = 1


@contextlib.contextmanager
def user_code(doing: str) -> Iterator[None]:
    """Run a user's code at the start: what it raises, SystemExit too, becomes a ConfigError.

    Args:
        doing: what it is, and that it fails: the beginning of what is told.
    """
    try:
        yield
    except UserCodeError as error:
        raise ConfigError(str(error)) from error
    except (Exception, SystemExit) as error:
        if isinstance(error, ConfigError) or is_of_machine(error):
            raise
        raise ConfigError(told(doing, error)) from error


def is_of_machine(error: BaseException) -> bool:
    """Say whether an error is of memory, a disk, a device or a peer: no mistake of the code."""
    if isinstance(error, MemoryError):
        return True
    if isinstance(error, OSError) and error.errno in _OF_THE_MACHINE:
        return not _is_download(error)
    if any(kind.__name__ in _DEVICE_ERRORS for kind in type(error).__mro__):
        return True
    return isinstance(error, RuntimeError) and any(word in str(error) for word in _DEVICE_WORDS)


def told(doing: str, error: BaseException) -> str:
    """Return a few lines: what was done, the error, the place, and the fix where one is known."""
    frame = own_frame(error) or innermost_frame(error)
    fix = known_fix(error)
    lines = [f"{doing}: {said(error)}", *([] if frame is None else [place(frame)])]
    return NEXT_LINE.join([*lines, *([] if fix is None else [f"fix: {fix}"])])


def said(error: BaseException) -> str:
    """Return an error's type and message, in one line of a bearable length."""
    lines = [" ".join(line.split()) for line in str(error).strip().splitlines()]
    text = " ".join([line for line in lines if line][:MOST_LINES])[:MOST_LETTERS]
    return f"{type(error).__name__}: {text or 'no message'}"


def place(frame: FrameSummary) -> str:
    """Return where a frame is, and what its line says."""
    line = f": {frame.line.strip()}" if frame.line else ""
    return f"at {frame.filename}:{frame.lineno} in {frame.name}{line}"


def own_frame(error: BaseException) -> FrameSummary | None:
    """Return the innermost frame of the user's own: of no installed package and no library.

    What lies outside the first frame of this package is who called it: a script, for example.
    """
    frames = traceback.extract_tb(error.__traceback__)
    ours = [number for number, frame in enumerate(frames) if _is_inside(frame, _PACKAGE)]
    inner = frames[ours[0] :] if ours else frames
    return next((frame for frame in reversed(inner) if _is_own(frame)), None)


def innermost_frame(error: BaseException) -> FrameSummary | None:
    """Return where an error was raised, if that is not in this package."""
    frames = traceback.extract_tb(error.__traceback__)
    found = next((f for f in reversed(frames) if not f.filename.startswith("<frozen")), None)
    return None if found is None or _is_inside(found, _PACKAGE) else found


def known_fix(error: BaseException) -> str | None:
    """Return what helps against an error that many meet, or None."""
    download = _fix_of_download(error)
    if download is not None:
        return download
    text = str(error)
    if "'num_classes' expected value" in text or "size mismatch for" in text:
        return _OWN_FACTORY
    if isinstance(error, SystemExit):
        return "it ends the process: let it raise an error instead, and parse no arguments"
    if isinstance(error, ModuleNotFoundError) and error.name:
        return f"pip install {error.name.partition('.')[0]}, or run where it can be imported"
    if isinstance(error, FileNotFoundError) and not str(error.filename or "/").startswith("/"):
        return f"relative paths begin in the folder of the command, {Path.cwd()}: give a full one"
    return None


def _fix_of_download(error: BaseException) -> str | None:
    damaged = "invalid hash value" in str(error)
    if not damaged and not _is_download(error):
        return None
    for frame, _ in traceback.walk_tb(error.__traceback__):
        names = frame.f_locals
        if frame.f_code.co_name == "load_state_dict_from_url" and "cached_file" in names:
            why = "what came is damaged" if damaged else "it cannot be downloaded here"
            return (
                f"{why}: get {names.get('url')} where there is network and put it at "
                f"{names['cached_file']} (the variable TORCH_HOME names another place)"
            )
    return (
        "it cannot be downloaded here: run it once where there is network, or put the files there "
        "by hand (data in data.root, weights in TORCH_HOME or HF_HOME)"
    )


def _is_download(error: BaseException) -> bool:
    kinds = type(error).__mro__
    return any(kind.__name__ in _DOWNLOADS.get(kind.__module__, ()) for kind in kinds)


def _is_own(frame: FrameSummary) -> bool:
    name = frame.filename
    if name.startswith("<") or any(f"/{folder}/" in name for folder in _INSTALLED):
        return False
    return not any(_is_inside(frame, folder) for folder in (_PACKAGE, *_LIBRARIES))


def _is_inside(frame: FrameSummary, folder: str) -> bool:
    return frame.filename.startswith(f"{folder}/")
