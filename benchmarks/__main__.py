"""This repository's own measurements: `python -m benchmarks run [NAMES]`, then `table --write`.

Each leaves one JSON file in benchmarks/results and a table in benchmarks/RESULTS.md. They want a
machine that does nothing else.
"""

import argparse
import contextlib
import json
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any

from benchmarks import (
    bench_truth,
    checkpoint_cost,
    data_path,
    fixed_order_cost,
    guard_overhead,
    memory_format,
    narrow_conv,
    scaling,
    speedrun,
    sync_forms,
)
from benchmarks.intervals import RESULTS, ROOT, machine, said, write_between

FOLDER = ROOT / "benchmarks" / "results"
MEASURED: dict[str, tuple[Callable[[], Any], Callable[[Any], str]]] = {  # and its table
    "data_path": (data_path.measure, data_path.table),
    "guards": (guard_overhead.measure, guard_overhead.table),
    "fixed_order": (fixed_order_cost.measure, fixed_order_cost.table),
    "sync_forms": (sync_forms.measure, sync_forms.table),
    "narrow_conv": (narrow_conv.measure, narrow_conv.table),
    "memory_format": (memory_format.measure, memory_format.table),
    "checkpoint": (checkpoint_cost.measure, checkpoint_cost.table),
    "scaling": (scaling.measure, scaling.table),
    "causes": (bench_truth.causes, bench_truth.causes_table),
    "predictions": (bench_truth.scale, bench_truth.scale_table),
    "compare": (bench_truth.compare, bench_truth.compare_table),
}


def main() -> int:
    """Run the command line; returns the exit code: 1 if a measurement failed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    verbs = parser.add_subparsers(dest="verb", required=True)
    runs = verbs.add_parser("run", help="measure, one after the other, and keep what was found")
    runs.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(MEASURED)}")
    tables = verbs.add_parser("table", help="print the tables of all that was measured")
    tables.add_argument("--write", action="store_true", help="put them into benchmarks/RESULTS.md")
    asked = parser.parse_args()
    if asked.verb == "table":
        for name, text in _tables().items():
            if asked.write:
                write_between(RESULTS, name, text)
            else:
                print(f"## {name}\n\n{text}\n")
        return 0
    wrong = [name for name in asked.names if name not in MEASURED]
    if wrong:
        parser.error(f"{', '.join(wrong)} is none of {', '.join(MEASURED)}")
    failed = [name for name in asked.names or MEASURED if not _run(name)]
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


def _run(name: str) -> bool:
    """Measure one and keep what was found; a failure is told, and the next one goes on."""
    begun = time.monotonic()
    try:
        with contextlib.redirect_stdout(sys.stderr):  # what the runs themselves say
            found = MEASURED[name][0]()
    except Exception:
        traceback.print_exc()
        return False
    record = {
        "machine": machine(),
        "date": time.strftime("%Y-%m-%d"),
        "wall_sec": round(time.monotonic() - begun, 1),
        "found": found,
    }
    FOLDER.mkdir(parents=True, exist_ok=True)
    (FOLDER / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")
    print(f"## {name}\n\n{_table(name, record)}\n", flush=True)
    return True


def _tables() -> dict[str, str]:
    """Return the table of every measurement that there is a file of."""
    paths = {name: FOLDER / f"{name}.json" for name in MEASURED}
    tables = {
        name: _table(name, json.loads(path.read_text()))
        for name, path in paths.items()
        if path.is_file()
    }
    if speedrun.OUT.is_file():  # python -m benchmarks.speedrun, which needs data
        tables["speedrun"] = speedrun.table(json.loads(speedrun.OUT.read_text()))
    return tables


def _table(name: str, record: dict[str, Any]) -> str:
    took = f"{record['wall_sec'] / 60:.1f} minutes"
    return f"{said(record)}; {took}.\n\n{MEASURED[name][1](record['found'])}"


if __name__ == "__main__":
    sys.exit(main())
