"""The speed that the link to another host should have, as Linux tells it."""

import socket
from pathlib import Path

from dist_train.interface import interfaces

SYSFS = Path("/sys/class/net")


def link_toward(address: str) -> tuple[float | None, str]:
    """Return the bytes per second of the interface with this address; or None, and why."""
    name = next((name for name, own in interfaces().items() if own == address), None)
    if name is None:
        return None, f"no interface has the address {address or '(unknown)'}"
    return speed_in(SYSFS / name, socket.if_nametoindex(name))


def speed_in(folder: Path, index: int) -> tuple[float | None, str]:
    """Read the speed of an interface from its folder in sysfs; with it its name, or why not."""
    name = folder.name
    try:
        if int((folder / "ifindex").read_text()) != index:
            # sysfs was mounted in another network namespace, and shows that one's interfaces
            return None, f"/sys shows the interfaces of another namespace, not {name}"
        if not (folder / "device").exists():
            return None, f"{name} is virtual"
        megabits = int((folder / "speed").read_text())
    except (OSError, ValueError):
        megabits = 0
    return (megabits * 1e6 / 8, name) if megabits > 0 else (None, f"{name} does not tell its speed")
