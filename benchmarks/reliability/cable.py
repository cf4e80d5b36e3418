"""Two network namespaces joined by a cable that can be cut, be slow, or lose packets.

Each namespace has a TUN device; every packet passes through a thread of this process, so no
module of the kernel for bad networks is needed. Needs root.
"""

import fcntl
import heapq
import itertools
import os
import random
import select
import shutil
import struct
import subprocess
import threading
import time
from types import TracebackType

ADDRESSES = ("10.77.0.1", "10.77.0.2")
DEVICE = "cable"
TUNSETIFF, IFF_TUN, IFF_NO_PI = 0x400454CA, 0x0001, 0x1000  # linux/if_tun.h
LARGEST_PACKET = 2048
POLL_SEC = 0.02


class Cable:
    """The cable; set `cut`, `delay_sec` and `loss` at any time."""

    def __init__(self, seed: int) -> None:
        self.cut = False
        self.delay_sec = 0.0  # each way
        self.loss = 0.0  # share of the packets
        self.num_lost = 0
        self.num_refused = 0  # packets that the far end's device did not take: lost, too
        self._dice = random.Random(seed)
        self._names = [f"cable-{os.getpid()}-{end}" for end in range(2)]
        self._ends: list[int] = []
        self._thread = threading.Thread(target=self._carry, name="cable", daemon=True)
        self._closing = False

    def command(self, end: int) -> list[str]:
        """Return the words that run a command at this end."""
        return ["ip", "netns", "exec", self._names[end]]

    def __enter__(self) -> "Cable":
        try:
            for name, address in zip(self._names, ADDRESSES, strict=True):
                self._lay(name, address)
        except BaseException:
            self._take_down()
            raise
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._closing = True
        self._thread.join()
        self._take_down()

    def _lay(self, namespace: str, address: str) -> None:
        _ip("netns", "add", namespace)
        end = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
        self._ends.append(end)
        device = f"t{namespace[-10:]}"
        request = struct.pack("16sH22x", device.encode(), IFF_TUN | IFF_NO_PI)
        fcntl.ioctl(end, TUNSETIFF, request)
        _ip("link", "set", device, "netns", namespace, "name", DEVICE)
        _ip("-n", namespace, "addr", "add", f"{address}/24", "dev", DEVICE)
        _ip("-n", namespace, "link", "set", DEVICE, "up")
        _ip("-n", namespace, "link", "set", "lo", "up")

    def _take_down(self) -> None:
        for end in self._ends:
            os.close(end)
        for name in self._names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)

    def _carry(self) -> None:
        """Take packets from either end to the other."""
        numbers = itertools.count()
        waiting: list[tuple[float, int, int, bytes]] = []  # (due, number, to, packet)
        while not self._closing:
            pause = POLL_SEC
            if waiting:
                pause = max(0.0, min(pause, waiting[0][0] - time.monotonic()))
            for end in select.select(self._ends, [], [], pause)[0]:
                packet = os.read(end, LARGEST_PACKET)
                if self.cut or self._dice.random() < self.loss:
                    self.num_lost += 1
                    continue
                other = self._ends[1 - self._ends.index(end)]
                due = time.monotonic() + self.delay_sec
                heapq.heappush(waiting, (due, next(numbers), other, packet))
            while waiting and waiting[0][0] <= time.monotonic():
                _, _, end, packet = heapq.heappop(waiting)
                if self.cut:
                    continue
                try:
                    os.write(end, packet)
                except OSError:  # its queue is full, or the device is down for a moment
                    self.num_refused += 1


def why_no_cable() -> str | None:
    """Say why no cable can be laid here."""
    if shutil.which("ip") is None:
        return "needs the program `ip` (Debian: iproute2)"
    if os.geteuid() != 0:
        return "needs root, for network namespaces"
    if not os.path.exists("/dev/net/tun"):
        return "needs /dev/net/tun"
    done = subprocess.run(["ip", "netns", "list"], capture_output=True, check=False)
    return None if done.returncode == 0 else "needs `ip netns` (Debian: iproute2)"


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)
