"""`python -m benchmarks.reliability run|table|list`: the fault campaign and its table."""

import argparse
import signal
import sys
import tempfile
from pathlib import Path

from benchmarks.reliability import results
from benchmarks.reliability.campaign import run_rows
from benchmarks.reliability.registry import ROWS, rows_named
from benchmarks.reliability.row import Options
from benchmarks.reliability.table import make_table, write_table


def main() -> int:
    """Run the command line; returns 0, 1 if a trial failed, 2 for a mistake."""
    options = _parse()
    if options.verb == "list":
        for row in ROWS:
            state = "" if row.work else "  NOT BUILT"
            print(f"{row.id:<4} N={row.num_trials:<5} {row.injection}{state}")
        return 0
    if options.verb == "table":
        if options.write:
            write_table()
        else:
            print(make_table())
        return 0
    try:
        rows = rows_named(options.rows)
        small = options.n == "small"
        count = None if options.n in (None, "small") else int(options.n)
    except ValueError as error:
        sys.stderr.write(f"reliability: error: {error}\n")
        return 2
    with tempfile.TemporaryDirectory() as scratch:
        # The small form, or a long trial cut short, proves less: it is not recorded.
        shorter = small or options.minutes is not None
        recorded = Path(scratch) if shorter else results.FOLDER
        good = run_rows(
            rows,
            num_trials=count,
            seeds=options.seeds,
            small=small,
            again=options.again,
            options=Options(minutes=options.minutes, mean_sec=options.mean_sec),
            folder=options.results or recorded,
            keep=options.keep,
        )
        if (options.results or recorded) == results.FOLDER:
            write_table()
    return 0 if good else 1


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.reliability", description=__doc__)
    verbs = parser.add_subparsers(dest="verb", required=True)
    run = verbs.add_parser("run", help="run trials and append their results")
    run.add_argument("rows", nargs="*", help="ids, like R1 R8; all without any")
    run.add_argument("--n", help="trials of each row, or `small`; each row's own N without")
    run.add_argument("--seeds", type=int, nargs="+", help="these seeds instead of 0..N-1")
    run.add_argument("--again", action="store_true", help="also seeds already done with this code")
    run.add_argument("--minutes", type=float, help="length of a long trial (R5, L1)")
    run.add_argument("--mean-sec", type=float, default=60.0, help="between two kills of R5")
    run.add_argument("--results", type=Path, help="append the results there")
    run.add_argument("--keep", type=Path, help="copy the folders of failed trials there")
    verbs.add_parser("list", help="show the rows")
    table = verbs.add_parser("table", help="print the README's table")
    table.add_argument("--write", action="store_true", help="write it into the README")
    return parser.parse_args()


if __name__ == "__main__":
    # Leaving by an exception, it ends what its trial has started.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    # A script may have started this in its background: trials interrupt what they start.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.exit(main())
