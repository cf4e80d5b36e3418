"""Pictures of which one, the first time, makes its loader worker ask for memory without end."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

VERSION_1, VERSION_2 = Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup")
GROUP_VARIABLE, MARK_VARIABLE = "GREEDY_GROUP", "GREEDY_MARK"
LIMIT_BYTES = 64 << 20


class GreedyPictures:
    """A map-style data set of 240 pictures, (3, 12, 12); without the variables it is harmless."""

    num_classes = 2

    def __init__(self, train: bool, greedy: int = -1) -> None:
        self.greedy = greedy if train else -1
        self.targets = [i % 2 for i in range(240)]

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        mark = os.environ.get(MARK_VARIABLE)
        if index == self.greedy and mark and not Path(mark).exists():
            Path(mark).write_text(str(os.getpid()))
            Path(os.environ[GROUP_VARIABLE], "cgroup.procs").write_text(str(os.getpid()))
            held: list[bytes] = []
            while True:
                held.append(os.urandom(1 << 20))
        generator = torch.Generator().manual_seed(index)
        return torch.rand(3, 12, 12, generator=generator), self.targets[index]


@contextmanager
def small_group() -> Iterator[Path]:
    """Make a control group with LIMIT_BYTES of memory; it is empty at the end, and removed."""
    parent, name = _memory_groups()
    group = parent / f"greedy-{os.getpid()}"
    group.mkdir()
    try:
        (group / name).write_text(str(LIMIT_BYTES))
        yield group
    finally:
        group.rmdir()


def why_no_group() -> str | None:
    """Say why no control group can be made here."""
    try:
        with small_group():
            return None
    except OSError as error:
        return f"needs a control group with a limit of memory, which root can make: {error}"


def _memory_groups() -> tuple[Path, str]:
    """Return where groups are made, and the file with their limit."""
    if VERSION_1.is_dir():
        return VERSION_1, "memory.limit_in_bytes"
    return VERSION_2, "memory.max"
