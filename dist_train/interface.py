"""Which network interface gloo is to use; and is there one of the name that the user chose.

gloo takes the address that the host's name resolves to. Debian and Ubuntu let it lead to 127.0.1.1:
then no other node reaches it; and in a container it may not resolve at all. Imports no torch.
"""

import contextlib
import fcntl
import socket
import struct
from collections.abc import Mapping
from pathlib import Path

from dist_train.config import ConfigError

VARIABLE, NCCL_VARIABLE = "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"
SIOCGIFADDR = 0x8915  # man 7 netdevice


def interface_for_gloo(env: Mapping[str, str], master_addr: str) -> str | None:
    """Return the interface that gloo must be told of, or None: it finds the right one itself.

    Args:
        env: of this process; what the user chose stays.
        master_addr: of rank 0: the interface that leads there, else that of the default route.
    """
    if VARIABLE in env or not _is_loopback(_address_of(socket.gethostname())):
        return None
    addresses = interfaces()
    towards = _address_towards(master_addr)
    for name, address in addresses.items():
        if address == towards and not _is_loopback(address):
            return name
    real = [name for name, address in addresses.items() if not _is_loopback(address)]
    default = _default_interface()
    return default if default in real else next(iter(real), None)


def loopback() -> str | None:
    """Return the interface by which ranks of one machine reach each other, whatever its name."""
    return next((name for name, address in interfaces().items() if _is_loopback(address)), None)


def check_interfaces(env: Mapping[str, str], *, nccl: bool) -> None:
    """Refuse a choice of interfaces that this machine does not have.

    Args:
        env: of this process.
        nccl: whether NCCL is used, too.

    Raises:
        ConfigError: says which there are.
    """
    names = addressed()
    wrong = [name for name in env.get(VARIABLE, "").split(",") if name and name not in names]
    if wrong:
        raise _no_interface(f"{VARIABLE}={env[VARIABLE]}", wrong[0], names)
    chosen = env.get(NCCL_VARIABLE, "")
    if nccl and chosen and not any(_nccl_takes(chosen, name) for name in names):
        raise _no_interface(f"{NCCL_VARIABLE}={chosen}", chosen, names)


def _nccl_takes(chosen: str, name: str) -> bool:
    """Say whether NCCL would use an interface: beginnings of names, =exact ones, ^all but these."""
    excluded = chosen.startswith("^")
    exact = chosen.removeprefix("^").startswith("=")
    words = [word for word in chosen.lstrip("^=").split(",") if word]
    named = any(name == word if exact else name.startswith(word) for word in words)
    return named != excluded


def _no_interface(given: str, wrong: str, names: list[str]) -> ConfigError:
    known = ", ".join(names) or "none with an address"
    variable = given.partition("=")[0]
    return ConfigError(
        f"{given}: {socket.gethostname()} has no network interface {wrong!r} with an address; it "
        f"has {known}: name one of these, or unset {variable}"
    )


def addressed() -> list[str]:
    """Return the names of this host's interfaces that have an IPv4 or an IPv6 address."""
    found = list(interfaces())
    with contextlib.suppress(OSError):
        lines = Path("/proc/net/if_inet6").read_text().splitlines()
        found += [line.split()[-1] for line in lines if line.split()[-1] not in found]
    return found


def interfaces() -> dict[str, str]:
    """Return {name: IPv4 address} of this host's interfaces that have one."""
    found = {}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            with contextlib.suppress(OSError):  # it has no address
                request = struct.pack("256s", name.encode()[:15])
                answer = fcntl.ioctl(probe.fileno(), SIOCGIFADDR, request)
                found[name] = socket.inet_ntoa(answer[20:24])
    return found


def _address_of(host: str) -> str:
    try:
        return socket.gethostbyname(host)
    except OSError:
        return ""


def _is_loopback(address: str) -> bool:
    return not address or address.startswith("127.")


def _address_towards(host: str) -> str:
    """Return this host's address on the way to another one; nothing is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((host, 9))
            return probe.getsockname()[0]
        except OSError:
            return ""


def _default_interface() -> str | None:
    """Return the interface of the default route (man 5 proc: /proc/net/route)."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/net/route").read_text().splitlines()[1:]:
            name, destination = line.split()[:2]
            if destination == "00000000":
                return name
    return None
