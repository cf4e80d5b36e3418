"""Tests that need GPUs this machine lacks are not collected, and the report says so."""

import signal

import pytest
import torch

NEEDS = {"gpu": 1, "multi_gpu": 2}


if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # A script started this in its background: tests that interrupt a run would wait for ever.
    signal.signal(signal.SIGINT, signal.default_int_handler)


def missing() -> list[str]:
    """Return the marks whose tests cannot run here."""
    return [mark for mark, count in NEEDS.items() if torch.cuda.device_count() < count]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    out = [item for item in items if any(item.get_closest_marker(mark) for mark in missing())]
    items[:] = [item for item in items if item not in out]
    if out:
        config.hook.pytest_deselected(items=out)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if missing():
        terminalreporter.write_line(
            f"not run: tests marked {' or '.join(missing())}; this machine lacks the GPUs "
            "(make gpu-check on one that has them)"
        )
