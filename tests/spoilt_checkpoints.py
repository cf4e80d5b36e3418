"""Checkpoints that are damaged, swapped or made by somebody who means harm."""

import hashlib
import io
import json
import os
import pickle
import resource
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from dist_train.checkpoint import load_state
from dist_train.checkpoint_folder import BadCheckpointError, manifest_bytes, sealed, step_of
from tests.storage_faults import STATE, Count

Spoil = Callable[[Path, Path], str]
"""(newer, older) -> a part of the line that must be told."""


def _rewrite(path: Path, **changes: Any) -> None:
    """Change a manifest and seal it again, as someone would who means it."""
    record = json.loads((path / "manifest.json").read_bytes())
    record.pop("manifest_sha256")
    (path / "manifest.json").write_bytes(sealed(record | changes))


def _with_manifest(data: bytes) -> Spoil:
    def spoil(newer: Path, older: Path) -> str:
        (newer / "manifest.json").write_bytes(data)
        return "manifest.json"

    return spoil


def _with_files(told: str, **files: Any) -> Spoil:
    def spoil(newer: Path, older: Path) -> str:
        entry = json.loads((newer / "manifest.json").read_bytes())["files"]["state.pt"]
        _rewrite(newer, files={name: entry | change for name, change in files.items()})
        return told

    return spoil


def _linked(name: str) -> Spoil:
    def spoil(newer: Path, older: Path) -> str:
        target = newer / name if name else newer
        moved = newer.parent / "moved"
        target.rename(moved)
        target.symlink_to(moved)
        return "symbolic link"

    return spoil


def _without(name: str) -> Spoil:
    def spoil(newer: Path, older: Path) -> str:
        (newer / name).unlink()
        return "No such file"

    return spoil


def _emptied(name: str, told: str) -> Spoil:
    def spoil(newer: Path, older: Path) -> str:
        os.truncate(newer / name, 0)
        return told

    return spoil


def _swapped(newer: Path, older: Path) -> str:
    aside = newer.with_name("aside")
    newer.rename(aside)
    shutil.copytree(older, newer)
    return "it was moved or renamed"


def _states_swapped(newer: Path, older: Path) -> str:
    shutil.copy(older / "state.pt", newer / "state.pt")
    return "was changed"


def _future(newer: Path, older: Path) -> str:
    _rewrite(newer, format_version=99)
    return "format version 99, this program reads 2"


def _old_version(newer: Path, older: Path) -> str:
    record = json.loads((newer / "manifest.json").read_bytes())
    record.pop("manifest_sha256")
    (newer / "manifest.json").write_text(json.dumps(record | {"format_version": 1}))
    return "format version 1, this program reads 2"


def _pipe(newer: Path, older: Path) -> str:
    (newer / "state.pt").unlink()
    os.mkfifo(newer / "state.pt")
    return "no regular file"


def _huge(newer: Path, older: Path) -> str:
    os.truncate(newer / "state.pt", 1 << 42)  # a hole: takes no space
    entry = {"bytes": 1 << 42, "sha256": "0" * 64}
    _rewrite(newer, files={"state.pt": entry})
    return "GiB of memory free"


def _dotted_metadata(newer: Path, older: Path) -> str:
    """What torch.distributed.checkpoint would unpickle, in a folder of that form."""
    for file in newer.iterdir():
        file.unlink()
    (newer / ".metadata").write_bytes(pickle.dumps(Evil(newer.parent.parent / "owned")))
    (newer / "__0_0.distcp").write_bytes(b"\0" * 100)
    return "manifest.json: No such file"


SPOILS: dict[str, Spoil] = {
    "an empty state": _emptied("state.pt", "has 0 bytes instead of"),
    "an empty manifest": _emptied("manifest.json", "damaged"),
    "no manifest": _without("manifest.json"),
    "no state": _without("state.pt"),
    "two swapped folders": _swapped,
    "two swapped states": _states_swapped,
    "a future version": _future,
    "the version before": _old_version,
    "an absolute path": _with_files("names the file '/etc/passwd'", **{"/etc/passwd": {}}),
    "a path upwards": _with_files("names the file '../x'", **{"../x": {}, "state.pt": {}}),
    "a size that is no number": _with_files("damaged", **{"state.pt": {"bytes": "9"}}),
    "a huge declared size": _with_files("instead of", **{"state.pt": {"bytes": 1 << 60}}),
    "a huge state": _huge,
    "a link instead of the folder": _linked(""),
    "a link instead of the state": _linked("state.pt"),
    "a link instead of the manifest": _linked("manifest.json"),
    "a pipe instead of the state": _pipe,
    "a deep manifest": _with_manifest(b"[" * 60_000),
    "a huge manifest": _with_manifest(b" " * (1 << 20)),
    "a manifest of a long number": _with_manifest(b'{"format_version": 1' + b"0" * 9000 + b"}"),
    "a manifest that is a list": _with_manifest(b"[]"),
    "a manifest that is no text": _with_manifest(bytes(range(256))),
    "a folder of torch.distributed.checkpoint": _dotted_metadata,
}


class Evil:
    """Makes a file when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.mark}",)


def _saved(state: Any, *, legacy: bool = False) -> bytes:
    buffer = io.BytesIO()
    torch.save(state, buffer, _use_new_zipfile_serialization=not legacy)
    return buffer.getvalue()


def _rezipped(
    change: Callable[[str, bytes], bytes], *, compression: int = zipfile.ZIP_STORED
) -> bytes:
    """Return STATE's archive with each entry changed."""
    out = io.BytesIO()
    with (
        zipfile.ZipFile(io.BytesIO(_saved(STATE))) as old,
        zipfile.ZipFile(out, "w", compression) as new,
    ):
        for entry in old.infolist():
            new.writestr(entry.filename, change(entry.filename, old.read(entry)))
    return out.getvalue()


def _pickle_of(text: bytes) -> bytes:
    return _rezipped(lambda name, data: text if name.endswith("data.pkl") else data)


def crafted_states(mark: Path) -> dict[str, bytes]:
    """Return states as an attacker would write them; `mark` is made by any that gets to run."""
    evil = Evil(mark)
    good = _saved(STATE)
    count = b"M" + (3000).to_bytes(2, "little")  # BININT2: the elements of w
    wide = _rezipped(lambda n, d: d.replace(count, b"J" + (1 << 30).to_bytes(4, "little"), 1))
    shape = count + b"\x85"  # TUPLE1: the shape of w
    assert good.count(shape) == 1
    return {
        "torch's legacy format": _saved({"w": evil}, legacy=True),
        "a bare pickle": pickle.dumps(evil),
        "a zip with os.system": _saved({**STATE, "facts": evil}),
        "in the optimizer's state": _saved({**STATE, "optimizer": {"state": {0: {"m": evil}}}}),
        "in the state of random numbers": _saved({**STATE, "rng": [evil]}),
        "a name torch itself would allow": _saved({**STATE, "p": torch.nn.Parameter(STATE["w"])}),
        "os.system by its opcodes": _pickle_of(
            b"\x80\x02cposix\nsystem\nX"
            + len(f"touch {mark}").to_bytes(4, "little")
            + f"touch {mark}".encode()
            + b"\x85R."
        ),
        "a stack global": _pickle_of(b"\x80\x04\x8c\x05posix\x8c\x06system\x93."),
        "an extension code": _pickle_of(b"\x80\x02\x82\x01."),
        "a wide memo": _pickle_of(b"\x80\x02}r\xff\xff\xff\x7f."),
        "a storage larger than its bytes": wide,
        "a tensor larger than its storage": _rezipped(
            lambda n, d: d.replace(shape, b"J" + (1 << 30).to_bytes(4, "little") + b"\x85")
        ),
        "a zip bomb": _rezipped(
            lambda n, d: d + b"\0" * (64 << 20) if n.endswith("data.pkl") else d,
            compression=zipfile.ZIP_DEFLATED,
        ),
        "no dictionary": _saved([1, 2]),
        "another archive": _rezipped(lambda n, d: d).replace(b"/version", b"/evil.py"),
        "no archive": b"\0" * 1000,
        "nothing": b"",
    }


def seal_state(path: Path, data: bytes) -> None:
    """Put crafted bytes into a checkpoint, with checksums that are right."""
    (path / "state.pt").write_bytes(data)
    (path / "manifest.json").write_bytes(
        manifest_bytes(step_of(path), len(data), hashlib.sha256(data).hexdigest())
    )


def crafted_files(folder: Path) -> Count:
    """Load every crafted state; each must be refused, none may run or take much memory."""
    mark, count = folder / "owned", Count()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for kind, data in crafted_states(mark).items():
        count.injected += 1
        try:
            load_state(data)
            count.missed.append(f"{kind}: loaded")
        except BadCheckpointError as bad:
            if "\n" in str(bad) or len(str(bad)) > 400:
                count.missed.append(f"{kind}: told in more than a line")
        if mark.exists():
            count.missed.append(f"{kind}: ran")
            mark.unlink()
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**10
    if grown > 256:
        count.missed.append(f"memory grew by {grown:.0f} MiB")
    return count
