"""Two ranks under torchrun for each case of a measurement, and what rank 0 found."""

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from benchmarks.intervals import ROOT

NUM_RANKS, FILE = 2, "found.json"


def measured(module: str, cases: Iterable[str]) -> dict[str, Any]:
    """Start two ranks of `module` for each case; return {"cases": what each found}."""
    found = []
    for case in cases:
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
            command += [f"--nproc-per-node={NUM_RANKS}", "-m", module, case, folder]
            subprocess.run(command, check=True, stdout=sys.stderr, cwd=ROOT)
            found.append(json.loads((Path(folder) / FILE).read_text()))
    return {"cases": found}


def be_a_rank(measure_case: Callable[[str, str], dict[str, Any] | None]) -> None:
    """Measure the case on the command line: what `module` does as one of the ranks.

    Args:
        measure_case: given the case and a folder, the same on all ranks; rank 0 returns figures.
    """
    case, folder = sys.argv[1:]
    found = measure_case(case, folder)
    if found is not None:
        (Path(folder) / FILE).write_text(json.dumps(found))
