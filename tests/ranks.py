"""Run a function on N gloo ranks, in processes forked from a server that has torch loaded."""

import contextlib
import faulthandler
import io
import itertools
import multiprocessing
import os
import pickle
import signal
import socket
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

FORKSERVER = multiprocessing.get_context("forkserver")
PRELOAD = [
    *("torch", "torch.distributed", "torchvision"),
    *("dist_train.train", "tests.nets", "tests.faults"),
]
FORKSERVER.set_forkserver_preload(PRELOAD)

FIRST_PORT, NUM_PARTS, PORTS_EACH = 10_000, 40, 500  # Linux's outgoing ones begin at 32,768
OFFSETS = itertools.cycle(range(1, PORTS_EACH))
HELD: list[socket.socket] = []


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """How one rank ended."""

    value: Any = None
    error: BaseException | None = None
    trace: str = ""
    at: float = 0.0
    exit_code: int | None = None  # negative: the signal that killed it


def run_ranks(
    work: Callable[..., Any], world_size: int, *args: Any, timeout_sec: float = 120.0
) -> list[Any]:
    """Return what `work(*args)` returns on each rank; raise the earliest failure.

    world_size 0 is one process without any launcher's variables.
    """
    outcomes = start_ranks_of(work, world_size, *args, timeout_sec=timeout_sec)
    failed = sorted((o for o in outcomes if o.exit_code != 0 or o.error), key=lambda o: o.at)
    if failed:
        first = failed[0]
        raise AssertionError(f"a rank failed with {first.exit_code}:\n{first.trace}")
    return [o.value for o in outcomes]


def start_ranks_of(
    work: Callable[..., Any],
    world_size: int,
    *args: Any,
    timeout_sec: float = 120.0,
    env: dict[str, str] | None = None,
) -> list[Outcome]:
    """Return how each rank ended, killed ones included."""
    port = free_port()
    ranks = []
    for rank in range(max(1, world_size)):
        receiver, sender = FORKSERVER.Pipe(duplex=False)
        variables = dict(env or {})
        if world_size:
            variables |= {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(world_size),
                "LOCAL_WORLD_SIZE": str(world_size),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
            }
        stacks = tempfile.NamedTemporaryFile(prefix="stacks-", mode="r")  # noqa: SIM115 # below
        dump = (stacks.name, 0.9 * timeout_sec)
        process = FORKSERVER.Process(target=_rank, args=(sender, variables, dump, work, args))
        process.start()
        sender.close()
        ranks.append((process, receiver, stacks))
    end = time.monotonic() + timeout_sec
    outcomes = []
    for process, receiver, stacks in ranks:
        message = b""
        if receiver.poll(max(0.0, end - time.monotonic())):
            with contextlib.suppress(EOFError):
                message = receiver.recv_bytes()
        process.join(max(0.1, end - time.monotonic()))
        if process.is_alive():
            assert process.pid is not None
            os.kill(process.pid, signal.SIGKILL)
            process.join()
        hung = (None, None, stacks.read(), 0.0)  # where every thread of it was
        stacks.close()
        value, error, trace, at = pickle.loads(message) if message else hung
        outcomes.append(
            Outcome(value=value, error=error, trace=trace, at=at, exit_code=process.exitcode)
        )
    return outcomes


class _OnHost(pickle.Pickler):
    """Takes tensors from a GPU, which may not be the receiver's to use."""

    def reducer_override(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor) and value.is_cuda:
            return value.detach().cpu().__reduce_ex__(pickle.HIGHEST_PROTOCOL)
        return NotImplemented


def dumped(value: Any) -> bytes:
    """Return a pickle whose tensors are on the CPU."""
    file = io.BytesIO()
    _OnHost(file, pickle.HIGHEST_PROTOCOL).dump(value)
    return file.getvalue()


def free_port() -> int:
    """Return a port that nobody else takes before it is used.

    Below the range that outgoing connections take theirs from, and from a part of that which this
    process has for itself: it holds the part's first port.
    """
    if not HELD:
        HELD.append(_hold_part())
    first = HELD[0].getsockname()[1]
    for _ in range(PORTS_EACH):
        with socket.socket() as probe, contextlib.suppress(OSError):
            port = first + next(OFFSETS)
            probe.bind(("127.0.0.1", port))
            return port
    raise AssertionError(f"ports {first} to {first + PORTS_EACH - 1} are all taken")


def _hold_part() -> socket.socket:
    for part in range(NUM_PARTS):
        holder = socket.socket()
        try:
            holder.bind(("127.0.0.1", FIRST_PORT + part * PORTS_EACH))
            return holder
        except OSError:
            holder.close()
    raise AssertionError(f"all parts from port {FIRST_PORT} on are held by other processes")


def _rank(
    sender: Any,
    variables: dict[str, str],
    dump: tuple[str, float],
    work: Callable[..., Any],
    args: Any,
) -> None:
    stacks = open(dump[0], "w")  # noqa: SIM115 # open while this process lives
    faulthandler.dump_traceback_later(dump[1], file=stacks)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "OMP_NUM_THREADS"):
        os.environ.pop(name, None)
    os.environ.update(variables)
    value, error, trace = None, None, ""
    try:
        value = work(*args)
    except BaseException as caught:
        error, trace = caught, traceback.format_exc()
    try:
        message = dumped((value, error, trace, time.time()))
    except Exception:  # an exception that cannot be pickled: its text is enough
        message = pickle.dumps((None, RuntimeError(repr(error)), trace, time.time()))
    sender.send_bytes(message)
    sender.close()
