"""Run one peer once, in a session of its own; whatever becomes of it, nothing of it is left."""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.intervals import ROOT
from benchmarks.peers.records import Cell, Outcome

LIMIT_SEC = 600.0
# An exception as Python prints it, after torchrun's prefix of a rank; not torchrun's own summary.
RAISED = re.compile(r"^(?:\[rank\d+\]:\s*)?((?!.*ChildFailedError)[\w.]+(?:Error|Exception)\b.*)")


def run_once(python: str, peer: str, cell: Cell, *, limit_sec: float = LIMIT_SEC) -> Outcome:
    """Return the means over the ranks of a run, or why it failed."""
    folder = Path(tempfile.mkdtemp(prefix="peers-"))
    output = folder / "output.txt"
    start = ["-m", "benchmarks.peers.worker"]
    if cell.ranks > 1:
        launcher = ["-m", "torch.distributed.run", "--standalone"]
        start = [*launcher, f"--nproc-per-node={cell.ranks}", *start]
    words = [peer, "--case", cell.case, "--precision", cell.precision, "--style", cell.style]
    words += ["--folder", str(folder), "--begun", str(time.time())]
    with output.open("w") as file:
        process = subprocess.Popen(
            [python, *start, *words],
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"},
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        code = process.wait(limit_sec)
        results = [json.loads(path.read_text()) for path in sorted(folder.glob("rank*.json"))]
        failed = None
        if code != 0:
            failed = reason_in(output.read_text(errors="replace")) or f"ended with {code}"
        elif len(results) != cell.ranks:
            failed = f"{len(results)} of {cell.ranks} ranks left a result"
        elif len({r["weights_sha256"] for r in results}) > 1:
            failed = "the weights of its ranks differ"
    except subprocess.TimeoutExpired:
        results, failed = [], f"not done within {limit_sec:.0f} s"
    finally:
        _end(process, folder)
        told = output.read_text(errors="replace")
        shutil.rmtree(folder, ignore_errors=True)  # our monitor may be writing its last report
    if failed is not None:
        print(f"{told[-3000:]}\n{peer}: {failed}", file=sys.stderr, flush=True)
        return Outcome(failed=failed)
    values = {
        key: sum(r[key] for r in results) / cell.ranks
        for key, value in results[0].items()
        if isinstance(value, float)
    }
    return Outcome(values=values, weights_sha256=results[0]["weights_sha256"])


def reason_in(output: str) -> str | None:
    """Return the first exception that was printed: that of the rank which failed first."""
    found = next(filter(None, map(RAISED.match, output.splitlines())), None)
    return found[1][:200] if found else None


def _end(process: subprocess.Popen[bytes], folder: Path) -> None:
    """Kill all that still runs: torchrun gives each rank a session of its own, too."""
    while groups := _groups_naming(folder):
        for group in groups:
            _kill_group(group)
        time.sleep(0.05)
    _kill_group(process.pid)  # what it started without naming the folder
    process.wait()


def _kill_group(group: int) -> None:
    with contextlib.suppress(ProcessLookupError):  # it ended meanwhile
        os.killpg(group, signal.SIGKILL)


def _groups_naming(folder: Path) -> set[int]:
    """Return the process groups with a process whose command line names the folder."""
    found = set()
    for line in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if str(folder).encode() in line.read_bytes().split(b"\0"):
                found.add(os.getpgid(int(line.parent.name)))
        except OSError:
            continue  # it ended meanwhile
    return found
