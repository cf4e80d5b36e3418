"""A plugin of pytest, for a process with emulated GPUs: tests and their ranks compute with them."""

import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests import ranks, settings
from tests.emulated_gpu.kernels import emulated

# Of what a real GPU is given in tests/test_gpu.py, as much as a CPU can compute.
LESS = ("model.args.width=16", "data.args.image_size=16")
OF_THE_CPU = {  # and why
    "test_auto_takes_what_fits_on_the_rank_with_the_least_memory": "it is the host's memory",
    "test_what_cannot_be_trained_is_refused_before_the_first_step[Odd model.args.kind='sparse": (
        "sparse tensors are not emulated"
    ),
}
run_rank = ranks._rank


def pytest_configure() -> None:
    settings.SMALL = tuple("device=cuda" if o == "device=cpu" else o for o in settings.SMALL)
    ranks._rank = emulated_rank
    ranks.FORKSERVER.set_forkserver_preload([*ranks.PRELOAD, "tests.emulated_gpu.plugin"])


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    from tests import test_gpu

    test_gpu.LARGE += LESS
    out = [item for item in items if item.name.startswith(tuple(OF_THE_CPU))]
    items[:] = [item for item in items if item not in out]
    if out:
        config.hook.pytest_deselected(items=out)


def emulated_rank(
    sender: Any,
    variables: dict[str, str],
    dump: tuple[str, float],
    work: Callable[..., Any],
    args: Any,
) -> None:
    """Be a rank of a test, on the emulated GPU."""
    run_rank(sender, variables, dump, Emulated(work), args)


class Emulated:
    """A test's work, on the emulated GPU."""

    def __init__(self, work: Callable[..., Any]) -> None:
        self._work = work

    def __call__(self, *args: Any) -> Any:
        with emulated():
            return pickle.loads(
                ranks.dumped(self._work(*args))
            )  # on the CPU, while it can be copied


@pytest.fixture(autouse=True)
def emulated_gpu() -> Iterator[None]:
    with emulated():
        yield
