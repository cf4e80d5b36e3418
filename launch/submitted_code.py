"""The code that a job runs: its git state when it was submitted, and a copy of it on request."""

import hashlib
import os
import re
import shutil
import subprocess
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from dist_train.config import ConfigError
from launch.job_record import FOLDER, JOBS_DIR, LOCK, GitState

INSTALLED = Path(__file__).resolve().parents[1]  # where launch and dist_train are imported from
SNAPSHOT = re.compile(r"\d{8}-\d{6}-\d+-code")  # as Snapshot calls its folder
CODE_SUFFIXES = (".py", ".yaml", ".yml", ".toml", ".json", ".sh", ".sbatch")
MAX_CODE_BYTES = 1 << 20  # of one file: a larger one is data
MAX_SNAPSHOT_BYTES = 1 << 30
GIT_SEC = 60.0


def git_states(jobs_dir: Path) -> tuple[GitState, ...]:
    """Return the state of the current folder's working tree, and of dist_train's if another."""
    return tuple(git_state(root, jobs_dir) for root in _roots())


def git_state(root: Path, jobs_dir: Path) -> GitState:
    """Return what a working tree holds now: its commit, and a hash of what differs from that.

    Files that git does not know count if they are code; what jobs write does not.
    """
    commit = (_git(root, "rev-parse", "--verify", "--quiet", "HEAD") or b"").decode().strip()
    diff = _git(root, "diff", "--no-ext-diff", "--binary", "HEAD") if commit else b""
    digest, dirty = hashlib.sha256(diff or b""), bool(diff)
    for path in _without_output(root, _files(root, "-o"), jobs_dir):
        whole = root / path
        if path.suffix in CODE_SUFFIXES and whole.is_file() and _size(whole) <= MAX_CODE_BYTES:
            digest.update(f"\0{path}\0".encode() + whole.read_bytes())
            dirty = True
    return GitState(
        root=str(root),
        commit=commit,
        dirty=dirty,
        diff_sha256=digest.hexdigest() if dirty else "",
    )


def changes_since(states: tuple[GitState, ...], jobs_dir: Path) -> list[str]:
    """Return a sentence for each working tree that is not as it was; nothing without git."""
    sentences = []
    for then in states:
        root = Path(then.root)
        if _git(root, "rev-parse", "--show-toplevel") is None:
            continue
        now = git_state(root, jobs_dir)
        if (now.commit, now.diff_sha256) != (then.commit, then.diff_sha256):
            sentences.append(
                f"the code in {root} has changed since this job was submitted ({_shown(then)}, "
                f"now {_shown(now)}): the job runs what is there now (submit --snapshot keeps a "
                "copy)"
            )
    return sentences


class Snapshot:
    """A copy of the working trees' files, and where the job finds in it what it imports."""

    def __init__(self, jobs_dir: Path) -> None:
        """Plan the copy; nothing is written.

        Raises:
            ConfigError: the current folder is under no git, or the files are too many bytes.
        """
        here = Path.cwd().resolve()
        if _top_of(here) is None:
            raise ConfigError(
                f"--snapshot copies the files that git lists, and {here} is in no git repository "
                "(or git is missing): run `git init` there, or leave --snapshot out"
            )
        stamp = time.strftime("%Y%m%d-%H%M%S")
        self.folder = jobs_dir.absolute() / f"{stamp}-{os.getpid()}-code"
        self._copies = {root: self.folder / str(n) / root.name for n, root in enumerate(_roots())}
        self._files = {
            root: list(_without_output(root, _files(root, "-co"), jobs_dir))
            for root in self._copies
        }
        sizes = [_size(root / path) for root, paths in self._files.items() for path in paths]
        if sum(sizes) > MAX_SNAPSHOT_BYTES:
            largest = max(
                (root / path for root, paths in self._files.items() for path in paths), key=_size
            )
            raise ConfigError(
                f"--snapshot would copy {sum(sizes) / 2**30:.1f} GiB, more than "
                f"{MAX_SNAPSHOT_BYTES / 2**30:.0f} GiB of code: let .gitignore name the data (the "
                f"largest file is {largest})"
            )

    def take(self) -> None:
        """Copy the files. Raises OSError."""
        for root, copy in self._copies.items():
            for path in self._files[root]:
                (copy / path).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(root / path, copy / path, follow_symlinks=False)

    def environment(self, before: Mapping[str, str]) -> dict[str, str]:
        """Return the variables with which Python imports from the copy and not from here.

        Args:
            before: the environment now: what PYTHONPATH names here is found in the copy.
        """
        named = [Path(entry or ".") for entry in before.get("PYTHONPATH", "").split(os.pathsep)]
        folders = [Path.cwd(), *(named if before.get("PYTHONPATH") else []), INSTALLED]
        copies = [copy for folder in folders if (copy := self.copy_of(folder)) is not None]
        path = os.pathsep.join(str(copy) for copy in dict.fromkeys(copies))
        return {"PYTHONPATH": path, "PYTHONSAFEPATH": "1"}

    def copy_of(self, path: Path) -> Path | None:
        """Return where the copy of a file or folder is; None if it has none."""
        path = path.resolve()
        for root, copy in self._copies.items():
            if path.is_relative_to(root):
                wanted = path.relative_to(root)
                if any(file.is_relative_to(wanted) for file in self._files[root]):
                    return copy / wanted
        return None


def _roots() -> list[Path]:
    """Return the working trees that a job imports from: the current folder's, dist_train's."""
    here = _top_of(Path.cwd())
    # An installed package in an environment inside of somebody's working tree is none of it.
    is_checkout = _git(INSTALLED, "ls-files", "launch/__init__.py")
    ours = _top_of(INSTALLED) if is_checkout else None
    return list(dict.fromkeys(root for root in (here, ours) if root is not None))


def _top_of(folder: Path) -> Path | None:
    top = _git(folder, "rev-parse", "--show-toplevel")
    return Path(os.fsdecode(top).rstrip("\n")).resolve() if top else None


def _files(root: Path, which: str) -> Iterator[Path]:
    """Yield the files of a working tree, those of its submodules too, relative to it."""
    listed = _git(root, "ls-files", which, "--exclude-standard", "-z") or b""
    for name in filter(None, dict.fromkeys(listed.split(b"\0"))):  # a conflict is listed thrice
        path = Path(os.fsdecode(name))
        if (root / path).is_dir() and not (root / path).is_symlink():
            yield from (path / inner for inner in _files(root / path, which))
        elif (root / path).is_symlink() or (root / path).exists():  # it may be deleted
            yield path


def _without_output(root: Path, files: Iterator[Path], jobs_dir: Path) -> Iterator[Path]:
    """Yield those that no job wrote: not below a folder of jobs, not in the folder of a run."""
    paths = list(files)
    written = {path.parent for path in paths if path.name == "environment.json"}
    # Another folder of jobs than this one's, by what submit leaves there, and copies of the code.
    written |= {path.parents[1] for path in paths if path.parts[-2:] == (FOLDER, LOCK)}
    written |= {
        parent for path in paths for parent in path.parents if SNAPSHOT.fullmatch(parent.name)
    }
    jobs = [jobs_dir.resolve(), JOBS_DIR.resolve()]
    for path in paths:
        below = any((root / path).is_relative_to(folder) for folder in jobs)
        if not below and written.isdisjoint(path.parents):
            yield path


def _size(path: Path) -> int:
    return path.lstat().st_size


def _shown(state: GitState) -> str:
    commit = f"commit {state.commit[:8]}" if state.commit else "no commit"
    return f"{commit} with changes {state.diff_sha256[:8]}" if state.dirty else commit


def _git(folder: Path, *words: str) -> bytes | None:
    """Return what git says; None if it fails, is missing, or this is none of its folders."""
    command = ["git", "--no-optional-locks", "-C", str(folder), *words]
    try:
        return subprocess.run(
            command, capture_output=True, timeout=GIT_SEC, check=True, stdin=subprocess.DEVNULL
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return None
