"""Which network interface gloo is to use, where the host's own name does not lead to one.

gloo takes the address that the host's name resolves to. Debian and Ubuntu let it lead to 127.0.1.1:
then no other node reaches it. Imports no torch.
"""

import contextlib
import fcntl
import socket
import struct
from collections.abc import Mapping
from pathlib import Path

VARIABLE = "GLOO_SOCKET_IFNAME"
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
