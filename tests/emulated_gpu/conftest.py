"""Where no emulated GPU can be made its tests do not run, and say why; in CI that is an error."""

import os

import pytest

from tests.emulated_gpu.build import why_not


@pytest.fixture(autouse=True, scope="session")
def emulated_gpu_is_here() -> None:
    reason = why_not()
    if reason is not None and os.environ.get("CI"):
        pytest.fail(f"no GPU can be emulated: {reason}")
    if reason is not None:
        pytest.skip(f"no GPU can be emulated: {reason}")
