"""Row N1: two machines whose network is cut, slow or lossy."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from benchmarks.reliability.cable import ADDRESSES, DEVICE, Cable, why_no_cable
from benchmarks.reliability.clean import events_of, status_of, summary_of
from benchmarks.reliability.in_ranks import last_step, wait_until
from benchmarks.reliability.in_torchrun import REPOSITORY, kill_all
from benchmarks.reliability.row import Row, Trial, check
from benchmarks.reliability.rows_crash import HARD, SHORT
from tests.settings import SMALL

KINDS = ("cut of 3 s", "cut of 60 s", "delay of 100 ms", "loss of 5 %")
LONG = (*HARD, "train.steps=300", "checkpoint.every_steps=20", "optim.schedule=constant")
NOTICED_SEC = 10.0
PORT = 29400  # in namespaces of their own every port is free


def n1(trial: Trial) -> float | None:
    """Train on two nodes while the cable between them does one of four things."""
    kind = trial.one_of(KINDS)
    run = trial.folder / "run"
    cut_sec = float(kind.split()[2]) if kind.startswith("cut") else 0.0
    words = LONG if cut_sec else SHORT
    noticed = None
    begin = time.monotonic()
    with Cable(trial.seed) as cable:
        cable.delay_sec = 0.1 if kind.startswith("delay") else 0.0
        cable.loss = 0.05 if kind.startswith("loss") else 0.0
        with _nodes(trial, cable, words) as nodes:
            step = trial.dice.randrange(5, 200 if cut_sec else 40)
            trial.notes["step"] = step
            wait_until(lambda: last_step(run) >= step, f"no step {step}", 120.0)
            if cut_sec:
                cable.cut, since = True, time.time()
                wait_until(lambda: time.time() >= since + cut_sec, "the cut", cut_sec + 5.0)
                cable.cut = False
                hangs = events_of(run, "hang")
                trial.notes["hangs"] = [event["reason"][:100] for event in hangs]
                noticed = hangs[0]["time"] - since if hangs else None
            _wait(nodes, 150.0)
            codes = [node.returncode for node in nodes]
        trial.fired = not (kind.startswith(("cut", "loss")) and cable.num_lost == 0)
        trial.notes |= {"packets_lost": cable.num_lost, "exit_codes": codes}
        if cut_sec == 60.0 and codes != [0, 0]:  # as a scheduler, or a user, would
            with _nodes(trial, cable, words) as nodes:
                _wait(nodes, 90.0)
                codes = [node.returncode for node in nodes]
                trial.notes["started_again"] = codes
    check(codes == [0, 0], f"exit codes {codes}: {status_of(run)}")
    if cut_sec == 60.0:
        check(noticed is not None, "a cut of 60 s was not noticed")
        check((noticed or 0.0) <= NOTICED_SEC, f"noticed after {noticed:.1f} s")
    else:
        resumed = events_of(run, "resumed")
        check(not resumed, f"{kind} cost {len(resumed)} restarts: {trial.notes}")
    check(summary_of(run).get("state") == "finished", str(status_of(run)))
    difference = trial.clean.difference(run, 2, words)
    check(difference is None, str(difference))
    return noticed if noticed is not None else time.monotonic() - begin


@contextmanager
def _nodes(
    trial: Trial, cable: Cable, words: tuple[str, ...]
) -> Iterator[list["subprocess.Popen[bytes]"]]:
    """Start torchrun on both nodes by the same command."""
    run = trial.folder / "run"
    number = len(list(trial.folder.glob("node0.*")))
    nodes = []
    with ExitStack() as stack:
        for end, address in enumerate(ADDRESSES):
            command = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2"]
            command += ["--nproc-per-node=1", "--max-restarts=5", "--rdzv-backend=c10d"]
            command += [f"--rdzv-endpoint={ADDRESSES[0]}:{PORT}", f"--rdzv-id={number}"]
            command += [f"--rdzv-conf=is_host={1 - end}", f"--local-addr={address}"]
            command += ["-m", "dist_train", *SMALL, *words, f"run_dir={run}"]
            env = os.environ | {"PYTHONPATH": str(REPOSITORY), "GLOO_SOCKET_IFNAME": DEVICE}
            env.pop("OMP_NUM_THREADS", None)
            file = stack.enter_context((trial.folder / f"node{end}.{number}").open("wb"))
            nodes.append(
                subprocess.Popen(
                    [*cable.command(end), *command],
                    cwd=REPOSITORY,
                    env=env,
                    stdout=file,
                    stderr=file,
                    process_group=0,
                )
            )
        try:
            yield nodes
        finally:
            kill_all(run)
            for node in nodes:
                node.kill()
                node.wait()


def _wait(nodes: list["subprocess.Popen[bytes]"], seconds: float) -> None:
    """Wait until both have ended, or for `seconds`."""
    end = time.monotonic() + seconds
    while any(node.poll() is None for node in nodes) and time.monotonic() < end:
        time.sleep(0.1)


ROWS = (
    Row(
        id="N1",
        promise="a short cut of the network is survived, a long one is noticed within 10 s, and "
        "the run resumes when it heals; delay and loss change no bit",
        injection=f"{', '.join(KINDS)} between two network namespaces",
        num_trials=12,
        measures="to the notice, or the whole run",
        work=n1,
        limit_sec=400.0,
        needs="root and /dev/net/tun",
        cannot_run=why_no_cable,
    ),
)
