"""What the cgroups of a container or a job allow, of both versions."""

from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest

from dist_train import cgroups, memory

GIB = 1 << 30


@pytest.fixture
def job(tmp_path: Path) -> Iterator[Path]:
    """Return the folder of a job, of which the step below it has no limits of its own."""
    step = tmp_path / "job" / "step"
    step.mkdir(parents=True)
    folders = [step, step.parent, tmp_path]
    with mock.patch.object(cgroups, "cgroup_folders", return_value=folders):
        yield step.parent


def write(folder: Path, **files: str) -> None:
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(f"{text}\n")


def test_no_limits(job: Path) -> None:
    write(job / "step", cpu__max="max 100000", memory__max="max", memory__current="5")
    write(job, memory__limit_in_bytes=str((1 << 63) - 4096))
    write(job, cpu__cfs_quota_us="-1", cpu__cfs_period_us="100000")
    assert cgroups.quota_cores() is None
    assert cgroups.memory_limit_bytes() is None
    assert cgroups.memory_left_bytes() is None


def test_limits_of_version_2_count_where_they_are_tightest(job: Path) -> None:
    write(job / "step", cpu__max="max 100000", memory__max="max", memory__current=str(GIB))
    write(job, cpu__max="250000 100000", memory__max=str(8 * GIB), memory__current=str(5 * GIB))
    write(job, memory__stat=f"anon {GIB}\ninactive_file {2 * GIB}\nactive_file 7")
    write(job.parent, cpu__max="400000 100000", memory__max=str(64 * GIB), memory__current="0")
    assert cgroups.quota_cores() == 2.5
    assert cgroups.memory_limit_bytes() == 8 * GIB
    assert cgroups.memory_left_bytes() == 5 * GIB, "files can be read again"
    assert memory.host_memory_left() <= 5 * GIB


def test_limits_of_version_1(job: Path) -> None:
    write(job, cpu__cfs_quota_us="150000", cpu__cfs_period_us="100000")
    write(job, memory__limit_in_bytes=str(4 * GIB), memory__usage_in_bytes=str(3 * GIB))
    write(job, memory__stat=f"inactive_file 1\ntotal_inactive_file {GIB}")
    assert cgroups.quota_cores() == 1.5
    assert cgroups.memory_left_bytes() == 2 * GIB


def test_a_limit_that_is_overdrawn_leaves_nothing(job: Path) -> None:
    write(job, memory__max=str(GIB), memory__current=str(2 * GIB))
    assert cgroups.memory_left_bytes() == 0
