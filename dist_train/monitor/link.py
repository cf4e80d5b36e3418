"""How the monitors of several nodes hear of each other: datagrams to and from rank 0's node.

Each tells rank 0's what its ranks do, and is told the verdict. Lost datagrams do no harm: the next
comes half a second later. The secret keeps strangers out; it travels with the ranks' start.
"""

import json
import socket
import time
from collections.abc import Sequence
from typing import Any

from dist_train.monitor.verdict import Verdict, View

EVERY_SEC = 0.5
FRESH_SEC = 2.5  # what is older is not believed any more
MOST_BYTES = 65000


class Link:
    """One node's end; rank 0's node is the hub."""

    def __init__(self, connection: socket.socket, *, node: int, is_hub: bool, secret: str) -> None:
        self._socket = connection  # connected to the hub's, or the hub's own
        self._socket.setblocking(False)
        self._node = node
        self._is_hub = is_hub
        self._secret = secret.encode()
        self._heard: dict[int, tuple[float, list[View], Any, str]] = {}
        self._told: tuple[float, Verdict | None] | None = None
        self._sent = 0.0
        self.refused = False  # the hub's monitor is gone, its machine is there
        self.everybody: list[View] = []  # as the hub saw them at its verdict

    def fileno(self) -> int:
        """Return what to wait for with select."""
        return self._socket.fileno()

    def exchange(self, mine: Sequence[View], host: str, verdict: Verdict | None = None) -> None:
        """Send what is due and take in what has come.

        Args:
            mine: of this node; with a verdict, the hub's view of all ranks.
            host: this node's name.
            verdict: the hub's, for the others.
        """
        now = time.monotonic()
        while (message := self._receive()) is not None:
            body, address = message
            if not self._is_hub:
                told = body["verdict"]
                self._told = now, None if told is None else _verdict(told)
                self.everybody = [View(*view) for view in body["views"]]
                self.refused = False
            elif body["node"] != self._node:
                views = [View(*view) for view in body["views"]]
                self._heard[body["node"]] = now, views, address, body["host"]
        if now - self._sent < EVERY_SEC and verdict is None:
            return
        self._sent = now
        if not self._is_hub:
            self._send({"node": self._node, "host": host, "views": mine}, None)
            return
        for _, _, address, _ in self._heard.values():
            self._send({"verdict": verdict, "views": mine if verdict else []}, address)

    def others(self) -> list[View]:
        """Return the ranks of other nodes, as they were when last heard of. For the hub."""
        now = time.monotonic()
        return [
            view
            for at, views, _, _ in self._heard.values()
            if now - at < FRESH_SEC
            for view in views
        ]

    def lost(self) -> list[str]:
        """Return the nodes that were heard of and are not any more. For the hub."""
        now = time.monotonic()
        return [host for at, _, _, host in self._heard.values() if now - at >= FRESH_SEC]

    def num_nodes_heard(self) -> int:
        """Return of how many other nodes anything was ever heard. For the hub."""
        return len(self._heard)

    def word_of_hub(self) -> tuple[bool, Verdict | None, bool]:
        """Return (in touch with it, its verdict, ever was in touch)."""
        if self._told is None:
            return False, None, False
        at, verdict = self._told
        return time.monotonic() - at < FRESH_SEC, verdict, not self.refused

    def _send(self, body: dict[str, Any], address: Any) -> None:
        data = self._secret + json.dumps(body).encode()
        if len(data) > MOST_BYTES:  # from 700 ranks on
            data = self._secret + json.dumps(body | {"views": []}).encode()
        try:
            self._socket.send(data) if address is None else self._socket.sendto(data, address)
        except ConnectionRefusedError:
            self.refused = True
        except OSError:
            pass  # unreachable just now: the next one may get through

    def _receive(self) -> tuple[dict[str, Any], Any] | None:
        """Return the next message that knows the secret; None: there is none."""
        while True:
            try:
                data, address = self._socket.recvfrom(MOST_BYTES)
            except ConnectionRefusedError:
                self.refused = True
                continue
            except OSError:
                return None
            if data.startswith(self._secret):
                try:
                    return json.loads(data[len(self._secret) :]), address
                except ValueError:
                    continue


def hub_socket() -> socket.socket:
    """Return a socket on a free port, for the hub."""
    dual = socket.has_dualstack_ipv6()
    made = socket.socket(socket.AF_INET6 if dual else socket.AF_INET, socket.SOCK_DGRAM)
    if dual:
        made.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
    made.bind(("", 0))
    return made


def bound_socket(descriptor: int) -> socket.socket:
    """Return the hub's socket, which this process inherited."""
    return socket.socket(fileno=descriptor)


def socket_to(host: str, port: int) -> socket.socket:
    """Return a socket connected to the hub's. Raises OSError: no such host."""
    family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
    made = socket.socket(family, kind)
    try:
        made.connect(address)
    except OSError:
        made.close()
        raise
    return made


def _verdict(fields: list[Any]) -> Verdict:
    culprits, rank, step, text = fields
    return Verdict(tuple(culprits), rank, step, text)
