"""Row X1: checkpoints crafted to run code or to fill the memory."""

import hashlib
import io
import json
import os
import pickle
import resource
import time
import zipfile
from pathlib import Path
from typing import Any

import torch

from benchmarks.reliability.in_ranks import how_it_ended, train_in_rank, trained
from benchmarks.reliability.row import Row, Trial, check
from dist_train.checkpoint import write_checkpoint
from dist_train.checkpoint_folder import list_checkpoints, sealed
from dist_train.config import ConfigError
from tests.ranks import start_ranks_of
from tests.settings import small

CRAFTED = ("state", "optimizer", "random state", "nested storage", "DCP metadata", "zip bomb")
BOMB_BYTES, MEMORY_BYTES = 2**30, 2**29


class Evil:
    """Makes a file when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.mark}",)


def x1(trial: Trial) -> float | None:
    """Resume from a crafted checkpoint whose manifest is right."""
    kind = trial.one_of(CRAFTED)
    marks = [trial.folder / f"executed.{n}" for n in range(3)]
    good = trial.folder / "good"
    good.mkdir()
    trained(good, small(good / "run", "train.steps=2"), world_size=0)
    source = list_checkpoints(good / "run" / "checkpoints")[0]
    state = torch.load(source / "state.pt", weights_only=True)
    evil = trial.folder / "evil"
    evil.mkdir()
    path = evil / source.name
    if kind == "state":
        write_checkpoint(evil, {**state, "extra": Evil(marks[0])}, step=2)
    elif kind == "optimizer":
        state["optimizer"]["state"][0]["evil"] = Evil(marks[0])
        write_checkpoint(evil, state, step=2)
    elif kind == "random state":
        write_checkpoint(evil, {**state, "rng": [torch.get_rng_state(), Evil(marks[0])]}, step=2)
    elif kind == "nested storage":
        crafted = write_checkpoint(evil, state, step=2)
        _nested_storage(crafted, marks, legacy=trial.dice.random() < 0.5)
    elif kind == "DCP metadata":
        path.mkdir()
        (path / ".metadata").write_bytes(pickle.dumps(Evil(marks[0])))
        (path / "__0_0.distcp").write_bytes(pickle.dumps(Evil(marks[1])))
    else:
        _zip_bomb(write_checkpoint(evil, state, step=2))
    trial.fired = True
    config = small(trial.folder / "run", "train.steps=4", f"resume={path}")
    begin = time.monotonic()
    ends = start_ranks_of(with_little_memory, 0, trial.folder, config, timeout_sec=60.0)
    sec = time.monotonic() - begin
    check(not [m for m in marks if m.exists()], "CODE WAS EXECUTED")
    told = how_it_ended(ends, trial.folder)
    check(isinstance(ends[0].error, ConfigError), f"no clear refusal: {told}")
    check("\n" not in str(ends[0].error), "the refusal has several lines")
    check("alloc" not in told, f"it tried to unpack all of it: {told}")
    trial.notes["told"] = str(ends[0].error).replace(str(trial.folder), "")[:120]
    return sec


def with_little_memory(folder: Path, config: Any) -> Any:
    """Train as this rank with a few GiB of address space above what is used now."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY_BYTES, used + MEMORY_BYTES))
    return train_in_rank(folder, config, ())


class _Nested(pickle.Pickler):
    """Writes None as a tensor's storage whose description runs code."""

    def __init__(self, file: io.BytesIO, mark: Path) -> None:
        super().__init__(file, protocol=2)
        self.mark = mark

    def persistent_id(self, obj: Any) -> Any:
        return ("storage", Evil(self.mark), "0", "cpu", 1) if obj is None else None


def _nested_storage(path: Path, marks: list[Path], *, legacy: bool) -> None:
    """Hide the code where storages are described, or between the pickles of the old format."""
    file, new = path / "state.pt", io.BytesIO()
    if legacy:  # magic number, protocol, system, object, keys of storages: a pickle each
        for value in (0x1950A86A20F9469CFC6C, 1001, Evil(marks[0]), Evil(marks[1]), []):
            pickle.dump(value, new, protocol=2)
    else:
        with zipfile.ZipFile(file) as old, zipfile.ZipFile(new, "w") as archive:
            for name in old.namelist():
                data = io.BytesIO(old.read(name))
                if name.endswith("/data.pkl"):
                    data = io.BytesIO()
                    _Nested(data, marks[0]).dump({"model": None})
                archive.writestr(name, data.getvalue())
    _replace(path, new.getvalue())


def _replace(path: Path, data: bytes) -> None:
    """Replace the state by `data` and let the manifest agree."""
    (path / "state.pt").write_bytes(data)
    manifest = json.loads((path / "manifest.json").read_text())
    digest = hashlib.sha256(data).hexdigest()
    manifest["files"]["state.pt"] |= {"sha256": digest, "bytes": len(data)}
    del manifest["manifest_sha256"]  # its last line is the digest of all before it
    (path / "manifest.json").write_bytes(sealed(manifest))


def _zip_bomb(path: Path) -> None:
    """Let one compressed record unpack to far more than the file."""
    file, new = path / "state.pt", io.BytesIO()
    zeros = bytes(2**20)
    with (
        zipfile.ZipFile(file) as old,
        zipfile.ZipFile(new, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive,
    ):
        for name in old.namelist():
            if not name.endswith("/data/0"):
                archive.writestr(name, old.read(name))
                continue
            with archive.open(name, "w", force_zip64=True) as record:
                for _ in range(BOMB_BYTES // len(zeros)):
                    record.write(zeros)
    _replace(path, new.getvalue())


ROWS = (
    Row(
        id="X1",
        promise="a crafted checkpoint runs no code and is refused in one line",
        injection=f"crafted, with a right manifest: {', '.join(CRAFTED)}",
        num_trials=60,
        measures="to the refusal",
        work=x1,
        small=6,
    ),
)
