"""Builds the emulated CUDA runtime, once for each state of its sources."""

import functools
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
SOURCES = Path(__file__).parent / "runtime"
RUNTIME, DRIVER = "libemulated_gpu.so", "libcuda.so.1"
FLAGS = ("-shared", "-fPIC", "-O1")


def why_not() -> str | None:
    """Return why there is no emulated GPU here; None: there is."""
    if not sys.platform.startswith("linux"):
        return "it is a library for Linux's LD_PRELOAD"
    if shutil.which("gcc") is None:
        return "there is no gcc"
    if headers() is None:
        return "there are no CUDA headers, which the CUDA build of torch brings"
    return None


@functools.cache
def headers() -> Path | None:
    """Return the folder of the CUDA runtime's headers among the installed packages."""
    nvidia = importlib.util.find_spec("nvidia")
    places = (nvidia and nvidia.submodule_search_locations) or []
    found = [f for place in places for f in Path(place).glob("*/include/cuda_runtime_api.h")]
    return max(found).parent if found else None


@functools.cache
def built() -> Path:
    """Return the folder of the two libraries; builds them unless that was done before."""
    include = headers()
    assert include is not None, why_not()
    files = [path for path in sorted(SOURCES.rglob("*")) if path.is_file()]
    digest = hashlib.sha256(repr((FLAGS, str(include))).encode())
    for path in files:
        digest.update(path.read_bytes())
    folder = _cache() / digest.hexdigest()[:16]
    if folder.is_dir():
        return folder
    making = Path(tempfile.mkdtemp(dir=folder.parent))
    parts = [str(path) for path in files if path.suffix == ".c" and path.name != "driver.c"]
    includes = (f"-I{SOURCES / 'include'}", f"-isystem{include}")
    _gcc(*includes, *parts, "-o", str(making / RUNTIME), "-lpthread")
    _gcc(f"-Wl,-soname,{DRIVER}", str(SOURCES / "driver.c"), "-o", str(making / DRIVER))
    try:
        making.rename(folder)
    except OSError:  # another process was faster
        shutil.rmtree(making)
    return folder


def variables(num_gpus: int) -> dict[str, str]:
    """Return the environment of a process, and of those that it starts, with emulated GPUs."""
    folder = built()
    keep = {k: v for k, v in os.environ.items() if k != "CUDA_VISIBLE_DEVICES"}
    return keep | {
        "LD_PRELOAD": str(folder / RUNTIME),
        "LD_LIBRARY_PATH": str(folder),
        "EMULATED_GPUS": str(num_gpus),
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
    }


def _gcc(*arguments: str) -> None:
    done = subprocess.run(["gcc", *FLAGS, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, f"the emulated GPU cannot be built:\n{done.stderr}"


def _cache() -> Path:
    """Return a folder of this user alone: what lies in it is loaded into processes."""
    folder = Path(tempfile.gettempdir()) / f"dist_train_emulated_gpu_{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    found = folder.stat()
    assert (found.st_uid, found.st_mode & 0o077) == (os.getuid(), 0), f"{folder} is not only ours"
    return folder
