"""An HTTP load, in a process of its own: the same request again and again on each of a few connections.

    python -m benchmarks.load SECONDS <<< '[{"port": 8700, "method": "GET", "path": "/livez"}, …]'

Several targets are loaded in turn, a tenth of the time each, so that a machine that is slow for a second is so for
all of them. After a moment to warm up it counts for that long of each, and prints a line of JSON. It knows little
of HTTP, to be cheap beside the server that it loads: answers with a `Content-Length`, connections that stay open.
"""

from __future__ import annotations

import select
import socket
import sys
import time
from collections.abc import Sequence

import msgspec

from benchmarks.stats import percentile

CONNECTIONS = 16
_WARM_S = 0.3
_TURNS = 10
_PAUSE_S = 0.05  # for what a server does after its last answer: it is not the next one's to pay
_RECEIVE_BYTES = 1 << 18
_LENGTH = b"content-length:"


class Target(msgspec.Struct, frozen=True):
    """A request to a server of this machine."""

    port: int
    method: str
    path: str
    body: str = ""


class Load(msgspec.Struct, frozen=True):
    """What a load came to.

    Attributes:
        per_s: answers per second.
        p50_us: from a request's sending to the end of its answer, with `CONNECTIONS` in flight; `p99_us` likewise.
        body_bytes: of the last answer.
    """

    per_s: float
    p50_us: float
    p99_us: float
    body_bytes: int


class Connection:
    """One of them: asks again as soon as it has been answered.

    Raises (from `receive`):
        RuntimeError: an answer that is not a 200 with a length, or the server hung up.
    """

    def __init__(self, port: int, request: bytes) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port))
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.body_bytes = 0
        self._request = request
        self._head = b""
        self._left = 0
        self._sent_s = 0.0

    def ask(self) -> None:
        """Send the request."""
        self._sent_s = time.perf_counter()
        self.socket.sendall(self._request)

    def receive(self) -> float | None:
        """Take what came; seconds that the answer took, once it is whole."""
        data = self.socket.recv(_RECEIVE_BYTES)
        if not data:
            raise RuntimeError("the server hung up")
        if self._left:
            self._left -= len(data)
        else:
            data = self._head + data
            end = data.find(b"\r\n\r\n")
            if end < 0:
                self._head = data
                return None
            self._head = b""
            self.body_bytes = _length(data[:end])
            self._left = self.body_bytes - (len(data) - end - 4)
        return None if self._left else time.perf_counter() - self._sent_s


def _length(head: bytes) -> int:
    if not head.startswith(b"HTTP/1.1 200 "):
        raise RuntimeError(f"answered {head.splitlines()[0].decode(errors='replace')}")
    lowered = head.lower()
    at = lowered.find(_LENGTH)
    if at < 0:
        raise RuntimeError("an answer without its length")
    return int(lowered[at + len(_LENGTH) :].partition(b"\r\n")[0])


class Side:
    """A server under load, for a while at a time.

    Args:
        target: what is asked of it.
    """

    def __init__(self, target: Target) -> None:
        asked = request(target.method, target.path, target.body)
        connections = [Connection(target.port, asked) for _ in range(CONNECTIONS)]
        self._connections = {connection.socket.fileno(): connection for connection in connections}
        self._poll = select.epoll()
        for fd in self._connections:
            self._poll.register(fd, select.EPOLLIN)
        self._took_s: list[float] = []
        self._counted_s = 0.0

    def ask(self, for_s: float) -> None:
        """Load it, and count; what is under way in the end is waited for, and not counted."""
        started_s = time.perf_counter()
        end_s = started_s + for_s
        for connection in self._connections.values():
            connection.ask()
        waiting = len(self._connections)
        while waiting:
            for fd, _ in self._poll.poll():
                took_s = self._connections[fd].receive()
                if took_s is None:
                    continue
                if time.perf_counter() < end_s:
                    self._took_s.append(took_s)
                    self._connections[fd].ask()
                else:
                    waiting -= 1
        self._counted_s += for_s

    def forget(self) -> None:
        """What was counted so far was to warm up."""
        self._took_s.clear()
        self._counted_s = 0.0

    def end(self) -> Load:
        """Close the connections; what it came to."""
        for connection in self._connections.values():
            connection.socket.close()
        self._poll.close()
        found, size = self._took_s, next(iter(self._connections.values())).body_bytes
        per_s = len(found) / self._counted_s
        return Load(per_s, percentile(found, 0.5) * 1e6, percentile(found, 0.99) * 1e6, size)


def run(targets: Sequence[Target], for_s: float) -> list[Load]:
    """Load servers of this machine in turn."""
    sides = [Side(target) for target in targets]
    for side in sides:
        side.ask(_WARM_S)
        side.forget()
    for _ in range(_TURNS):
        for side in sides:
            side.ask(for_s / _TURNS)
            time.sleep(_PAUSE_S)
    return [side.end() for side in sides]


def request(method: str, path: str, body: str) -> bytes:
    """The bytes of a request, as a client with connections that stay open sends it."""
    lines = [f"{method} {path} HTTP/1.1", "Host: 127.0.0.1", "Accept: */*"]
    if body:
        lines += ["Content-Type: application/json", f"Content-Length: {len(body.encode())}"]
    return ("\r\n".join(lines) + "\r\n\r\n" + body).encode()


if __name__ == "__main__":
    _targets = msgspec.json.decode(sys.stdin.buffer.read(), type=list[Target])
    print(msgspec.json.encode(run(_targets, float(sys.argv[1]))).decode())
