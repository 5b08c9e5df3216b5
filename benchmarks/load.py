"""An HTTP load, in a process of its own: the same request again and again on each of a few connections.

    python -m benchmarks.load PORT SECONDS METHOD PATH [BODY]

After a moment to warm up it counts for that long, and prints one line of JSON. It knows little of HTTP, to be
cheap beside the server that it loads: answers with a `Content-Length`, connections that stay open.
"""

from __future__ import annotations

import select
import socket
import sys
import time

import msgspec

from benchmarks.stats import percentile

CONNECTIONS = 16
_WARM_S = 0.5
_RECEIVE_BYTES = 1 << 18
_LENGTH = b"content-length:"


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


def run(port: int, for_s: float, request: bytes) -> Load:
    """Load the server on this machine's `port`."""
    connections = [Connection(port, request) for _ in range(CONNECTIONS)]
    by_fd = {connection.socket.fileno(): connection for connection in connections}
    poll = select.epoll()
    for connection in connections:
        poll.register(connection.socket.fileno(), select.EPOLLIN)
        connection.ask()
    found: list[float] = []
    started_s = time.perf_counter() + _WARM_S
    end_s = started_s + for_s
    while (now_s := time.perf_counter()) < end_s:
        for fd, _ in poll.poll():
            connection = by_fd[fd]
            took_s = connection.receive()
            if took_s is not None:
                if now_s >= started_s:
                    found.append(took_s)
                connection.ask()
    per_s = len(found) / (time.perf_counter() - started_s)
    for connection in connections:
        connection.socket.close()
    poll.close()
    return Load(per_s, percentile(found, 0.5) * 1e6, percentile(found, 0.99) * 1e6, connections[0].body_bytes)


def request(method: str, path: str, body: str) -> bytes:
    """The bytes of a request, as a client with connections that stay open sends it."""
    lines = [f"{method} {path} HTTP/1.1", "Host: 127.0.0.1", "Accept: */*"]
    if body:
        lines += ["Content-Type: application/json", f"Content-Length: {len(body.encode())}"]
    return ("\r\n".join(lines) + "\r\n\r\n" + body).encode()


if __name__ == "__main__":
    _port, _for_s, _method, _path, *_body = sys.argv[1:]
    _load = run(int(_port), float(_for_s), request(_method, _path, _body[0] if _body else ""))
    print(msgspec.json.encode(_load).decode())
