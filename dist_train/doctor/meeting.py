"""Plain TCP between the nodes: who can reach whom, how far away, and with which clock.

Every step has a deadline and every failure is an outcome. Imports no torch at the top: a node
whose torch is broken must be able to say so.
"""

import contextlib
import socket
import socketserver
import struct
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal

from dist_train.doctor.deadline import DeadlineError, within

Outcome = Literal[
    "reached",
    "no such host",
    "refused",
    "timed out",
    "unreachable",
    "another answers",
    "taken",  # of rank 0's own port
    "not tried",
]
CONNECT_SEC = 4.0  # a SYN that is lost comes again after 1 and 3 s
RESOLVE_SEC = 15.0  # a resolver with a dead server asks the next one after 5 s
ROUNDS = 8  # of asking the time; the fastest counts
THREADS = 16  # nodes asked at a time
GREETING = struct.Struct("!64s")  # the name of the node that answers
TIME = struct.Struct("!d")


@dataclass(frozen=True, kw_only=True, slots=True)
class Probe:
    """What came of a connection to a port."""

    outcome: Outcome
    detail: str = ""
    address: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Arrival:
    """What a rank can say once it has tried to import torch and to reach rank 0."""

    rank: int
    import_sec: float
    torch_error: str = ""
    torch: str = ""
    cuda: str = ""
    nccl: str = ""
    gpus: list[str]  # unique names of the visible ones, in torch's order
    gpu_model: str = ""
    store: str  # outcome of rank 0's port
    store_detail: str = ""
    store_address: str = ""
    port: int  # where this rank's Listener is
    own_addresses: list[str]  # of this machine's own name, as it resolves here
    address: str  # that it has on the network; "": not known
    taken_ports: list[int]  # of those that the next steps of this job would use; rank 0 only


@dataclass(frozen=True, kw_only=True, slots=True)
class Peer:
    """One node, as the others are to reach it."""

    rank: int  # the first of the node's
    node: str
    port: int
    address: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Link:
    """What one node sees of another one, or of itself by its own name."""

    source: str
    target: str
    outcome: str  # by the node's name
    detail: str = ""
    address: str = ""
    by_address: str = ""  # outcome by the address that the node says it has, if the name failed
    round_trip_sec: float | None = None
    clock_ahead_sec: float | None = None  # the target's clock minus the source's


class _Answer(socketserver.BaseRequestHandler):
    """Says the node's name, and then the time for each byte that comes."""

    def handle(self) -> None:
        assert isinstance(self.server, _Server)
        self.request.settimeout(RESOLVE_SEC)
        self.request.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with contextlib.suppress(OSError):
            self.request.sendall(GREETING.pack(self.server.node.encode()))
            while self.request.recv(1):
                self.request.sendall(TIME.pack(time.time()))


class _Server(socketserver.ThreadingTCPServer):
    address_family = socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET
    daemon_threads = True
    request_queue_size = 512
    node = ""

    def server_bind(self) -> None:
        if self.address_family == socket.AF_INET6:
            self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        super().server_bind()


@contextlib.contextmanager
def listening(node: str) -> Iterator[int]:
    """Answer on a port that the system chooses, as gloo and NCCL do; gives the port."""
    with _Server(("", 0), _Answer) as server:
        server.node = node
        threading.Thread(target=server.serve_forever, args=(0.1,), daemon=True).start()
        try:
            yield server.server_address[1]
        finally:
            server.shutdown()


def probe(host: str, port: int) -> tuple[Probe, socket.socket | None]:
    """Try to connect; the socket is the caller's to close."""
    try:
        found = within(RESOLVE_SEC, lambda: socket.getaddrinfo(host, port, type=socket.SOCK_STREAM))
    except DeadlineError:
        return Probe(outcome="no such host", detail=f"no answer in {RESOLVE_SEC:.0f} s"), None
    except OSError as error:
        return Probe(outcome="no such host", detail=error.strerror or str(error)), None
    last = Probe(outcome="unreachable")
    for family, kind, protocol, _, address in found:
        connection = socket.socket(family, kind, protocol)
        connection.settimeout(CONNECT_SEC)
        where = str(address[0])
        try:
            connection.connect(address)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            return Probe(outcome="reached", address=where), connection
        except TimeoutError:
            last = Probe(outcome="timed out", address=where)
        except ConnectionRefusedError:
            last = Probe(outcome="refused", address=where)
        except OSError as error:  # no route, or a rule of this machine's own forbids it
            last = Probe(outcome="unreachable", detail=error.strerror or "", address=where)
        connection.close()
    return last, None


def own_addresses() -> list[str]:
    """Return what this machine's own name resolves to here."""
    try:
        found = within(
            RESOLVE_SEC,
            lambda: socket.getaddrinfo(socket.gethostname(), None, type=socket.SOCK_STREAM),
        )
    except (OSError, DeadlineError):
        return []
    return sorted({str(entry[4][0]) for entry in found})


def address_toward(host: str) -> str:
    """Return the address that this machine has on the way to `host`; sends nothing."""
    for name in (host, "192.0.2.1"):  # the latter is nobody's (RFC 5737): the default route
        with contextlib.suppress(OSError, DeadlineError):
            found = within(
                RESOLVE_SEC, lambda name=name: socket.getaddrinfo(name, 9, type=socket.SOCK_DGRAM)
            )
            with socket.socket(found[0][0], socket.SOCK_DGRAM) as sock:
                sock.connect(found[0][4])
                address = str(sock.getsockname()[0])
            if not is_loopback(address):
                return address
    return ""


def is_loopback(address: str) -> bool:
    """Say whether an address is the machine itself."""
    return address.startswith("127.") or address == "::1"


def is_taken(port: int) -> bool:
    """Say whether nobody else could listen on this port."""
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            sock.bind(("", port))
        except OSError:
            return True
    return False


def look_at_peers(me: str, peers: list[Peer]) -> list[Link]:
    """Connect to every other node, several at a time."""
    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(lambda peer: _look_at(me, peer), peers))


def _look_at(me: str, peer: Peer) -> Link:
    found, connection = probe(peer.node, peer.port)
    by_address = ""
    if connection is None and peer.address:
        other, connection = probe(peer.address, peer.port)
        by_address = other.outcome
    link = Link(
        source=me,
        target=peer.node,
        outcome=found.outcome,
        detail=found.detail,
        address=found.address,
        by_address=by_address,
    )
    return link if connection is None else _ask(link, connection)


def _ask(link: Link, connection: socket.socket) -> Link:
    """Ask who is there and what time it is; as NTP does, the fastest answer is believed."""
    fields = {name: getattr(link, name) for name in Link.__slots__}
    best: tuple[float, float] | None = None
    with connection:
        try:
            answer = _receive(connection, GREETING.size).rstrip(b"\0").decode(errors="replace")
            for _ in range(ROUNDS):
                sent, began = time.time(), time.monotonic()
                connection.sendall(b"t")
                (theirs,) = TIME.unpack(_receive(connection, TIME.size))
                trip = time.monotonic() - began
                ahead = theirs - (sent + trip / 2)
                best = min(best or (trip, ahead), (trip, ahead))
        except OSError as error:
            fields["outcome"] = "timed out" if isinstance(error, TimeoutError) else "unreachable"
            fields["detail"] = "it connects but does not answer"
        else:
            if answer != link.target:
                fields |= {"outcome": "another answers", "detail": answer}
    if best is not None:
        fields |= {"round_trip_sec": best[0], "clock_ahead_sec": best[1]}
    return Link(**fields)


def _receive(connection: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        part = connection.recv(size - len(data))
        if not part:
            raise ConnectionError("closed")
        data += part
    return data


def port_range() -> tuple[int, int]:
    """Return the ports from which Linux takes those of outgoing connections."""
    try:
        with open("/proc/sys/net/ipv4/ip_local_port_range") as file:
            first, last = file.read().split()
    except (OSError, ValueError):
        return 32768, 60999
    return int(first), int(last)
