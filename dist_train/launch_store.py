"""The store of a launch: connected to, waited for, and refused if it is another launch's."""

import dataclasses
import json
import os
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta

from torch._C._distributed_c10d import Store, TCPStore
from torch.distributed import DistNetworkError

from dist_train.config import Config, ConfigError
from dist_train.config.identity import full_hash, run_dir_of
from dist_train.layout import Layout
from dist_train.preemption import LAUNCHER_DIED, stop_reason

POLL_SEC = 0.05
OWNER = "owner"  # key of the launch whose store it is
CONNECT_GRACE_SEC = 1.0  # for the constructor to time out by itself: it says more
STOPPED_WAIT_SEC = 5.0  # for ranks that may have been stopped before they could listen


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


def connect(layout: Layout, timeout: timedelta) -> Store:
    """Return the store at the master's address.

    Raises:
        ConfigError: the port is taken, or nobody answers.
        StoppedBeforeStartError: asked to stop while waiting.
    """
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
        raise stopped(reason)
    raise failed[0] if failed else RuntimeError("no answer")


def check_owner(store: Store, layout: Layout, config: Config, wait_sec: float) -> bool:
    """Compare this rank's launch with that of the rank 0 which was first to come.

    Returns:
        False if no rank 0 came within `wait_sec`.

    Raises:
        ConfigError: the store is that of another launch; says whose.
    """
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
    elif not wait_for_key(store, OWNER, wait_sec):
        return False
    if mine.is_foreign_to(_owner(store)):
        raise not_ours(store, layout, "is another run")
    return True


def _owner(store: Store) -> Launch:
    return Launch(**json.loads(store.get(OWNER)))


def not_ours(store: Store, layout: Layout, what: str) -> ConfigError:
    """Return the mistake of a rank that came to another launch's store."""
    owner = _owner(store)
    return ConfigError(
        f"the store at {layout.master_addr}:{layout.master_port} is that of process {owner.pid} on "
        f"{owner.host} with run folder {owner.folder}, which {what}: give this one a port of its "
        "own with --master-port or MASTER_PORT (and another --rdzv-id), or start all ranks of one "
        "run with the same command"
    )


def stopped(reason: str) -> StoppedBeforeStartError:
    """Return what ends a rank that was asked to stop as it came, or whose launcher died."""
    error = StoppedBeforeStartError(
        f"stopped ({reason}) before all ranks had come: nothing to save, the same command continues"
    )
    if reason == LAUNCHER_DIED:  # others' launchers, which live, are to start their ranks again
        error.exit_code = 1
    return error


def wait_for_key(store: Store, key: str, seconds: float) -> bool:
    """Wait for a key; not by store.wait: a signal's handler would run only when it has returned."""
    return wait_for(lambda: store.check([key]), seconds)


def wait_for(there: Callable[[], bool], seconds: float) -> bool:
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
