"""A port is one launch's: strangers are refused at once, and silence has an end."""

import dataclasses
import os
import socket
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from torch._C._distributed_c10d import PrefixStore, TCPStore

from dist_train import launch_store, rendezvous
from dist_train.config import ConfigError
from dist_train.launch_store import Launch, StoppedBeforeStartError, check_owner
from dist_train.layout import Layout, detect_layout
from dist_train.rendezvous import meet
from tests.ranks import free_port, start_ranks_of
from tests.settings import small


def layout_of(rank: int, port: int, *, served: bool = True, world_size: int = 2) -> Layout:
    return Layout(
        launcher="torchrun",
        rank=rank,
        local_rank=rank,
        world_size=world_size,
        local_world_size=world_size,
        master_port=port,
        store_is_served=served,
    )


@pytest.fixture
def port() -> Any:
    """The port of a store that an agent serves."""
    store = TCPStore("127.0.0.1", 0, is_master=True, timeout=timedelta(seconds=10))
    yield store.port
    del store


def come(layout: Layout, config: Any) -> str | None:
    """Meet as a rank; returns why it was refused."""
    try:
        meet(layout, config, "cpu")
    except ConfigError as error:
        return str(error)
    return None


def both(*calls: Callable[[], str | None]) -> list[str | None]:
    ends: list[str | None] = ["it did not end"] * len(calls)

    def call(n: int) -> None:
        ends[n] = calls[n]()

    threads = [threading.Thread(target=call, args=(n,)) for n in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return ends


def test_a_strangers_rank_is_refused_and_the_first_job_does_not_notice(
    tmp_path: Path, port: int
) -> None:
    first = small(tmp_path / "first", "parallel.start_timeout_sec=30")
    second = small(tmp_path / "second", "seed=1", "parallel.start_timeout_sec=30")
    ranks = [layout_of(rank, port) for rank in range(2)]
    told: list[str | None] = []
    watching = TCPStore("127.0.0.1", port, is_master=False, timeout=timedelta(seconds=30))

    def rank_0() -> str | None:
        return come(ranks[0], first)

    def stranger_then_rank_1() -> str | None:
        watching.wait(["dist_train/round_1/attempt"])
        told.extend(come(ranks[rank], second) for rank in (1, 0))  # while the first job waits
        return come(ranks[1], first)

    assert both(rank_0, stranger_then_rank_1) == [None, None]
    assert len(told) == 2
    for line in told:
        assert line is not None
        assert f"the store at 127.0.0.1:{port} is that of process {os.getpid()} on" in line
        assert str(tmp_path / "first") in line
        assert "--master-port" in line
        assert "--rdzv-id" in line


def test_who_comes_when_all_are_there_is_refused(
    tmp_path: Path, port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rendezvous, "VERDICT_GRACE_SEC", 1.0)
    config = small(tmp_path, "parallel.start_timeout_sec=2")
    ranks = [layout_of(rank, port) for rank in range(2)]
    assert both(*(lambda r=r: come(r, config) for r in ranks)) == [None, None]
    again = come(ranks[1], config)  # it could be one of the next attempt, so it waits for rank 0
    assert again is not None
    assert "has all its ranks already" in again
    stranger = come(layout_of(1, port, served=False), config)  # there this cannot be
    assert stranger is not None
    assert "has all its ranks already" in stranger


def attempt_of(layout: Layout, config: Any, numbers: list[int]) -> str | None:
    numbers.append(meet(layout, config, "cpu")[1].attempt)
    return None


@pytest.mark.parametrize("early", [0, 1], ids=["rank 0 first", "rank 1 first"])
def test_ranks_agree_on_the_attempt_whatever_their_nodes_counted(
    early: int, tmp_path: Path, port: int
) -> None:
    """One node's torchrun restarted its ranks; the other's joined in and counted nothing."""
    config, numbers = small(tmp_path), []
    counted = [(0, 0), (0, 1), (2, 1)]  # by the torchruns of ranks 0 and 1
    for restarts in counted:
        ranks = [
            dataclasses.replace(layout_of(r, port), attempt=4 + restarts[r], first_attempt=4)
            for r in range(2)
        ]
        if early == 1:
            ranks.reverse()
        late = [0.0, 0.5]

        def come_late(n: int, ranks: list[Layout] = ranks, late: list[float] = late) -> str | None:
            time.sleep(late[n])
            return attempt_of(ranks[n], config, numbers)

        assert both(lambda: come_late(0), lambda: come_late(1)) == [None, None]
    assert numbers == [4, 4, 5, 5, 6, 6]


def test_a_rank_leaves_the_round_of_ranks_that_died(tmp_path: Path, port: int) -> None:
    config, numbers = small(tmp_path), []
    dead = TCPStore("127.0.0.1", port, is_master=False, timeout=timedelta(seconds=30))
    ranks = [layout_of(r, port) for r in range(2)]
    before = PrefixStore("dist_train", dead)  # of a rank 0 that is killed right after this
    assert check_owner(before, ranks[0], config, 0.0)
    rendezvous._open_round(before, ranks[0])

    def rank_0() -> str | None:
        dead.wait(["dist_train/round_1/came/1"])
        return attempt_of(ranks[0], config, numbers)

    both(rank_0, lambda: attempt_of(ranks[1], config, numbers))
    assert numbers == [1, 1]


@pytest.mark.parametrize("earlier", [0, 1])
def test_ranks_that_were_stopped_leave_the_next_round_alone(
    earlier: int, tmp_path: Path, port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, numbers = small(tmp_path, "parallel.start_timeout_sec=5"), []
    ranks = [layout_of(r, port) for r in range(2)]
    for _ in range(earlier):
        assert both(*(lambda r=r: come(r, config) for r in ranks)) == [None, None]
    with monkeypatch.context() as patch:  # rank 0 was killed as it came, and torchrun stops rank 1
        for module in (rendezvous, launch_store):
            patch.setattr(module, "stop_reason", lambda: "SIGTERM")
        patch.setattr(launch_store, "STOPPED_WAIT_SEC", 0.1)
        with pytest.raises(StoppedBeforeStartError):
            meet(ranks[1], config, "cpu")
    assert both(*(lambda r=r: attempt_of(r, config, numbers) for r in ranks)) == [None, None]
    assert numbers == [earlier, earlier]


def test_another_number_of_nodes_in_a_running_launch_is_refused(tmp_path: Path, port: int) -> None:
    config = small(tmp_path)
    assert come(layout_of(0, port, world_size=1), config) is None
    ends = both(*(lambda r=r: come(layout_of(r, port), config) for r in range(2)))
    assert all("the number of nodes changed while the run was on" in str(line) for line in ends)


def test_ranks_of_one_run_with_other_settings_are_told_which(tmp_path: Path, port: int) -> None:
    configs = [small(tmp_path), small(tmp_path, "seed=1")]
    ends = both(*(lambda r=r: come(layout_of(r, port), configs[r]) for r in range(2)))
    assert all(line is not None and "has other settings" in line for line in ends), ends


@pytest.mark.parametrize(
    ("changed", "foreign"),
    [
        ({}, False),
        ({"pid": 2}, False),
        ({"config_hash": "b"}, False),
        ({"folder": "/b", "host": "b"}, False),  # no shared disk
        ({"folder": "/b"}, True),
        ({"folder": "/b", "named": False, "config_hash": "b"}, False),  # derived from the settings
        ({"folder": "/b", "host": "b", "config_hash": "b"}, True),
        ({"run_id": "b"}, True),
        ({"run_id": ""}, False),
    ],
)
def test_what_makes_a_launch_another_one(changed: dict[str, Any], foreign: bool) -> None:
    one = {"run_id": "a", "config_hash": "a", "folder": "/a", "named": True, "host": "a", "pid": 1}
    assert Launch(**one | changed).is_foreign_to(Launch(**one)) is foreign


def test_the_run_id_is_torchruns() -> None:
    env = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "h", "MASTER_PORT": "1"}
    assert detect_layout(env | {"TORCHELASTIC_RUN_ID": "none"}).run_id == ""
    assert detect_layout(env | {"TORCHELASTIC_RUN_ID": "mine"}).run_id == "mine"


@pytest.mark.slow
def test_a_listener_that_never_answers_ends_in_time(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        config = small(tmp_path, "parallel.start_timeout_sec=2")
        env = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
        env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        ends = start_ranks_of(trained, 0, config, env=env, timeout_sec=30.0)
        server.settimeout(0)
        server.accept()[0].close()  # it was met
    assert isinstance(ends[0].error, ConfigError), ends
    assert "cannot reach rank 0's store" in str(ends[0].error)


def trained(config: Any) -> None:
    from dist_train.train import train

    train(config)


def test_nobody_at_the_port_is_told_in_time(tmp_path: Path) -> None:
    config = small(tmp_path, "parallel.start_timeout_sec=1")
    begin = time.monotonic()
    line = come(layout_of(1, free_port(), served=False), config)
    assert line is not None
    assert "cannot reach rank 0's store" in line
    assert time.monotonic() - begin < 30
