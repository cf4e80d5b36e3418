"""How a chain of restarts stands, by the run folder's status.json. Imports no torch."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dist_train.chain import EXIT_CODE
from dist_train.config import Config
from dist_train.config.identity import run_dir_of
from dist_train.config.whole_file import read_json, write_atomically
from dist_train.layout import detect_layout

FINAL_CODES = (2, EXIT_CODE)  # of failures that a restart would only repeat


def status_of(folder: Path, chain: str, first_attempt: int) -> dict[str, Any]:
    """Return what status.json says of a launch; empty if it is of an earlier one.

    Args:
        folder: the run's.
        chain: of the launch; a requeued job keeps it.
        first_attempt: of the launch.
    """
    status = read_json(folder / "status.json")
    mine = status.get("chain") == chain and status.get("attempt", -1) >= first_attempt
    return status if mine else {}


def forget(folder: Path) -> None:
    """Let the next launch count from zero, whatever chain it continues. No rank may live."""
    (folder / "chain.json").unlink(missing_ok=True)
    path = folder / "status.json"
    status = read_json(path)
    if status:
        write_atomically(path, json.dumps(status | {"chain": ""}, indent=1))


def is_final(status: Mapping[str, Any]) -> bool:
    """Say whether status.json tells of a failure that a restart would only repeat."""
    return status.get("state") == "failed" and status.get("exit_code") in FINAL_CODES


def has_ended(status: Mapping[str, Any], chain: str, attempt: int) -> bool:
    """Say whether status.json tells of an end for good (2 or 93) of this chain."""
    same = attempt > 0 and status.get("chain") == chain
    return same and status.get("exit_code") in FINAL_CODES


def ended_for_good(config: Config) -> tuple[str, int] | None:
    """Return why this process's chain has ended for good, and the code; None if it goes on.

    Looks only where all ranks see one folder: elsewhere rank 0 tells the others once they have met.
    """
    layout = detect_layout(os.environ, parent=os.getppid())
    if layout.local_world_size < layout.world_size:
        return None
    status = read_json(run_dir_of(config) / "status.json")
    if not has_ended(status, layout.chain, layout.attempt):
        return None
    return earlier_end(str(status["reason"])), status["exit_code"]


def earlier_end(reason: str) -> str:
    """Return the line of a restart that has nothing to do."""
    return f"this run ended before, and a restart would only repeat it: {reason}"
