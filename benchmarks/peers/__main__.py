"""The same job in every peer, in turns: `python -m benchmarks.peers run`, then `table --write`."""

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.intervals import RESULTS, ROOT, machine, mean_and_half_width, write_between
from benchmarks.peers.job import CASES
from benchmarks.peers.worker import PEERS

FILE = ROOT / "benchmarks" / "results" / "peers.json"
PACKAGES = ("torch", "lightning", "accelerate", "pytorch-ignite", "transformers")
SAME_TO = 1e-3  # relative, of the weights' norm with an optimizer that is not fused
LIMIT_SEC = 600.0


def main() -> None:
    """Run the command line."""
    asked = _parse()
    if asked.verb == "table":
        text = make_table(json.loads(asked.file.read_text()))
        if asked.write:
            write_between(RESULTS, "peers", text)
        else:
            print(text)
        return
    record: dict[str, Any] = {
        "machine": machine(),
        "versions": _versions(asked.python),
        "date": time.strftime("%Y-%m-%d"),
        "case": asked.case,
        "runs": [],
    }
    dice = random.Random(0)
    for number in range(asked.rounds):
        for ranks in asked.ranks:
            for precision in asked.precisions:
                for style in asked.styles:
                    cell = {"ranks": ranks, "precision": precision, "style": style}
                    peers = list(asked.peers)
                    dice.shuffle(peers)
                    found = {peer: run(asked.python, peer, asked.case, **cell) for peer in peers}
                    check_same(found)
                    record["runs"] += [
                        {"round": number, "peer": peer, **cell, **values}
                        for peer, values in found.items()
                    ]
        asked.file.parent.mkdir(parents=True, exist_ok=True)
        asked.file.write_text(json.dumps(record, indent=1) + "\n")
        print(f"round {number + 1} of {asked.rounds}\n{make_table(record)}\n", flush=True)


def run(
    python: str, peer: str, case: str, *, ranks: int, precision: str, style: str
) -> dict[str, Any]:
    """Run one peer once; returns the means over its ranks."""
    folder = Path(tempfile.mkdtemp(prefix="peers-"))
    words = [peer, "--case", case, "--precision", precision, "--style", style]
    words += ["--folder", str(folder), "--begun", str(time.time())]
    start = ["-m", "benchmarks.peers.worker"]
    if ranks > 1:
        start = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", *start]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    try:
        done = subprocess.run(
            [python, *start, *words],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=LIMIT_SEC,
        )
        if done.returncode != 0:
            sys.exit(f"peers: error: {peer} on {ranks} ranks failed:\n{done.stdout[-3000:]}")
        results = [json.loads(path.read_text()) for path in sorted(folder.glob("rank*.json"))]
    finally:
        shutil.rmtree(folder)
    assert len(results) == ranks, f"{peer}: {len(results)} of {ranks} ranks left a result"
    assert len({r["weights_sha256"] for r in results}) == 1, f"{peer}: the ranks' weights differ"
    means = {
        key: sum(r[key] for r in results) / ranks
        for key, value in results[0].items()
        if isinstance(value, float)
    }
    return means | {"weights_sha256": results[0]["weights_sha256"]}


def check_same(found: dict[str, dict[str, Any]]) -> None:
    """End if the peers did not do the same job: their weights must have the same bits.

    The plain loop's optimizer is not fused and rounds otherwise.
    """
    exact = {r["weights_sha256"] for peer, r in found.items() if peer != "plain"}
    if len(exact) > 1:
        told = {peer: r["weights_sha256"][:8] for peer, r in found.items()}
        sys.exit(f"peers: error: the peers ended with different weights: {told}")
    norms = [r["norm"] for r in found.values()]
    if max(norms) > min(norms) * (1 + SAME_TO):
        sys.exit(f"peers: error: the norms of the weights differ: {norms}")


def make_table(record: dict[str, Any]) -> str:
    """Return the results as Markdown."""
    runs = record["runs"]
    cells = sorted({(r["style"], r["ranks"], r["precision"]) for r in runs}, reverse=True)
    lines = [
        f"{record['case']} net, {len({r['round'] for r in runs})} rounds, {record['date']}; "
        + ", ".join(f"{name} {v}" for name, v in (record["machine"] | record["versions"]).items()),
        "",
    ]
    for style, ranks, precision in cells:
        here = [
            r for r in runs if (r["style"], r["ranks"], r["precision"]) == (style, ranks, precision)
        ]
        lines += [
            f"{ranks} rank{'s' if ranks > 1 else ''}, {precision}, {style}:",
            "",
            "| loop | CPU us a step | over plain | over the fastest by hand | images/s | "
            "first step after | memory |",
            "|---|---|---|---|---|---|---|",
        ]
        for peer in PEERS:
            mine = [r for r in here if r["peer"] == peer]
            if not mine:
                continue
            values = [_mean(mine, "cpu_us"), _over(here, mine, "plain"), _over(here, mine, "fast")]
            values += [
                f"{statistics_mean(mine, 'images_per_sec'):,.0f}",
                f"{statistics_mean(mine, 'first_step_sec'):.1f} s",
                f"{statistics_mean(mine, 'peak_rss_mib'):.0f} MiB",
            ]
            lines.append(f"| {peer} | {' | '.join(values)} |")
        lines.append("")
    return "\n".join(lines)


def statistics_mean(runs: list[dict[str, Any]], key: str) -> float:
    """Return the mean of one value."""
    return sum(r[key] for r in runs) / len(runs)


def _mean(runs: list[dict[str, Any]], key: str) -> str:
    return f"{statistics_mean(runs, key):,.0f}"


def _over(here: list[dict[str, Any]], mine: list[dict[str, Any]], base: str) -> str:
    """Return the mean difference to `base` of the same round, with its 95 % interval."""
    of_round = {r["round"]: r["cpu_us"] for r in here if r["peer"] == base}
    differences = [r["cpu_us"] - of_round[r["round"]] for r in mine if r["round"] in of_round]
    if not differences or mine[0]["peer"] == base:
        return ""
    mean, half = mean_and_half_width(differences)
    return f"{mean:+.0f} +- {half:.0f}"


def _versions(python: str) -> dict[str, str]:
    code = (
        "import importlib.metadata as m, json, sys\n"
        "print(json.dumps({n: m.version(n) for n in sys.argv[1:]}))"
    )
    done = subprocess.run([python, "-c", code, *PACKAGES], capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(f"peers: error: {python} lacks a peer: run `make bench-peers`\n{done.stderr}")
    return json.loads(done.stdout)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peers", description=__doc__)
    verbs = parser.add_subparsers(dest="verb", required=True)
    runs = verbs.add_parser("run", help="run all peers in turns and write the results")
    runs.add_argument("--python", default=str(ROOT / ".venv-peers" / "bin" / "python"))
    runs.add_argument("--rounds", type=int, default=9)
    runs.add_argument("--case", choices=CASES, default="tiny")
    runs.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    runs.add_argument("--precisions", nargs="+", default=["fp32", "bf16"])
    runs.add_argument("--styles", nargs="+", default=["lean"], choices=("lean", "default"))
    runs.add_argument("--peers", nargs="+", default=list(PEERS), choices=PEERS)
    runs.add_argument("--file", type=Path, default=FILE)
    table = verbs.add_parser("table", help="print the table of the results")
    table.add_argument("--file", type=Path, default=FILE)
    table.add_argument("--write", action="store_true", help="put it into benchmarks/RESULTS.md")
    return parser.parse_args()


if __name__ == "__main__":
    main()
