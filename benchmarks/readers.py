"""Readers of a server's event stream, many in one process, counting what arrives and how late.

    python -m benchmarks.readers PORT READERS LINES AFTER SECONDS

Each follows `GET /v1/events?after=AFTER` until it has seen LINES events of the type `plugin.log`, or SECONDS are
over. Prints `ready` once all are being answered, and one line of JSON in the end.
"""

from __future__ import annotations

import re
import select
import socket
import sys
import time
from datetime import datetime

import msgspec

_RECEIVE_BYTES = 1 << 17
_TOLD_BYTES = 600  # of an answer that is an error
_CACHED = 512  # texts that came to one reader and will come to all the others too
_LINE = b"holdfast.plugin.log"
_EVENT = re.compile(rb"id: (\d+)\nevent: (\S+)\ndata: (.*)\n")
_TIME = re.compile(rb'"time":"([^"]+)"')


class Seen(msgspec.Struct, frozen=True):
    """What all readers of a process saw.

    Attributes:
        lines: how many log lines arrived, of all readers together.
        holes: events whose number was not the one after the last.
        delays_ms: of log lines: from the event's own time until it was read; how often, by whole milliseconds.
        done: readers that saw every line.
    """

    lines: int
    holes: int
    delays_ms: dict[int, int]
    done: int


class Arrived(msgspec.Struct, frozen=True):
    """One event, as every reader gets it."""

    number: int
    is_line: bool
    time_s: float


class Reader:
    """One connection: takes chunks apart, and events out of them."""

    def __init__(self, port: int, after: int) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port))
        head = f"GET /v1/events?after={after} HTTP/1.1\r\nHost: 127.0.0.1\r\nAccept: text/event-stream\r\n\r\n"
        self.socket.sendall(head.encode())
        self.last = after
        self.lines = 0
        self._raw = b""
        self._text = b""
        while b"\r\n\r\n" not in self._raw:
            data = self.socket.recv(_RECEIVE_BYTES)
            if not data:
                raise RuntimeError("the server hung up")
            self._raw += data
        status, _, rest = self._raw.partition(b"\r\n")
        if b" 200 " not in status:
            raise RuntimeError(f"answered {self._raw[:_TOLD_BYTES].decode(errors='replace')!r}")
        self._raw = rest.partition(b"\r\n\r\n")[2]

    def receive(self) -> bytes:
        """What the socket has, as `take` returns it.

        Raises:
            RuntimeError: the server hung up.
        """
        data = self.socket.recv(_RECEIVE_BYTES)
        if not data:
            raise RuntimeError("the server hung up")
        return self.take(data)

    def take(self, data: bytes) -> bytes:
        """More of the answer's body; returns the whole messages in what came so far (an empty line ends one)."""
        raw = self._raw + data
        pieces = [self._text]
        at = 0
        while (end := raw.find(b"\r\n", at)) >= 0:
            next_at = end + 2 + int(raw[at:end], 16) + 2
            if next_at > len(raw):
                break
            pieces.append(raw[end + 2 : next_at - 2])
            at = next_at
        self._raw = raw[at:]
        text = b"".join(pieces)
        if text.endswith(b"\n\n"):
            self._text = b""
            return text
        whole, _, self._text = text.rpartition(b"\n\n")
        return whole + b"\n\n" if whole else b""


class Tally:
    """What arrived at all readers of this process, and how late."""

    def __init__(self) -> None:
        self.holes = 0
        self.delays_ms: dict[int, int] = {}
        self._parsed: dict[bytes, tuple[Arrived, ...]] = {}

    def count(self, reader: Reader, text: bytes) -> None:
        """Whole messages that came to a reader just now."""
        arrived = self._parsed.get(text)
        if arrived is None:
            if len(self._parsed) >= _CACHED:
                self._parsed.clear()
            arrived = self._parsed[text] = _arrived(text)
        now_s = time.time()
        for event in arrived:
            if event.number != reader.last + 1:
                self.holes += 1
            reader.last = event.number
            if event.is_line:
                reader.lines += 1
                delay_ms = int((now_s - event.time_s) * 1000)
                self.delays_ms[delay_ms] = self.delays_ms.get(delay_ms, 0) + 1


def _arrived(text: bytes) -> tuple[Arrived, ...]:
    found = []
    for number, kind, data in _EVENT.findall(text):
        stamp = _TIME.search(data)
        if stamp is None:
            raise RuntimeError(f"an event without a time: {data[:200]!r}")
        time_s = datetime.fromisoformat(stamp[1].decode()).timestamp()
        found.append(Arrived(int(number), kind == _LINE, time_s))
    return tuple(found)


def follow(port: int, readers: int, lines: int, after: int, for_s: float) -> Seen:
    """Connect all of them, say so, and read."""
    connected = [Reader(port, after) for _ in range(readers)]
    print("ready", flush=True)
    tally = Tally()
    for reader in connected:
        tally.count(reader, reader.take(b""))  # what came along with the head of its answer
    by_fd = {reader.socket.fileno(): reader for reader in connected if reader.lines < lines}
    poll = select.epoll()
    for fd in by_fd:
        poll.register(fd, select.EPOLLIN)
    end_s = time.monotonic() + for_s
    while by_fd and (left_s := end_s - time.monotonic()) > 0:
        for fd, _ in poll.poll(left_s):
            reader = by_fd[fd]
            tally.count(reader, reader.receive())
            if reader.lines >= lines:
                poll.unregister(fd)
                del by_fd[fd]
    for reader in connected:
        reader.socket.close()
    poll.close()
    total = sum(reader.lines for reader in connected)
    return Seen(total, tally.holes, tally.delays_ms, sum(reader.lines >= lines for reader in connected))


if __name__ == "__main__":
    _port, _readers, _lines, _after = map(int, sys.argv[1:5])
    print(msgspec.json.encode(follow(_port, _readers, _lines, _after, float(sys.argv[5]))).decode())
