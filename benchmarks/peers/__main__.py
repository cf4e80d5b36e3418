"""The same job in every peer, in turns: `python -m benchmarks.peers run`, then `table --write`.

    run --rounds 1 --ranks 1 --precisions fp32     try one cell once: two minutes

Every round is kept as it ends, and a rerun does what is missing: of a series on the same machine,
with the same versions and code. Another machine or another code begins a series of its own.
"""

import argparse
import itertools
import signal
import sys
import time
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

from benchmarks.intervals import RESULTS, ROOT, write_between
from benchmarks.peers import records
from benchmarks.peers.job import CASES
from benchmarks.peers.one_round import run_round
from benchmarks.peers.records import Cell, Record
from benchmarks.peers.table import make_tables
from benchmarks.peers.worker import PEERS


def main() -> int:
    """Run the command line; returns 1 if a run failed, now or before in the same series."""
    asked = _parse()
    if asked.verb == "run":
        return _run(asked)
    for case in CASES:
        text = make_tables(records.read(asked.file or records.file_of(case))).get(case)
        if text is not None and asked.write:
            write_between(RESULTS, f"peers-{case}", text)
        elif text is not None:
            print(text)
    return 0


def rounds_to_do(
    kept: Sequence[Record], cells: Sequence[Cell], peers: Sequence[str], rounds: int
) -> list[tuple[int, Cell]]:
    """Return (number, cell) of what is missing until `rounds` rounds had all these peers.

    One that had only some of them stays as it is: runs of two rounds are never mixed.
    """
    found = []
    for cell in cells:
        had: dict[int, set[str]] = {}
        for record in kept:
            if record.cell == cell:
                had.setdefault(record.round, set()).add(record.peer)
        missing = rounds - sum(mine >= set(peers) for mine in had.values())
        first = max(had, default=-1) + 1
        found += [(first + n, cell) for n in range(missing)]
    return sorted(found, key=lambda item: item[0])


def _run(asked: argparse.Namespace) -> int:
    here = records.surroundings(asked.python)
    lacking = [p for p in asked.peers if here.get(records.PACKAGES.get(p, "")) == records.ABSENT]
    if lacking:
        sys.exit(f"peers: error: {asked.python} lacks {lacking}: run `make bench-peers`")
    path = asked.file or records.file_of(asked.case)
    before = records.read(path)
    series = None if asked.again else records.series_to_continue(before, here)
    series = series or datetime.now().isoformat()
    kept = [r for r in before if r.series == series]
    print(f"{path}: {len(kept)} runs of this series, {len(before) - len(kept)} set aside of others")
    choices = itertools.product([asked.case], asked.styles, asked.ranks, asked.precisions)
    cells = [Cell(*choice) for choice in choices]
    to_do = rounds_to_do(kept, cells, asked.peers, asked.rounds)
    for count, (number, cell) in enumerate(to_do, 1):
        if records.code_digest() != here["code"]:
            sys.exit("peers: error: the code has changed meanwhile: run again for a new series")
        begun = time.monotonic()
        outcomes = run_round(asked.python, asked.peers, cell, seed=number)
        told = []
        for peer, outcome in outcomes.items():
            record = Record(
                series=series,
                surroundings=here,
                date=time.strftime("%Y-%m-%d"),
                cell=cell,
                round=number,
                peer=peer,
                outcome=outcome,
            )
            records.append(path, record)
            kept.append(record)
            told.append(f"{peer} {outcome.failed or format(outcome.values['cpu_us'], ',.0f')}")
        print(
            f"{count} of {len(to_do)}: round {number + 1}, {cell.ranks} x {cell.precision}, "
            f"{cell.style}, us: {', '.join(told)} [{time.monotonic() - begun:.0f} s]",
            flush=True,
        )
    for text in make_tables(kept).values():
        print(f"\n{text}")
    failed = [r for r in records.judged(kept) if r.outcome.failed is not None]
    for r in failed:
        print(f"peers: error: {r.peer}, round {r.round + 1}, {r.cell}: {r.outcome.failed}")
    return 1 if failed else 0


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.peers",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    verbs = parser.add_subparsers(dest="verb", required=True)
    runs = verbs.add_parser("run", help="run all peers in turns and keep the results")
    runs.add_argument("--python", default=str(ROOT / ".venv-peers" / "bin" / "python"))
    runs.add_argument("--rounds", type=int, default=9)
    runs.add_argument("--case", choices=CASES, default="tiny")
    runs.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    runs.add_argument("--precisions", nargs="+", default=["fp32", "bf16"])
    runs.add_argument("--styles", nargs="+", default=["lean"], choices=records.STYLES)
    runs.add_argument("--peers", nargs="+", default=list(PEERS), choices=PEERS)
    runs.add_argument("--file", type=Path, help="keep them there, not in benchmarks/results")
    runs.add_argument("--again", action="store_true", help="begin anew, whatever is there")
    table = verbs.add_parser("table", help="print the tables of the results")
    table.add_argument("--file", type=Path)
    table.add_argument("--write", action="store_true", help="put them into benchmarks/RESULTS.md")
    return parser.parse_args()


if __name__ == "__main__":
    # Leaving by an exception, it ends the ranks that run.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    sys.exit(main())
