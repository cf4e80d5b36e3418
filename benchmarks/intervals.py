"""Means with their 95 % intervals, and tables between markers in a Markdown file."""

import os
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dist_train.bench.intervals import mean_of

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "RESULTS.md"
FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")  # what decides a CPU's speed here


def mean_and_half_width(values: Sequence[float]) -> tuple[float, float]:
    """Return the mean and half the width of its 95 % interval (Student's t); inf for one value."""
    found = mean_of(values)
    return found.value, found.high - found.value


def plus_minus(value: Sequence[float], digits: int) -> str:
    """Return (mean, half of the interval) in words."""
    return f"{value[0]:,.{digits}f} +- {value[1]:,.{digits}f}"


def machine() -> dict[str, str]:
    """Return what results must be read with."""
    import torch

    from dist_train.run_folder import cpu_name

    flags = set(Path("/proc/cpuinfo").read_text().split()) if Path("/proc/cpuinfo").exists() else ()
    return {
        "cpu": cpu_name(),
        "with": ", ".join(flag for flag in FLAGS if flag in flags),
        "cores": str(len(os.sched_getaffinity(0))),
        "torch": str(torch.__version__),
        "python": platform.python_version(),
    }


def said(record: dict[str, Any]) -> str:
    """Return a record's date and machine in words."""
    where = ", ".join(f"{key} {value}" for key, value in record["machine"].items())
    return f"{record['date']}; {where}"


def write_between(path: Path, name: str, text: str) -> None:
    """Replace what stands between `<!-- name: ... -->` and `<!-- name: end -->`."""
    before, rest = path.read_text().split(f"<!-- {name}:", 1)
    told, rest = rest.split("-->", 1)
    after = rest.split(f"<!-- {name}: end -->", 1)[1]
    path.write_text(
        f"{before}<!-- {name}:{told}-->\n\n{text.strip()}\n\n<!-- {name}: end -->{after}"
    )
