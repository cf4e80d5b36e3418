"""Tests that need GPUs this machine lacks are not collected, and the report says how many."""

import pytest
import torch

NOT_RUN = pytest.StashKey[dict[str, int]]()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    have = torch.cuda.device_count()
    needs = {"gpu": 1, "multi_gpu": 2}
    missing = {mark for mark, count in needs.items() if have < count}
    out = [item for item in items if any(item.get_closest_marker(m) for m in missing)]
    items[:] = [item for item in items if item not in out]
    config.stash[NOT_RUN] = {
        mark: sum(item.get_closest_marker(mark) is not None for item in out) for mark in missing
    }
    if out:
        config.hook.pytest_deselected(items=out)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for mark, count in terminalreporter.config.stash.get(NOT_RUN, {}).items():
        if count:
            terminalreporter.write_line(
                f"{count} tests marked {mark} were not run: this machine lacks the GPUs "
                "(make gpu-check on one that has them)"
            )
