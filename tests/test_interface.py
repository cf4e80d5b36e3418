"""gloo is told of an interface where the host's own name leads nowhere, and only there."""

import socket

import pytest

from dist_train import interface
from dist_train.config import ConfigError
from dist_train.interface import check_interfaces, interface_for_gloo, interfaces

HERE = {"lo": "127.0.0.1", "eth0": "10.0.0.7", "ib0": "10.1.0.7"}


@pytest.fixture(autouse=True)
def host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interface, "interfaces", lambda: HERE)
    monkeypatch.setattr(interface, "_default_interface", lambda: "ib0")
    monkeypatch.setattr(interface, "_address_of", lambda host: "127.0.1.1")


@pytest.mark.parametrize(
    ("towards", "name"),
    [("10.0.0.7", "eth0"), ("10.1.0.7", "ib0"), ("127.0.0.1", "ib0"), ("", "ib0")],
)
def test_the_way_to_rank_0_else_the_default_route(
    towards: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(interface, "_address_towards", lambda host: towards)
    assert interface_for_gloo({}, "node1") == name


def test_nothing_is_changed_without_need(monkeypatch: pytest.MonkeyPatch) -> None:
    assert interface_for_gloo({"GLOO_SOCKET_IFNAME": "ib0"}, "node1") is None
    monkeypatch.setattr(interface, "_address_of", lambda host: "10.0.0.7")
    assert interface_for_gloo({}, "node1") is None


def test_no_interface_but_the_loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interface, "interfaces", lambda: {"lo": "127.0.0.1"})
    assert interface_for_gloo({}, "node1") is None


def test_this_machines_interfaces() -> None:
    found = interfaces()
    assert found["lo"] == "127.0.0.1"
    assert set(found) <= {name for _, name in socket.if_nameindex()}


def test_the_loopback_by_any_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interface, "interfaces", lambda: {"eth0": "10.0.0.7", "lo0": "127.0.0.1"})
    assert interface.loopback() == "lo0"
    monkeypatch.setattr(interface, "interfaces", lambda: {"eth0": "10.0.0.7"})
    assert interface.loopback() is None


@pytest.mark.parametrize(
    ("variable", "chosen", "fits"),
    [
        ("GLOO_SOCKET_IFNAME", "eth0", True),
        ("GLOO_SOCKET_IFNAME", "eth0,ib0", True),
        ("GLOO_SOCKET_IFNAME", "", True),
        ("GLOO_SOCKET_IFNAME", "eth9", False),
        ("GLOO_SOCKET_IFNAME", "eth", False),
        ("GLOO_SOCKET_IFNAME", "ib0,eth9", False),
        ("NCCL_SOCKET_IFNAME", "eth", True),
        ("NCCL_SOCKET_IFNAME", "=eth0", True),
        ("NCCL_SOCKET_IFNAME", "=eth", False),
        ("NCCL_SOCKET_IFNAME", "^docker,lo", True),
        ("NCCL_SOCKET_IFNAME", "^lo,eth,ib", False),
        ("NCCL_SOCKET_IFNAME", "^=lo,eth,ib", True),
        ("NCCL_SOCKET_IFNAME", "enp,bond", False),
    ],
)
def test_an_interface_that_is_not_there_is_refused(
    variable: str, chosen: str, fits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(interface, "addressed", lambda: list(HERE))
    env = {variable: chosen}
    if fits:
        check_interfaces(env, nccl=True)
        return
    with pytest.raises(ConfigError) as raised:
        check_interfaces(env, nccl=True)
    assert "it has lo, eth0, ib0: name one of these" in str(raised.value)
    if variable.startswith("NCCL"):
        check_interfaces(env, nccl=False)
