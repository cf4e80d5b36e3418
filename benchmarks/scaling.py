"""How two ranks share this machine: `python -m benchmarks run scaling`, by `dist-train bench`."""

import json
import tempfile
from pathlib import Path
from typing import Any

from dist_train.bench import main
from dist_train.bench.breakdown import MEANS, PARTS

WORDS = ("experiment=cifar10_tutorial", "data=synthetic", "device=cpu")


def measure() -> dict[str, Any]:
    """Return the report of one and two ranks."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "report.json"
        assert main.main(["--nproc", "1,2", "--json", str(file), *WORDS]) == 0
        report = json.loads(file.read_text())
    del report["machine"]["host"]
    return report


def table(report: dict[str, Any]) -> str:
    """Return the results as Markdown."""
    lines = [
        f"`{report['command'].split(' --json')[0]} {' '.join(WORDS)}`",
        "",
        "| ranks x batch | images/s | speed-up | start to first step | not explained |",
        "|---|---|---|---|---|",
    ]
    for result in report["setups"]:
        rate = _with_interval(result["images_per_sec"], ",.0f")
        gained = next((v for v in result["speedup"].values()), None)
        residual = result["parts_sec"]["residual"] / result["step_sec"]["value"]
        lines.append(
            f"| {result['num_ranks']} x {result['batch_size']} | {rate} | "
            f"{_with_interval(gained, '.2f')} | {result['start_to_first_step_sec']:.1f} s | "
            f"{residual:+.1%} |"
        )
    largest = report["setups"][-1]
    lines += ["", f"Of a step on {largest['num_ranks']} ranks: "]
    lines[-1] += ", ".join(
        f"{MEANS[name]} {1000 * largest['parts_sec'][name]:.2f} ms" for name in PARTS
    )
    sweep = ", ".join(f"{_size(size)} {1e6 * sec:,.0f} us" for size, sec in largest["all_reduce"])
    lines += ["", f"All-reduce over {largest['num_ranks']} ranks: {sweep}."]
    for check in report["scale"]["checked"]:
        lines += [
            "",
            f"The model of scale on {check['num_ranks']} ranks x {check['batch_size']}: "
            f"{check['error']:+.1%}.",
        ]
    return "\n".join(lines)


def _with_interval(value: dict[str, Any] | None, form: str) -> str:
    if value is None:
        return ""
    if value["low"] is None or value["high"] is None:
        return f"{value['value']:{form}}"
    half = (value["high"] - value["low"]) / 2
    return f"{value['value']:{form}} +- {half:{form}}"


def _size(num_bytes: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if num_bytes < 1024:
            return f"{num_bytes:.0f} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:.0f} GiB"
