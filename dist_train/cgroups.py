"""What Linux's cgroups, versions 1 and 2, allow this process: of a container, or a SLURM job."""

import functools
import re
from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")
NO_LIMIT = 1 << 60  # bytes: version 1 names a number beyond all memory


def quota_cores() -> float | None:
    """Return how many cores' time is allowed, as by `docker --cpus`; None: no quota."""
    return least([_quota(folder) for folder in cgroup_folders("cpu")])


def memory_limit_bytes() -> int | None:
    """Return how much memory is allowed in all; None: no limit."""
    limit = least([_limit(folder) for folder in cgroup_folders("memory")])
    return None if limit is None else int(limit)


def memory_left_bytes() -> int | None:
    """Return how much of it can still be had, where it is tightest; None: no limit.

    Files that were read lately count as used, and are given up when memory is asked for.
    """
    left: list[float | None] = []
    for folder in cgroup_folders("memory"):
        limit = _limit(folder)
        if limit is not None:
            used = text_of(folder / "memory.current") or text_of(folder / "memory.usage_in_bytes")
            stat = text_of(folder / "memory.stat")
            files = re.search(r"^total_inactive_file (\d+)$", stat, re.M)  # version 1: of all below
            files = files or re.search(r"^inactive_file (\d+)$", stat, re.M)
            left.append(limit - int(used or 0) + (int(files[1]) if files else 0))
    found = least(left)
    return None if found is None else max(0, int(found))


@functools.cache
def cgroup_folders(controller: str) -> list[Path]:
    """Return this process's folder of a controller and those above it."""
    folders = []
    for line in text_of("/proc/self/cgroup").splitlines():
        _, names, place = line.split(":", 2)
        tops = [CGROUPS, CGROUPS / "unified"] if names == "" else [CGROUPS / names]
        if names == "" or controller in names.split(","):
            parts = Path(place.lstrip("/"))
            # Inside a container the upper part of the place is not mounted.
            folders += [top / part for top in tops for part in (parts, *parts.parents)]
    return [folder for folder in dict.fromkeys(folders) if folder.is_dir()]


def least(values: list[float | None]) -> float | None:
    """Return the smallest of the values that are known."""
    return min((value for value in values if value is not None), default=None)


def text_of(path: str | Path) -> str:
    """Return a small file of the kernel; "" where there is none."""
    try:
        return Path(path).read_text()
    except OSError:
        return ""


def _quota(folder: Path) -> float | None:
    words = text_of(folder / "cpu.max").split()  # version 2
    words = words or [
        text_of(folder / f"cpu.cfs_{what}_us").strip() for what in ("quota", "period")
    ]  # version 1; -1: none
    if len(words) == 2 and words[0].isdigit() and words[1].isdigit():
        return int(words[0]) / int(words[1])
    return None


def _limit(folder: Path) -> float | None:
    text = text_of(folder / "memory.max") or text_of(folder / "memory.limit_in_bytes")
    value = int(text) if text.strip().isdigit() else None
    return value if value is not None and value < NO_LIMIT else None
