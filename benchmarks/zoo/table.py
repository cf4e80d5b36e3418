"""What was found, as a page."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

from benchmarks.intervals import ROOT, said

RESULTS = ROOT / "benchmarks" / "results" / "zoo.jsonl"
PAGE = ROOT / "benchmarks" / "ZOO.md"


def latest(path: Path = RESULTS) -> dict[tuple[str, str], dict[str, Any]]:
    """Return the last record of each network; a line that a kill cut short is left out."""
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            record = json.loads(line)
        except ValueError:
            continue
        found[record["source"], record["name"]] = record
    return found


def page(records: list[dict[str, Any]]) -> str:
    """Return the whole page."""
    run = [r for r in records if not r["outcome"].startswith("not run")]
    counts = Counter((r["source"], r["outcome"]) for r in run)
    lines = [
        "# Networks that others made",
        "",
        "`make zoo` writes this page. Each network, with random weights, trains two steps on two",
        "ranks (gloo, CPU, fp32, two images a rank), is continued for two more by a resume of the",
        "same run folder, and is compared with an unbroken run of four: with the same bits both",
        "have one `weights_sha256`. Each start has processes of its own; images are the smallest",
        "square ones that the network takes.",
        "",
        *(
            f"- {source}: {count} {outcome}"
            for (source, outcome), count in sorted(counts.items(), key=lambda c: (c[0][0], -c[1]))
        ),
    ]
    for source in sorted({r["source"] for r in records}, reverse=True):
        mine = sorted((r for r in run if r["source"] == source), key=lambda r: r["name"])
        versions = sorted({f"{source} {r['version']}" for r in mine})
        machines = sorted({said(r) for r in mine})
        lines += ["", f"## {', '.join(versions)}", "", *machines, ""]
        lines += [
            "| network | million parameters | side of the images | memory format | s | outcome |"
        ]
        lines += ["| --- | ---: | ---: | --- | ---: | --- |"]
        lines += [_row(r) for r in mine]
    large = sorted((r for r in records if r not in run), key=lambda r: r["parameters"])
    if large:
        lines += ["", "## Larger ones, which are not run", ""]
        lines += [
            "Memory of a rank beside activations: weights, gradients, momentum, and the copy of"
        ]
        lines += ["weights and momentum that a save makes.", ""]
        lines += ["| network | million parameters | GiB |", "| --- | ---: | ---: |"]
        lines += [
            f"| {r['source']} {r['name']} | {r['parameters'] / 1e6:.1f} | {r['gib']:.1f} |"
            for r in large
        ]
    return "\n".join(lines) + "\n"


def _row(record: dict[str, Any]) -> str:
    parameters = record.get("parameters")
    told = record.get("told", "").replace("|", "/")
    cells = (
        record["name"],
        "" if parameters is None else f"{parameters / 1e6:.2f}",
        record.get("side", ""),
        record.get("memory_format", ""),
        f"{record['seconds']:.0f}",
        record["outcome"] + (f": {told}" if told else ""),
    )
    return "| " + " | ".join(map(str, cells)) + " |"
