"""Rows U1 and L1: the mistakes of users, and what a long run leaks."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from benchmarks.reliability.in_torchrun import REPOSITORY, Tree, launched, send
from benchmarks.reliability.row import Row, Trial, check

PAGE = os.sysconf("SC_PAGE_SIZE")
SAMPLES = 150  # of a short run; a long one takes one a second
RSS_SLOPE_MIB_PER_MIN = 1.0  # of the whole tree, after the first quarter
QUIET = {"started", "saved"}  # the events of a run that nothing happens to


def u1(trial: Trial) -> float | None:
    """One of the mistakes that users make, through the real command."""
    from tests.mistakes import MISTAKES, NO_GPU
    from tests.test_mistakes import BEFORE_THE_START

    known = [*BEFORE_THE_START, *MISTAKES]
    name = known[trial.seed % len(known)]
    trial.notes["mistake"] = name
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)} | NO_GPU
    if name in BEFORE_THE_START:
        words, cure = BEFORE_THE_START[name]
        words, told, lines = ["--nproc=2", *words], (cure,), 1
    else:
        mistake = MISTAKES[name]
        words, told = ["--nproc=2", *mistake.prepare(trial.folder)], mistake.told
        environment |= mistake.env
        lines = mistake.lines
    begin = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "launch.cli", "run", *words],
        cwd=trial.folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    sec = time.monotonic() - begin
    trial.fired = done.returncode != 0
    check(done.returncode == 2, f"exit code {done.returncode}: {done.stderr[-300:]}")
    check(done.stderr.count("\n") == lines, f"not {lines} lines: {done.stderr[-400:]!r}")
    for part in told:
        check(part in done.stderr, f"{part!r} is not in {done.stderr!r}")
    return sec


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """What a tree of processes holds at one time."""

    sec: float
    rss_mib: float
    files: int
    threads: int
    zombies: int


def l1(trial: Trial) -> float | None:
    """Train for a long time with evaluations, saves and loader workers; then kill all of it."""
    minutes = trial.options.minutes or 30.0
    words = ("model.factory=tests.nets:noisy_net", "train.steps=100000000", "log_every=10")
    words += ("data.loader=workers", "data.num_workers=1", "data.image_size=12")
    words += ("checkpoint.every_steps=50", "eval.every_steps=100", "optim.schedule=constant")
    before = set(os.listdir("/dev/shm"))
    with launched(trial, words, nproc=2) as tree:
        tree.wait_for_step(100)
        trial.fired = True
        begin, samples = time.monotonic(), []
        # A third of the samples must see more than one evaluation: its workers come and go.
        pause = min(1.0, 60.0 * minutes / SAMPLES)
        while time.monotonic() - begin < 60.0 * minutes:
            check(tree.process.poll() is None, f"the run ended: {tree.tail()}")
            samples.append(_sample(tree, time.monotonic() - begin))
            time.sleep(pause)
        kinds = {json.loads(line)["event"] for line in (tree.run_dir / "events.jsonl").open()}
        for pid in tree.pids():
            send(pid, signal.SIGKILL)
        orphans = tree.orphans()
        check(not orphans, f"processes are left: {orphans}")
    left = set(os.listdir("/dev/shm")) - before
    late = samples[len(samples) // 4 :]
    slope = _slope([s.sec / 60 for s in late], [s.rss_mib for s in late])
    trial.notes |= {
        "minutes": minutes,
        "rss_mib": f"{late[0].rss_mib:.0f} to {late[-1].rss_mib:.0f}",
        "rss_mib_per_min": round(slope, 3),
        "files": f"{min(s.files for s in late)} to {max(s.files for s in late)}",
        "threads": f"{min(s.threads for s in late)} to {max(s.threads for s in late)}",
        "zombies": max(s.zombies for s in late),
        "left_in_dev_shm": len(left),
    }
    check(kinds <= QUIET, f"alarms in a run that nothing happened to: {sorted(kinds - QUIET)}")
    check(not left, f"{len(left)} files are left in /dev/shm: {sorted(left)[:3]}")
    check(max(s.zombies for s in late) == 0, "zombies")
    for what in ("files", "threads"):
        counts = [getattr(s, what) for s in late]
        third = len(counts) // 3
        grown = min(counts[-third:]) - max(counts[:third])
        check(grown <= 0, f"{what} grew by {grown} or more")
    check(
        minutes < 5 or slope <= RSS_SLOPE_MIB_PER_MIN, f"memory grows by {slope:.2f} MiB a minute"
    )
    return 60.0 * minutes


def _sample(tree: Tree, sec: float) -> Sample:
    rss, files, threads, zombies = 0, 0, 0, 0
    living = set(tree.pids())
    for pid in living:
        with contextlib.suppress(OSError, ValueError, IndexError):  # it may just have ended
            folder = Path("/proc") / str(pid)
            rss += int((folder / "statm").read_text().split()[1]) * PAGE
            files += len(os.listdir(folder / "fd"))
            threads += len(os.listdir(folder / "task"))
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                state, parent = (entry / "stat").read_text().rpartition(")")[2].split()[:2]
                zombies += state == "Z" and int(parent) in living
    return Sample(
        sec=sec,
        rss_mib=rss / 2**20,
        files=files,
        threads=threads,
        zombies=zombies,
    )


def _slope(x: list[float], y: list[float]) -> float:
    """Return the least-squares slope."""
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    top = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
    return top / max(1e-12, sum((a - mean_x) ** 2 for a in x))


ROWS = (
    Row(
        id="U1",
        promise="every common mistake is answered by a line or a few that name the cure, and exit "
        "code 2",
        injection="a misspelt key, a wrong type, a missing folder, another model's checkpoint ...",
        num_trials=66,
        measures="to the answer",
        work=u1,
    ),
    Row(
        id="L1",
        promise="a long run grows in memory, files, threads or zombies by nothing, raises no false "
        "alarm, and killed leaves nothing in /dev/shm",
        injection="30 minutes of steps, evaluations and saves; then kill -9",
        num_trials=1,
        measures="the run",
        work=l1,
        small_minutes=0.5,
        limit_sec=7200.0,
    ),
)
