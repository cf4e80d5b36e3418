"""The network interface that leads to a host, and the speed that its link should have."""

import fcntl
import socket
import struct
from pathlib import Path

SIOCGIFADDR = 0x8915  # man 7 netdevice
SYSFS = Path("/sys/class/net")


def link_toward(host: str) -> tuple[float | None, str]:
    """Return the bytes per second of the link to `host`, or None, and its name or why not."""
    name = _interface_toward(host)
    if name is None:
        return None, f"no interface leads to {host} by IPv4"
    return speed_in(SYSFS / name, socket.if_nametoindex(name))


def speed_in(folder: Path, index: int) -> tuple[float | None, str]:
    """Read the speed of an interface from its folder in sysfs."""
    name = folder.name
    try:
        if int((folder / "ifindex").read_text()) != index:
            # sysfs was mounted in another network namespace, and shows that one's interfaces
            return None, f"{name}: /sys shows the interfaces of another namespace"
        if not (folder / "device").exists():
            return None, f"{name} is virtual and has no speed of its own"
        megabits = int((folder / "speed").read_text())
    except (OSError, ValueError):
        return None, f"{name} does not tell its speed"
    if megabits <= 0:
        return None, f"{name} does not tell its speed"
    return megabits * 1e6 / 8, name


def _interface_toward(host: str) -> str | None:
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            sock.connect((host, 9))  # sends nothing
            mine = sock.getsockname()[0]
            for _, name in socket.if_nameindex():
                request = struct.pack("256s", name.encode()[:15])
                try:
                    answer = fcntl.ioctl(sock.fileno(), SIOCGIFADDR, request)
                except OSError:  # without an address
                    continue
                if socket.inet_ntoa(answer[20:24]) == mine:
                    return name
    except OSError:
        return None
    return None
