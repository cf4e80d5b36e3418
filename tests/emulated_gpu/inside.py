"""Runs tests in a process of their own that has emulated GPUs."""

import subprocess
import sys
import tempfile

from tests.emulated_gpu.build import ROOT, variables

PLUGINS = (
    "-p",
    "tests.emulated_gpu.plugin",
    "-p",
    "no:cacheprovider",
    "-p",
    "no:xdist",
    "--no-showlocals",
)


def check_inside(*arguments: str, num_gpus: int = 4, timeout_sec: float = 900.0) -> None:
    """See that the tests chosen by pytest's arguments pass on emulated GPUs, every one of them.

    Raises:
        AssertionError: one failed or was skipped, or there is none.
    """
    command = [sys.executable, "-m", "pytest", "-q", *PLUGINS, *arguments]
    with tempfile.TemporaryDirectory() as caches:
        done = subprocess.run(
            command,
            cwd=ROOT,
            env=variables(num_gpus) | {"XDG_CACHE_HOME": caches},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout_sec,
        )
    assert done.returncode == 0, f"on {num_gpus} emulated GPUs:\n{done.stdout[-20_000:]}"
    assert " skipped" not in done.stdout, done.stdout[-5000:]
