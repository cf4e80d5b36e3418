"""How the ranks meet before the process group is made: a round, and a table that rank 0 checks."""

import contextlib
import dataclasses
import json
import os
import platform
import socket
import time
from collections.abc import Callable
from datetime import timedelta
from typing import NoReturn

import torch
from torch._C._distributed_c10d import PrefixStore, Store
from torch.distributed import DistNetworkError

from dist_train.config import Config, ConfigError
from dist_train.config.identity import full_hash
from dist_train.launch_store import check_owner, connect, not_ours, stopped, wait_for, wait_for_key
from dist_train.layout import Layout, Registration, check_registrations
from dist_train.preemption import stop_reason

VERDICT_GRACE_SEC = 15.0
FINE, STOPPED = "fine", "stopped: "  # verdicts; any other is a mistake
NODES_CHANGED = (
    "the number of nodes changed while the run was on (torchrun --nnodes=MIN:MAX): ranks cannot "
    "join or leave it. Start it with a fixed --nnodes; the same command continues from the last "
    "checkpoint on any number of them"
)


def meet(
    layout: Layout, config: Config, device_name: str, error: str | None = None
) -> tuple[Store, Layout]:
    """Meet the other ranks; returns a store of this attempt's own, and the layout. Collective.

    In the layout chain and attempt are those that hold for all ranks: on several machines each
    launcher has a name of its own for the chain, and rank 0's counts.

    Restarted ranks would otherwise read the dead ones' addresses from torchrun's store. Which
    attempt it is the ranks agree on here: each node's torchrun counts its own restarts, and does
    not count those that another node's asked for. So rank 0 opens a round, and the others join the
    newest one that is not over. A rank of another launch writes nothing, so that the owner does
    not notice.

    Args:
        layout: this rank's place; of several attempts that are said to come next the latest counts.
        config: of the run.
        device_name: unique on this host; "cpu" is not.
        error: why this rank cannot start.

    Raises:
        ConfigError: the port is taken, nobody answers, the store is that of another launch, the
            table of ranks makes no sense, or somebody did not come.
        StoppedBeforeStartError: asked to stop while waiting.
    """
    start_sec = config.parallel.start_timeout_sec
    store = PrefixStore("dist_train", connect(layout, timedelta(seconds=start_sec)))
    if not check_owner(store, layout, config, start_sec + VERDICT_GRACE_SEC):
        _end_without_first(store, layout, start_sec)
    if layout.rank == 0 and store.check(["world_size"]):
        before = int(store.get("world_size"))
        error = error or (None if before == layout.world_size else NODES_CHANGED)
    while True:
        number = _open_round(store, layout) if layout.rank == 0 else _join(store, layout, start_sec)
        place = PrefixStore(f"round_{number}", store)
        if _register(
            place, layout, config, device_name, error, lambda n=number: _rounds(store) > n
        ):
            attempt, chain = int(place.get("attempt")), place.get("chain").decode()
            return place, dataclasses.replace(layout, attempt=attempt, chain=chain)


def _open_round(store: Store, layout: Layout) -> int:
    number = store.add("rounds", 1)
    attempt = max(layout.attempt, layout.first_attempt + number - 1)
    place = PrefixStore(f"round_{number}", store)
    place.set("attempt", str(attempt))
    place.set("chain", layout.chain)
    store.set("world_size", str(layout.world_size))
    return number


def _rounds(store: Store) -> int:
    return store.add("rounds", 0)


def _join(store: Store, layout: Layout, start_sec: float) -> int:
    """Return the newest round, once there is one without a verdict. For all but rank 0."""
    number = 0

    def is_open() -> bool:
        nonlocal number
        number = _rounds(store)
        over = number > 0 and store.check([f"round_{number}/verdict"])
        if over and not layout.store_is_served:  # rank 0's own: it will not open another one
            raise not_ours(store, layout, "has all its ranks already")
        return number > 0 and not over

    if wait_for(is_open, start_sec + VERDICT_GRACE_SEC):
        return number
    if number > 0 and stop_reason() is None:
        raise not_ours(store, layout, "has all its ranks already")
    _end_without_first(store, layout, start_sec)


def _end_without_first(store: Store, layout: Layout, start_sec: float) -> NoReturn:
    """Raise what a rank is to say that rank 0 left alone."""
    reason = stop_reason()
    if reason is None:
        raise _first_is_missing(layout.world_size, start_sec)
    if not layout.store_is_served:  # else it outlives us: the next round is that of a restart
        with contextlib.suppress(DistNetworkError):
            # Late ranks will read it, and end too.
            _decide(PrefixStore("round_1", store), f"{STOPPED}{reason}")
    raise stopped(reason)


def _first_is_missing(world_size: int, start_sec: float) -> ConfigError:
    return ConfigError(
        f"rank 0 of {world_size} did not come within {start_sec:.0f} s: start it, or raise "
        "parallel.start_timeout_sec"
    )


def _register(
    store: Store,
    layout: Layout,
    config: Config,
    device_name: str,
    error: str | None,
    is_stale: Callable[[], bool],
) -> bool:
    """Tell rank 0 who we are, and take its verdict on the whole table.

    Returns:
        False if a newer round was opened meanwhile: this one was that of ranks which have died.
    """
    entry = Registration(
        rank=layout.rank,
        local_rank=layout.local_rank,
        world_size=layout.world_size,
        host=socket.gethostname(),
        pid=os.getpid(),
        device=device_name,
        config_hash=full_hash(config),
        versions=f"torch {torch.__version__}, Python {platform.python_version()}",
        error=error,
    )
    line = json.dumps(dataclasses.asdict(entry))
    slot = store.add(f"came/{layout.rank}", 1)  # a second process with this rank gets 2
    store.set(f"rank/{layout.rank}/{slot}", line)
    start_sec = config.parallel.start_timeout_sec
    if layout.rank == 0 and slot == 1:
        table = []
        end = time.monotonic() + start_sec
        for rank in range(layout.world_size):
            if wait_for_key(store, f"rank/{rank}/1", end - time.monotonic()):
                came = store.add(f"came/{rank}", 0)
                for n in range(1, came + 1):
                    text = store.get(f"rank/{rank}/{n}").decode()
                    table.append(Registration(**json.loads(text)))
        missing = len(table) < layout.world_size and stop_reason()
        wrong = check_registrations(table, layout.world_size) or FINE
        _decide(store, f"{STOPPED}{missing}" if missing else wrong)
    # Longer than rank 0 waits: it knows who is missing.
    decided = wait_for(
        lambda: store.check(["verdict"]) or is_stale(), start_sec + VERDICT_GRACE_SEC
    )
    if decided and not store.check(["verdict"]):
        return False
    if not decided:
        reason = stop_reason()
        if reason is None:
            raise _first_is_missing(layout.world_size, start_sec)
        _decide(store, f"{STOPPED}{reason}")  # late ranks will read it, and end too
    verdict = store.get("verdict").decode()
    if verdict == FINE:
        return True
    store.add("verdict_read", 1)
    if layout.rank == 0 and not layout.store_is_served:
        _wait_for_readers(store, layout.world_size)
    if verdict.startswith(STOPPED):
        raise stopped(verdict.removeprefix(STOPPED))
    raise ConfigError(verdict)


def _decide(store: Store, verdict: str) -> None:
    """Set the verdict, unless there is one: whoever is first decides for all."""
    store.compare_set("verdict", "", verdict)


def _wait_for_readers(store: Store, world_size: int) -> None:
    """Keep the store that this process serves until the others have read the verdict."""
    end = time.monotonic() + 5.0
    while store.add("verdict_read", 0) < world_size and time.monotonic() < end:
        time.sleep(0.02)
