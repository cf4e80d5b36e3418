"""What can be wrong with a node of the test cluster, done to it for a while."""

import contextlib
import fcntl
import heapq
import itertools
import os
import select
import struct
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from benchmarks.reliability.cable import IFF_NO_PI, LARGEST_PACKET, POLL_SEC, TUNSETIFF
from tests.slurm.cluster import Cluster

IFF_TAP = 0x0002  # linux/if_tun.h
CPU_CGROUPS = Path("/sys/fs/cgroup/cpu")  # version 1
PERIOD_USEC = 100_000
NO_LOCKS = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <stdarg.h>

/* Every lock is granted, and none is taken. */
int fcntl(int fd, int command, ...) {
    static int (*real)(int, int, ...);
    va_list more;
    va_start(more, command);
    void *argument = va_arg(more, void *);
    va_end(more);
    if (command == F_SETLK || command == F_SETLKW) return 0;
    if (!real) real = dlsym(RTLD_NEXT, "fcntl");
    return real(fd, command, argument);
}
int fcntl64(int, int, ...) __attribute__((alias("fcntl")));
"""


@contextlib.contextmanager
def nameless(cluster: Cluster, name: str, *, on: list[int]) -> Iterator[None]:
    """Take a name out of /etc/hosts of some nodes."""
    lines = (cluster.base / "etc/hosts").read_text().splitlines(keepends=True)
    spoilt = cluster.base / f"etc/hosts.without.{name}"
    spoilt.write_text("".join(line for line in lines if name not in line.split()))
    firsts = [str(first_process(cluster, number)) for number in on]
    inside = [["nsenter", "--target", first, "--mount", "--pid"] for first in firsts]
    for words in inside:
        _do(*words, "mount", "--bind", str(spoilt), "/etc/hosts")
    try:
        yield
    finally:
        for words in inside:
            _do(*words, "umount", "/etc/hosts")


@contextlib.contextmanager
def dropped(cluster: Cluster, port: int, *, on: int) -> Iterator[None]:
    """Drop every packet that comes to a port of a node, as a firewall does, without a word."""

    def rule(*words: str) -> None:
        said = cluster.on_node(on, "ip", "rule", *words)
        assert said == "", said

    blocked = ("pref", "1", "iif", "eth0", "ipproto", "tcp", "dport", str(port), "blackhole")
    rule("add", "pref", "100", "lookup", "local")  # that of number 0 would come first
    rule("del", "pref", "0")
    rule("add", *blocked)
    try:
        yield
    finally:
        rule("del", *blocked)
        rule("add", "pref", "0", "lookup", "local")
        rule("del", "pref", "100")


def why_no_quota() -> str | None:
    """Return why no node can be throttled here, or None."""
    if not (CPU_CGROUPS / "cpu.cfs_quota_us").exists() and not any(
        CPU_CGROUPS.glob("*/cpu.cfs_quota_us")
    ):
        return f"no CPU quota of cgroup version 1 at {CPU_CGROUPS}"
    return None


@contextlib.contextmanager
def throttled(cluster: Cluster, number: int, cores: float) -> Iterator[None]:
    """Give all processes of a node so many cores' time, in periods of 100 ms."""
    group = CPU_CGROUPS / f"{cluster.base.parent.name}-node{number}"
    group.mkdir()
    (group / "cpu.cfs_period_us").write_text(str(PERIOD_USEC))
    (group / "cpu.cfs_quota_us").write_text(str(int(cores * PERIOD_USEC)))
    _move(descendants(first_process(cluster, number)), group)
    try:
        yield
    finally:
        end = time.monotonic() + 30
        while pids := (group / "cgroup.procs").read_text().split():
            _move([int(pid) for pid in pids], CPU_CGROUPS)
            assert time.monotonic() < end, pids
        group.rmdir()


class LongCable:
    """A node's cable through a process that holds what the node sends for `delay_sec`.

    Two TAP devices take the place of the cluster's own cable: no module of the kernel for bad
    networks is needed.
    """

    def __init__(self, cluster: Cluster, number: int, delay_sec: float) -> None:
        self._cluster, self._number, self._delay_sec = cluster, number, delay_sec
        self._closing = False
        self._thread = threading.Thread(target=self._carry, name="long cable", daemon=True)
        self._ends: list[int] = []  # at the node, at the bridge
        self.num_carried = 0

    def __enter__(self) -> "LongCable":
        cluster, number = self._cluster, self._number
        space, tag = cluster._namespace(number), cluster._namespace(number).replace("-", "")
        mac = cluster.on_node(number, "ip", "-br", "link", "show", "eth0").split()[2]
        self._ends = [_tap(f"{tag}a"), _tap(f"{tag}b")]
        cluster.cut(number)
        _do("ip", "-n", space, "link", "set", "eth0", "down")
        _do("ip", "-n", space, "addr", "flush", "dev", "eth0")
        _do("ip", "-n", space, "link", "set", "eth0", "name", "unplugged")
        _do("ip", "link", "set", f"{tag}a", "netns", space, "name", "eth0")
        _do("ip", "-n", space, "link", "set", "eth0", "address", mac)
        _do("ip", "-n", space, "addr", "add", f"{cluster.address(number)}/24", "dev", "eth0")
        _do("ip", "-n", space, "link", "set", "eth0", "up")
        _do("ip", "link", "set", f"{tag}b", "master", cluster._bridge, "up")
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closing = True
        self._thread.join()
        for end in self._ends:
            os.close(end)  # the devices go with them
        cluster, number = self._cluster, self._number
        space = cluster._namespace(number)
        _do("ip", "-n", space, "link", "set", "unplugged", "name", "eth0")
        _do("ip", "-n", space, "addr", "add", f"{cluster.address(number)}/24", "dev", "eth0")
        _do("ip", "-n", space, "link", "set", "eth0", "up")
        cluster.heal(number)

    def _carry(self) -> None:
        node, bridge = self._ends
        numbers = itertools.count()
        waiting: list[tuple[float, int, bytes]] = []  # (due, number, frame) from the node
        while not self._closing:
            pause = max(0.0, min(POLL_SEC, waiting[0][0] - time.monotonic() if waiting else 1.0))
            for end in select.select(self._ends, [], [], pause)[0]:
                frame = os.read(end, LARGEST_PACKET)
                self.num_carried += 1
                if end == node:
                    due = time.monotonic() + self._delay_sec
                    heapq.heappush(waiting, (due, next(numbers), frame))
                else:
                    os.write(node, frame)
            while waiting and waiting[0][0] <= time.monotonic():
                os.write(bridge, heapq.heappop(waiting)[2])


def without_locks(folder: Path) -> Path:
    """Compile a library that, preloaded, lets every lock succeed; returns its path."""
    source, library = folder / "no_locks.c", folder / "no_locks.so"
    source.write_text(NO_LOCKS)
    _do("cc", "-shared", "-fPIC", "-o", str(library), str(source), "-ldl")
    return library


@contextlib.contextmanager
def small_disk(folder: Path, size: str) -> Iterator[Path]:
    """Mount a memory file system; what is started later in other namespaces sees it."""
    folder.mkdir()
    _do("mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder))
    try:
        yield folder
    finally:
        _do("umount", str(folder))


@contextlib.contextmanager
def filled(folder: Path) -> Iterator[None]:
    """Write to a disk until nothing more goes onto it."""
    path = folder / "filling"
    with path.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while file.write(b"x" * 4096):
            pass
    assert os.statvfs(folder).f_bavail == 0
    try:
        yield
    finally:
        path.unlink()


def first_process(cluster: Cluster, number: int) -> int:
    """Return the process that is number 1 in a node."""
    outside = cluster._processes[f"node{number}"].pid  # unshare, which waits for it
    return int(Path(f"/proc/{outside}/task/{outside}/children").read_text().split()[0])


def descendants(pid: int) -> list[int]:
    """Return a process and all that it has started."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [pid, *itertools.chain(*(descendants(int(child)) for child in children))]


def _move(pids: list[int], group: Path) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            (group / "cgroup.procs").write_text(str(pid))


def _tap(name: str) -> int:
    end = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(end, TUNSETIFF, struct.pack("16sH22x", name.encode(), IFF_TAP | IFF_NO_PI))
    return end


def _do(*words: str) -> None:
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{words}: {done.stderr}"
