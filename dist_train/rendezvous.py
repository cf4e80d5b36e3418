"""How the ranks meet before the process group is made: a store, and a table that rank 0 checks."""

import contextlib
import dataclasses
import json
import os
import platform
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import NoReturn

import torch
from torch._C._distributed_c10d import PrefixStore, Store, TCPStore
from torch.distributed import DistNetworkError

from dist_train.config import Config, ConfigError
from dist_train.config.identity import full_hash, run_dir_of
from dist_train.layout import Layout, Registration, check_registrations
from dist_train.preemption import stop_reason

VERDICT_GRACE_SEC = 15.0
POLL_SEC = 0.05
FINE, STOPPED = "fine", "stopped: "  # verdicts; any other is a mistake
OWNER = "owner"  # key of the launch whose store it is
CONNECT_GRACE_SEC = 1.0  # for the constructor to time out by itself: it says more
STOPPED_WAIT_SEC = 5.0  # for ranks that may have been stopped before they could listen
NODES_CHANGED = (
    "the number of nodes changed while the run was on (torchrun --nnodes=MIN:MAX): ranks cannot "
    "join or leave it. Start it with a fixed --nnodes; the same command continues from the last "
    "checkpoint on any number of them"
)


class StoppedBeforeStartError(RuntimeError):
    """This rank was asked to stop before all had met: there is nothing to save."""

    exit_code = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Launch:
    """What tells one launch from another that has come to its port."""

    run_id: str  # torchrun's --rdzv-id; "": not known
    config_hash: str
    folder: str
    named: bool  # the folder was given; a derived one follows from the settings
    host: str
    pid: int

    def is_foreign_to(self, other: "Launch") -> bool:
        """Say whether these are two runs; ranks of one with a slip in their settings are not."""
        if self.run_id and other.run_id and self.run_id != other.run_id:
            return True
        # Machines without a shared disk may have folders of their own; one machine has one.
        one_host, one_config = self.host == other.host, self.config_hash == other.config_hash
        other_folder = self.named and other.named and self.folder != other.folder
        return other_folder and (one_host or not one_config)


def meet(
    layout: Layout, config: Config, device_name: str, error: str | None = None
) -> tuple[Store, int]:
    """Meet the other ranks; returns a store of this attempt's own, and its number. Collective.

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
    store = PrefixStore("dist_train", _connect(layout, timedelta(seconds=start_sec)))
    _check_owner(store, layout, config)
    if layout.rank == 0 and store.check(["world_size"]):
        before = int(store.get("world_size"))
        error = error or (None if before == layout.world_size else NODES_CHANGED)
    while True:
        number = _open_round(store, layout) if layout.rank == 0 else _join(store, layout, start_sec)
        place = PrefixStore(f"round_{number}", store)
        if _register(
            place, layout, config, device_name, error, lambda n=number: _rounds(store) > n
        ):
            return place, int(place.get("attempt"))


def _open_round(store: Store, layout: Layout) -> int:
    number = store.add("rounds", 1)
    attempt = max(layout.attempt, layout.first_attempt + number - 1)
    PrefixStore(f"round_{number}", store).set("attempt", str(attempt))
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
            raise _not_ours(store, layout, "has all its ranks already")
        return number > 0 and not over

    if _wait_for(is_open, start_sec + VERDICT_GRACE_SEC):
        return number
    if number > 0 and stop_reason() is None:
        raise _not_ours(store, layout, "has all its ranks already")
    _end_without_first(store, layout, start_sec)


def _check_owner(store: Store, layout: Layout, config: Config) -> None:
    """Compare this rank's launch with that of the rank 0 which was first to come."""
    mine = Launch(
        run_id=layout.run_id,
        config_hash=full_hash(config),
        folder=str(run_dir_of(config).resolve()),
        named=config.run_dir is not None,
        host=socket.gethostname(),
        pid=os.getpid(),
    )
    if layout.rank == 0:
        store.compare_set(OWNER, "", json.dumps(dataclasses.asdict(mine)))
    elif not _wait(store, OWNER, config.parallel.start_timeout_sec + VERDICT_GRACE_SEC):
        _end_without_first(store, layout, config.parallel.start_timeout_sec)
    if mine.is_foreign_to(_owner(store)):
        raise _not_ours(store, layout, "is another run")


def _owner(store: Store) -> Launch:
    return Launch(**json.loads(store.get(OWNER)))


def _not_ours(store: Store, layout: Layout, what: str) -> ConfigError:
    owner = _owner(store)
    return ConfigError(
        f"the store at {layout.master_addr}:{layout.master_port} is that of process {owner.pid} on "
        f"{owner.host} with run folder {owner.folder}, which {what}: give this one a port of its "
        "own with --master-port or MASTER_PORT (and another --rdzv-id), or start all ranks of one "
        "run with the same command"
    )


def _end_without_first(store: Store, layout: Layout, start_sec: float) -> NoReturn:
    """Raise what a rank is to say that rank 0 left alone."""
    reason = stop_reason()
    if reason is None:
        raise _first_is_missing(layout.world_size, start_sec)
    if not layout.store_is_served:  # else it outlives us: the next round is that of a restart
        with contextlib.suppress(DistNetworkError):
            # Late ranks will read it, and end too.
            _decide(PrefixStore("round_1", store), f"{STOPPED}{reason}")
    raise _stopped(reason)


def _first_is_missing(world_size: int, start_sec: float) -> ConfigError:
    return ConfigError(
        f"rank 0 of {world_size} did not come within {start_sec:.0f} s: start it, or raise "
        "parallel.start_timeout_sec"
    )


def _stopped(reason: str) -> StoppedBeforeStartError:
    return StoppedBeforeStartError(
        f"stopped ({reason}) before all ranks had come: nothing to save, the same command continues"
    )


def _connect(layout: Layout, timeout: timedelta) -> Store:
    """Return the store at the master's address."""
    try:
        return _made_in_time(
            lambda: TCPStore(
                layout.master_addr,
                layout.master_port,
                world_size=None if layout.store_is_served else layout.world_size,
                is_master=layout.rank == 0 and not layout.store_is_served,
                timeout=timeout,
                wait_for_workers=False,
            ),
            timeout.total_seconds() + CONNECT_GRACE_SEC,
        )
    except StoppedBeforeStartError:
        raise
    except RuntimeError as error:
        address = f"{layout.master_addr}:{layout.master_port}"
        if "EADDRINUSE" in str(error) or "already in use" in str(error):
            raise ConfigError(
                f"port {layout.master_port} is taken on {layout.master_addr}: choose another with "
                "--master-port or MASTER_PORT, or use torchrun --standalone on one machine"
            ) from None
        raise ConfigError(
            f"cannot reach rank 0's store at {address} within {timeout.total_seconds():.0f} s: "
            "check MASTER_ADDR or --rdzv-endpoint, the network and the firewall"
        ) from None


def _made_in_time(make: Callable[[], Store], seconds: float) -> Store:
    """Call `make` in a thread; a port that takes connections and never answers would hold it.

    TCPStore's own timeout does not count there. The thread is left behind: the process ends.

    Raises:
        RuntimeError: of `make`, or it takes longer than `seconds`.
        StoppedBeforeStartError: it does, after a request to stop.
    """
    made: list[Store] = []
    failed: list[BaseException] = []

    def work() -> None:
        try:
            made.append(make())
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=work, name="connect to the store", daemon=True)
    thread.start()
    end = time.monotonic() + seconds
    while thread.is_alive() and time.monotonic() < end:
        thread.join(POLL_SEC)  # in slices, so that signals are heard
        if stop_reason() is not None:
            end = min(end, time.monotonic() + STOPPED_WAIT_SEC)
    if made:
        return made[0]
    reason = stop_reason()
    if reason is not None:
        raise _stopped(reason)
    raise failed[0] if failed else RuntimeError("no answer")


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
            if _wait(store, f"rank/{rank}/1", end - time.monotonic()):
                came = store.add(f"came/{rank}", 0)
                for n in range(1, came + 1):
                    text = store.get(f"rank/{rank}/{n}").decode()
                    table.append(Registration(**json.loads(text)))
        missing = len(table) < layout.world_size and stop_reason()
        wrong = check_registrations(table, layout.world_size) or FINE
        _decide(store, f"{STOPPED}{missing}" if missing else wrong)
    # Longer than rank 0 waits: it knows who is missing.
    decided = _wait_for(
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
        raise _stopped(verdict.removeprefix(STOPPED))
    raise ConfigError(verdict)


def _decide(store: Store, verdict: str) -> None:
    """Set the verdict, unless there is one: whoever is first decides for all."""
    store.compare_set("verdict", "", verdict)


def _wait_for_readers(store: Store, world_size: int) -> None:
    """Keep the store that this process serves until the others have read the verdict."""
    end = time.monotonic() + 5.0
    while store.add("verdict_read", 0) < world_size and time.monotonic() < end:
        time.sleep(0.02)


def _wait(store: Store, key: str, seconds: float) -> bool:
    """Wait for a key; not by store.wait: a signal's handler would run only when it has returned."""
    return _wait_for(lambda: store.check([key]), seconds)


def _wait_for(there: Callable[[], bool], seconds: float) -> bool:
    """Wait for something in a store; a rank that is asked to stop waits a few seconds only."""
    end = time.monotonic() + seconds
    while True:
        try:
            if there():
                return True
        except DistNetworkError:
            return False  # the store is gone
        if stop_reason() is not None:
            end = min(end, time.monotonic() + STOPPED_WAIT_SEC)
        if time.monotonic() >= end:
            return False
        time.sleep(POLL_SEC)
