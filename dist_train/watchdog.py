"""Start the node's monitor, which notices ranks that hang, and show it this rank's heartbeats.

The memory is anonymous (memfd): nothing is left of it, however the processes end. How it decides
is in monitor/verdict.py; what a rank may take in which phase, in monitor/limits.py.
"""

import contextlib
import faulthandler
import json
import mmap
import os
import secrets
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import dist_train
from dist_train.config import Config
from dist_train.distributed import Ranks
from dist_train.heartbeat import HERE, SLOT_BYTES, Identity, Pulse
from dist_train.layout import detect_layout
from dist_train.monitor.link import hub_socket
from dist_train.monitor.main import Settings
from dist_train.monitor.processes import read_stat
from dist_train.monitor.report import STACKS_SIGNAL, Place
from dist_train.preemption import SIGNALS, blocked

LEAVE_SEC = 0.5  # for the monitor to end with the last rank
# Not `-m`: neither the working directory nor site-packages may shadow a standard module.
PROGRAM = "import sys; sys.path.append({!r}); from dist_train.monitor.main import main; main()"


class _Home(NamedTuple):
    """What ranks tell each other to find their node's monitor."""

    node: str
    pid: int
    memory: int  # descriptor of heartbeats; those of the node's first rank are used
    port: int  # of rank 0: where its monitor will listen
    secret: str
    error: str | None


class _Own:
    """What this rank holds open while it is watched."""

    def __init__(self, ranks: Ranks, stack: contextlib.ExitStack) -> None:
        self.stacks = _memory("stacks", 0, stack)
        self.memory = _memory("heartbeats", ranks.world_size * SLOT_BYTES, stack)
        self.listener: socket.socket | None = None  # with several nodes, for rank 0's monitor
        if ranks.rank == 0 and ranks.local_world_size < ranks.world_size:
            self.listener = stack.enter_context(hub_socket())
        faulthandler.register(STACKS_SIGNAL, file=self.stacks, all_threads=True)
        stack.callback(faulthandler.unregister, STACKS_SIGNAL)
        if not faulthandler.is_enabled():  # a crash in C: the monitor can read them after it
            faulthandler.enable(file=self.stacks, all_threads=True)
            stack.callback(faulthandler.disable)


@contextlib.contextmanager
def watch(
    config: Config, ranks: Ranks, folder: Path, warn: Callable[[str], None]
) -> Iterator[Pulse]:
    """Watch all ranks until the end of the context. Collective.

    A rank that hangs is named in a report with the stacks of all (folder/log/hang-*.txt), in
    status.json and events.jsonl, and killed, so that the launcher restarts the run. A rank that
    is slow is named. Without a launcher and with somebody at the terminal it only reports.

    Args:
        config: guards.watchdog, guards.hang_sec and the timeouts of parallel.
        ranks: their `pulse` beats into the monitor's memory from here on.
        folder: the run's; need not exist on all machines.
        warn: told on every rank if one is not watched, and why.
    """
    pulse = ranks.pulse
    if not config.guards.watchdog:
        yield pulse
        return
    with contextlib.ExitStack() as stack:
        own, cause = None, None
        try:
            own = _Own(ranks, stack)
        except (OSError, RuntimeError, AttributeError) as error:  # not Linux, no descriptors left
            cause = str(error)
        homes = ranks.gather(_home(own, cause))
        try:
            if own is not None:
                _join(config, ranks, folder, homes, own, stack)
        except OSError as error:
            cause = str(error)
        for rank, told in enumerate(ranks.gather(cause)):
            if told is not None:
                warn(f"rank {rank} is not watched, it may hang unnoticed: {told}")
        yield pulse


def _join(
    config: Config,
    ranks: Ranks,
    folder: Path,
    homes: list[_Home],
    own: _Own,
    stack: contextlib.ExitStack,
) -> None:
    """Attach this rank's pulse to its node's monitor, which the node's first rank starts."""
    nodes = list(dict.fromkeys(home.node for home in homes))
    here = homes[ranks.rank].node
    mine = [rank for rank, home in enumerate(homes) if home.node == here]
    first = homes[mine[0]]
    if first.error is not None:
        raise OSError(f"rank {mine[0]} could not start the monitor ({first.error})")
    several = len(nodes) > 1 and homes[0].port > 0
    master = detect_layout(os.environ).master_addr
    if ranks.rank == mine[0]:
        settings = Settings(
            slots=len(mine),
            launcher=ranks.launcher,
            on_gpu=ranks.device.type == "cuda",
            may_end=ranks.launcher != "single" or not _somebody_is_there(),
            hang_sec=config.guards.hang_sec,
            start_sec=config.parallel.start_timeout_sec,
            step_sec=config.parallel.step_timeout_sec,
            secret=homes[0].secret,
            hub=(master, homes[0].port) if several else None,
            is_hub=ranks.rank == 0,
        )
        place = Place(
            folder=str(folder.absolute()),
            host=socket.gethostname(),
            attempt=ranks.attempt,
            chain=ranks.chain,
            node=nodes.index(here),
            nodes=len(nodes),
        )
        stack.enter_context(_monitor(settings, place, own))
    with open(f"/proc/{first.pid}/fd/{first.memory}", "r+b", buffering=0) as file:
        memory = mmap.mmap(file.fileno(), len(mine) * SLOT_BYTES)
    stat = read_stat(os.getpid())
    assert stat is not None, "this process lives"
    identity = Identity(HERE, ranks.rank, os.getpid(), stat.started, own.stacks)
    on_gpu = ranks.device.type == "cuda"
    ranks.pulse.attach(memory, mine.index(ranks.rank), identity, on_gpu=on_gpu)
    stack.callback(ranks.pulse.leave)


@contextlib.contextmanager
def _monitor(settings: Settings, place: Place, own: _Own) -> Iterator[None]:
    """Run the monitor's process; at the end it gets a moment to leave by itself."""
    hub = own.listener.fileno() if own.listener is not None and settings.hub is not None else None
    program = PROGRAM.format(str(Path(dist_train.__file__).parents[1]))
    # The mask is inherited: what a launcher sends to all processes of a rank does not end it.
    with blocked((*SIGNALS, signal.SIGHUP)):
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", program],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            pass_fds=[own.memory, *([hub] if hub is not None else [])],
            start_new_session=True,
        )
    assert process.stdin is not None, "asked for"
    told = {
        "settings": settings._asdict(),
        "place": place._asdict(),
        "memory": own.memory,
        "hub": hub,
    }
    try:
        process.stdin.write(json.dumps(told).encode() + b"\n")
        process.stdin.flush()
        yield
    finally:
        with contextlib.suppress(OSError):  # it is gone
            process.stdin.close()  # wakes it up
        try:
            process.wait(LEAVE_SEC)
        except subprocess.TimeoutExpired:
            process.returncode = 0  # it goes with the node's last rank: no longer this one's


def _home(own: _Own | None, cause: str | None) -> _Home:
    node = os.environ.get("GROUP_RANK", os.environ.get("SLURM_NODEID", ""))
    return _Home(
        node=f"{socket.gethostname()}/{node}",
        pid=os.getpid(),
        memory=-1 if own is None else own.memory,
        port=0 if own is None or own.listener is None else own.listener.getsockname()[1],
        secret=secrets.token_hex(16),
        error=cause,
    )


def _memory(name: str, size: int, stack: contextlib.ExitStack) -> int:
    """Return the descriptor of memory without a name in any folder; closed with `stack`."""
    descriptor = os.memfd_create(f"dist_train-{name}")
    stack.callback(os.close, descriptor)
    os.ftruncate(descriptor, size)
    return descriptor


def _somebody_is_there() -> bool:
    """Say whether a person may be looking at this process: a terminal, a prompt, a notebook."""
    return os.isatty(0) or hasattr(sys, "ps1") or "IPython" in sys.modules
