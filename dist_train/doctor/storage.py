"""What the run folder's file system does: locks, renames, syncs, speed, and what others see of it.

Rank 0 works on the folder and the first rank of each other node looks at it, in two steps: what
has to be missed before it is there, and the rest. Imports no torch.
"""

import errno
import fcntl
import os
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from dist_train.checkpoint_folder import STATE_FILE, list_checkpoints
from dist_train.config.whole_file import write_atomically

FILE_BYTES, QUICK_FILE_BYTES = 64 << 20, 8 << 20
BLOCK = b"\xa5" * (1 << 20)
SYNCS = 10
VISIBLE_SEC = 10.0  # how long another node waits for a new file
RENAMING_SEC = 1.0
CONTENTS = ["a" * 8192, "b" * 8192]  # of a file that is replaced by rename: never half of each
LOCK_CHILD = """import errno, fcntl, sys
with open(sys.argv[1], "ab") as file:
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        sys.exit(1 if error.errno in (errno.EAGAIN, errno.EACCES) else 3)
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Disk:
    """The file system as rank 0 finds it."""

    folder: str
    kind: str  # such as nfs4 (rw,local_lock=all)
    free_bytes: int
    total_bytes: int
    free_files: int
    num_files: int  # 0: it does not count them
    checkpoint_bytes: int  # of the newest one in the run's folder; 0: none yet
    written_bytes: int = 0
    write_sec: float = 0.0  # sync included
    sync_sec: float = 0.0  # median of a small write and its sync
    lock_error: str = ""  # why there is no lock
    neighbour_got_lock: bool | None = None  # another process here; None: not tried
    error: str = ""
    errno: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class View:
    """The same file system as a rank sees it: on another node, or on rank 0's."""

    rank: int
    node: str
    is_same: bool  # rank 0's file is here
    seen_after_sec: float | None = None  # a new file; None: not within VISIBLE_SEC
    got_lock: bool | None = None  # that rank 0 holds; None: not tried, or rank 0 has none
    lock_error: str = ""
    reads: int = 0  # of the file that was being replaced
    torn: int = 0
    gone: int = 0  # there was no file of its name for a moment
    stale: int = 0  # NFS said ESTALE
    read_bytes_per_sec: float | None = None
    error: str = ""


class Disturber:
    """Rank 0's hold on the folder: a lock, and a thread that replaces a file again and again."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._lock: IO[bytes] | None = None

    def prepare(self, run_dir: Path, *, quick: bool) -> Disk:
        """Write the files that the others will look at, and measure."""
        space = os.statvfs(self._folder.parent)
        fields: dict[str, object] = {
            "folder": str(self._folder.parent),
            "kind": kind_of(self._folder.parent, Path("/proc/self/mountinfo").read_text()),
            "free_bytes": space.f_bavail * space.f_frsize,
            "total_bytes": space.f_blocks * space.f_frsize,
            "free_files": space.f_favail,
            "num_files": space.f_files,
            "checkpoint_bytes": _newest_checkpoint_bytes(run_dir),
        }
        try:
            self._folder.mkdir(exist_ok=True)
            self._hold(fields)
            write_atomically(self._folder / "token", "here")
            write_atomically(self._folder / "replaced", CONTENTS[0])
            fields["sync_sec"] = _sync_sec(self._folder / "synced")
            size = QUICK_FILE_BYTES if quick else FILE_BYTES
            fields["write_sec"] = _write(self._folder / "large", size)
            fields["written_bytes"] = size
        except OSError as error:
            fields |= {"error": error.strerror or str(error), "errno": error.errno or 0}
        return Disk(**fields)  # type: ignore[arg-type] # by name, as above

    def show_new_file(self) -> bool:
        """Make the file that the others have missed so far; says whether it could."""
        try:
            (self._folder / "new").touch()
        except OSError:
            return False
        return True

    def replace_for_a_while(self) -> None:
        """Replace a file by rename from now on, for RENAMING_SEC."""
        threading.Thread(target=self._replace, daemon=True).start()

    def release(self) -> None:
        """Let the lock go."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def _hold(self, fields: dict[str, object]) -> None:
        path = self._folder / "lock"
        self._lock = path.open("ab")
        try:
            fcntl.lockf(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            fields["lock_error"] = error.strerror or str(error)
            return
        command = [sys.executable, "-c", LOCK_CHILD, str(path)]
        done = subprocess.run(command, timeout=30, capture_output=True, check=False)
        fields["neighbour_got_lock"] = {0: True, 1: False}.get(done.returncode)

    def _replace(self) -> None:
        end = time.monotonic() + RENAMING_SEC
        number = 0
        while time.monotonic() < end:
            number += 1
            try:
                write_atomically(self._folder / "replaced", CONTENTS[number % 2])
            except OSError:  # full: the readers find the old one
                return


def miss(folder: Path) -> None:
    """Look for the file that is not there yet: a node may remember that it is not."""
    (folder / "new").exists()


def view(folder: Path, rank: int, node: str, *, holds_lock: bool) -> View:
    """Look at rank 0's files; the new one is there already when this is called."""
    began = time.monotonic()
    if not (folder / "token").exists():
        return View(rank=rank, node=node, is_same=False)
    fields: dict[str, object] = {"rank": rank, "node": node, "is_same": True}
    try:
        while time.monotonic() - began < VISIBLE_SEC:
            if (folder / "new").exists():
                fields["seen_after_sec"] = time.monotonic() - began
                break
            time.sleep(0.02)
        _read_replaced(folder / "replaced", fields, RENAMING_SEC / 2)
        if rank != 0 and holds_lock:
            _try_lock(folder / "lock", fields)
        if rank != 0:
            fields["read_bytes_per_sec"] = _read(folder / "large")
    except OSError as error:
        fields["error"] = error.strerror or str(error)
    return View(**fields)  # type: ignore[arg-type] # by name, as above


def kind_of(folder: Path, mounts: str) -> str:
    """Return the type and options of a folder's file system, from /proc/self/mountinfo's text."""
    best, kind = "", "unknown"
    place = str(folder.resolve())
    for line in mounts.splitlines():
        words = line.split()
        if "-" not in words:
            continue
        point, rest = words[4], words[words.index("-") + 1 :]
        inside = place == point or place.startswith(point.rstrip("/") + "/")
        if inside and len(point) >= len(best):
            locks = [w for w in rest[2].split(",") if "lock" in w] if len(rest) > 2 else []
            best, kind = point, " ".join([rest[0], *locks])
    return kind


def _newest_checkpoint_bytes(run_dir: Path) -> int:
    for path in list_checkpoints(run_dir / "checkpoints"):  # newest first
        try:
            return (path / STATE_FILE).stat().st_size
        except OSError:
            continue
    return 0


def _sync_sec(path: Path) -> float:
    times = []
    with path.open("wb") as file:
        for _ in range(SYNCS):
            began = time.perf_counter()
            file.write(b"x" * 4096)
            file.flush()
            os.fsync(file.fileno())
            times.append(time.perf_counter() - began)
    return sorted(times)[len(times) // 2]


def _write(path: Path, size: int) -> float:
    began = time.perf_counter()
    with path.open("wb", buffering=0) as file:
        for _ in range(size // len(BLOCK)):
            if file.write(BLOCK) != len(BLOCK):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        os.fsync(file.fileno())
    return time.perf_counter() - began


def _read(path: Path) -> float | None:
    if not path.exists():
        return None
    size, began = 0, time.perf_counter()
    with path.open("rb", buffering=0) as file:
        while block := file.read(len(BLOCK)):
            size += len(block)
    return size / max(1e-9, time.perf_counter() - began)


def _read_replaced(path: Path, fields: dict[str, object], seconds: float) -> None:
    counts = {"reads": 0, "torn": 0, "gone": 0, "stale": 0}
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        counts["reads"] += 1
        try:
            counts["torn"] += path.read_text() not in CONTENTS
        except OSError as error:
            counts["stale" if error.errno == errno.ESTALE else "gone"] += 1
        time.sleep(0.001)
    fields |= counts


def _try_lock(path: Path, fields: dict[str, object]) -> None:
    with path.open("ab") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            fields["got_lock"] = True
        except OSError as error:
            if error.errno in (errno.EAGAIN, errno.EACCES):
                fields["got_lock"] = False
            else:
                fields["lock_error"] = error.strerror or str(error)
