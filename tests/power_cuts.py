"""Power cuts: what was not synced may be lost, at every place of a save."""

import contextlib
import os
import pickle
import random
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

from dist_train.checkpoint import load_state
from dist_train.checkpoint_folder import BadCheckpointError, name_of, newest_good
from dist_train.checkpoint_upkeep import tidy
from dist_train.checkpoint_writer import CheckpointWriter
from tests.storage_faults import STATE, Count


@dataclass(kw_only=True, slots=True)
class _Node:
    """A file or folder of the model: as it is, and as it is surely on the disk."""

    entries: dict[str, "_Node"] | None = None  # of a folder
    lasting: dict[str, "_Node"] = field(default_factory=dict)
    unsynced: list[dict[str, "_Node"]] = field(default_factory=list)  # the versions since, in order
    data: bytes = b""
    lasting_data: bytes | None = b""


class PowerCutModel:
    """Follows what a program does to files below a folder, and builds what a power cut may leave.

    Names in a folder last from its fsync on, before it any prefix of its changes may; a file's
    bytes last from its fsync on, before it they may be cut anywhere, or zeros.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.top = _Node(entries={})
        self.cuts: list[tuple[int, Callable[[Path, random.Random], None]]] = []
        self.announced = -1
        self._open: dict[int, Path] = {}

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Follow os.mkdir, os.open, os.write, os.fsync, os.rename and shutil.rmtree."""
        real = {n: getattr(os, n) for n in ("mkdir", "open", "write", "fsync", "rename")}
        real_rmtree = shutil.rmtree

        def mkdir(path: Any, *args: Any, **kwargs: Any) -> None:
            real["mkdir"](path, *args, **kwargs)
            if self._is_below(path):
                self._change(path, lambda names, name: names.update({name: _Node(entries={})}))

        def opened(path: Any, flags: int, *args: Any, **kwargs: Any) -> int:
            descriptor = real["open"](path, flags, *args, **kwargs)
            if kwargs.get("dir_fd") is None and self._is_below(path):
                self._open[descriptor] = Path(path)
                if flags & os.O_CREAT:
                    self._change(path, lambda names, name: names.setdefault(name, _Node()))
            return descriptor

        def write(descriptor: int, data: Any) -> int:
            done = real["write"](descriptor, data)
            if descriptor in self._open:
                self._node(self._open[descriptor]).data += bytes(data[:done])
                self._mark()
            return done

        def fsync(descriptor: int) -> None:
            real["fsync"](descriptor)
            path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
            if path == self.root or self._is_below(path):
                node = self._node(path)
                if node.entries is None:
                    node.lasting_data = node.data
                else:
                    node.lasting, node.unsynced = dict(node.entries), []
                self._mark()

        def rename(source: Any, target: Any) -> None:
            real["rename"](source, target)
            if self._is_below(source):
                moved = Path(source).name

                def move(names: dict[str, _Node], name: str) -> None:
                    names[name] = names.pop(moved)

                self._change(target, move)

        def rmtree(path: Any, *args: Any, **kwargs: Any) -> None:
            real_rmtree(path, *args, **kwargs)
            if self._is_below(path) and not Path(path).exists():
                self._change(path, lambda names, name: names.pop(name, None))

        with contextlib.ExitStack() as stack:
            for name, call in {
                "mkdir": mkdir, "open": opened, "write": write, "fsync": fsync, "rename": rename
            }.items():  # fmt: skip
                stack.enter_context(mock.patch.object(os, name, call))
            stack.enter_context(mock.patch.object(shutil, "rmtree", rmtree))
            yield

    def announce(self, step: int) -> None:
        """Note that the program has said that the checkpoint of `step` is saved."""
        self.announced = step
        self._mark()

    def _is_below(self, path: Any) -> bool:
        return str(path).startswith(f"{self.root}/")

    def _node(self, path: Path) -> _Node:
        node = self.top
        for name in path.relative_to(self.root).parts:
            assert node.entries is not None
            node = node.entries[name]
        return node

    def _change(self, path: Any, change: Callable[[dict[str, _Node], str], Any]) -> None:
        folder = self._node(Path(path).parent)
        assert folder.entries is not None
        change(folder.entries, Path(path).name)
        folder.unsynced.append(dict(folder.entries))
        self._mark()

    def _mark(self) -> None:
        """Remember the state here as a place where the power may go."""
        frozen = pickle.dumps(self.top)
        self.cuts.append((self.announced, lambda out, dice: _left(pickle.loads(frozen), out, dice)))


def _left(node: _Node, out: Path, dice: random.Random) -> None:
    if node.entries is None:
        data = node.data
        if node.lasting_data != node.data:
            kept = dice.randrange(len(node.lasting_data or b""), len(node.data) + 1)
            data = node.data[:kept] + b"\0" * dice.choice([0, len(node.data) - kept])
        out.write_bytes(data)
        return
    out.mkdir()
    for name, child in dice.choice([node.lasting, *node.unsynced]).items():
        _left(child, out / name, dice)


def cut_power(folder: Path, cuts: int, *, seed: int) -> Count:
    """Save five times, also over an old one and with pruning, and cut the power at `cuts` places.

    The last checkpoint that was announced, or a newer one, must verify and load.
    """
    root = folder / "watched"
    root.mkdir()
    model = PowerCutModel(root)
    with model.watching():
        writer = CheckpointWriter(
            root / "checkpoints", keep_last=1, on_saved=model.announce, on_error=print
        )
        for step in (1, 2, 2, 3, 4):
            writer.save({**STATE, "n": step}, step=step, best_step=None)
        writer.close()
    assert model.announced == 4
    dice, count = random.Random(seed), Count()
    for trial in range(cuts):
        place = (
            trial % len(model.cuts) if trial < len(model.cuts) else dice.randrange(len(model.cuts))
        )
        announced, leave = model.cuts[place]
        with tempfile.TemporaryDirectory(dir=folder) as name:
            left = Path(name) / "left"
            leave(left, dice)
            tidy(left / "checkpoints")
            count.injected += 1
            try:
                found = newest_good(left / "checkpoints", lambda text: None)
            except BadCheckpointError:
                found = None
            step = -1 if found is None else load_state(found[1])["n"]
            if step < announced:
                count.missed.append(
                    f"place {place}: {name_of(announced)} was announced, {step} left"
                )
    return count
