"""Means with their 95 % intervals, and tables between markers in a Markdown file."""

import math
import platform
import statistics
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "RESULTS.md"

# Student's t, two-sided 95 %, by degrees of freedom from 1 on; beyond them 1.96 + 2.4 / df.
T_95 = (12.71, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179)


def mean_and_half_width(values: Sequence[float]) -> tuple[float, float]:
    """Return the mean and half the width of its 95 % interval (Student's t); inf for one value."""
    mean, count = statistics.fmean(values), len(values)
    if count < 2:
        return mean, math.inf
    freedom = count - 1
    t = T_95[freedom - 1] if freedom <= len(T_95) else 1.96 + 2.4 / freedom
    return mean, t * statistics.stdev(values) / math.sqrt(count)


def machine() -> dict[str, str]:
    """Return what results must be read with."""
    import torch

    from dist_train.run_folder import cpu_name

    return {
        "cpu": cpu_name(),
        "cores": str(len_of_affinity()),
        "torch": str(torch.__version__),
        "python": platform.python_version(),
    }


def len_of_affinity() -> int:
    """Return how many cores this process may use."""
    import os

    return len(os.sched_getaffinity(0))


def write_between(path: Path, name: str, text: str) -> None:
    """Replace what stands between `<!-- name: ... -->` and `<!-- name: end -->`."""
    before, rest = path.read_text().split(f"<!-- {name}:", 1)
    told, rest = rest.split("-->", 1)
    after = rest.split(f"<!-- {name}: end -->", 1)[1]
    path.write_text(
        f"{before}<!-- {name}:{told}-->\n\n{text.strip()}\n\n<!-- {name}: end -->{after}"
    )
