"""The least that a call to another process comes to, where its beginning and its end are kept on a disk.

    caller ──socketpair── a process that answers
       └──two events a call──▶ a thread, in batches: JSON → SQLite (WAL, FULL) → a line chained by SHA-256

The thread pauses as Holdfast's does (`events.pace`). Nothing else is there: nothing is admitted, checked, limited,
watched, ended, counted or shown to anybody, and a process that dies is not missed. So this is no way to call a
plugin; it is what a ratio would be if all of that cost nothing. It is no bound: the other process always sleeps
until a call comes, where a worker of Holdfast's stays awake for a moment.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import socket
import sqlite3
import struct
import threading
import time
import traceback
from collections import deque
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from types import TracebackType
from typing import cast

import msgspec
from msgspec import msgpack

from events.pace import gather_s, parts

_HEADER = struct.Struct("<I")
_ROW = 64  # events


class _Begun(msgspec.Struct, gc=False):
    tool: str
    request_id: str


class _Ended(msgspec.Struct, gc=False):
    tool: str
    request_id: str
    ok: bool
    duration_ms: float


class _Event(msgspec.Struct, gc=False):
    sequence: int
    time_ns: int
    data: _Begun | _Ended


class _Call(msgspec.Struct, array_like=True, gc=False):
    number: int
    tool: str
    arguments: dict[str, int]


class _Result(msgspec.Struct, array_like=True, gc=False):
    number: int
    value: int


class Keeper:
    """Keeps events, on a thread of its own. Leaving it waits until all are kept.

    Args:
        folder: for the database and the lines.

    Raises (on leaving):
        RuntimeError: the database has others than those that were given.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._given = 0
        self._waiting: deque[_Event] = deque()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._work, daemon=True)

    def __enter__(self) -> Keeper:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: BaseException | TracebackType | None) -> None:
        self._over.set()
        self._thread.join()
        if kind is not None:
            return
        with closing(sqlite3.connect(self._folder / "events.db")) as database:
            found = sum(lines.count(b"\n") for (lines,) in database.execute("SELECT lines FROM events"))
        if found != self._given:
            raise RuntimeError(f"kept are {found}, given were {self._given}")

    def keep(self, data: _Begun | _Ended) -> None:
        """Number an event, and have it kept."""
        self._given += 1
        self._waiting.append(_Event(self._given, time.time_ns(), data))

    def _work(self) -> None:
        database = sqlite3.connect(self._folder / "events.db", isolation_level=None)
        database.execute("PRAGMA journal_mode = WAL")
        database.execute("PRAGMA synchronous = FULL")
        database.execute("CREATE TABLE events(first INTEGER PRIMARY KEY, lines BLOB NOT NULL)")
        encode, head, over, pause_s = msgspec.json.Encoder().encode_lines, "", False, 0.0
        with (self._folder / "audit.jsonl").open("wb") as lines:
            while not over:
                over = self._over.wait(pause_s)
                events = [self._waiting.popleft() for _ in range(len(self._waiting))]
                rows: list[tuple[int, bytes]] = []
                for part in parts(len(events)):
                    for row in range(part.start, part.stop, _ROW):
                        of_it = events[row : min(row + _ROW, part.stop)]
                        rows.append((of_it[0].sequence, encode(of_it)))
                database.execute("BEGIN IMMEDIATE")
                if rows:
                    places = ", ".join(["(?, ?)"] * len(rows))
                    database.execute(
                        f"INSERT INTO events VALUES {places}",
                        [value for row in rows for value in row],
                    )
                database.execute("COMMIT")
                jsons = [json for _, of_it in rows for json in of_it.splitlines()]
                for part in parts(len(jsons)):
                    for json in jsons[part]:
                        line = b'%b,"prev":"%b"}\n' % (json[:-1], head.encode())
                        head = hashlib.sha256(line).hexdigest()
                        lines.write(line)
                lines.flush()
                pause_s = gather_s(len(events))
        database.close()


class Caller(asyncio.Protocol):
    """Calls the process at the other end.

    Args:
        keeper: of what began and ended.
    """

    def __init__(self, keeper: Keeper) -> None:
        self._keeper = keeper
        self._transport: asyncio.Transport | None = None
        self._came = b""
        self._last = 0
        self._waiting: dict[int, asyncio.Future[int]] = {}

    @classmethod
    async def connect(cls, end: socket.socket, keeper: Keeper) -> Caller:
        """One that calls over this socket, which is its own from now on."""
        loop = asyncio.get_running_loop()
        return (await loop.create_unix_connection(lambda: cls(keeper), sock=end))[1]

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """It can call."""
        self._transport = cast(asyncio.Transport, transport)

    async def call(self, n: int) -> int:
        """What the other process says to `n`."""
        assert self._transport is not None
        self._last = number = self._last + 1
        waiting = self._waiting[number] = asyncio.get_running_loop().create_future()
        request_id = f"{number:032x}"
        self._keeper.keep(_Begun("noop", request_id))
        began_s = time.perf_counter()
        self._transport.write(_frame(_Call(number, "noop", {"n": n})))
        value: int = await waiting
        self._keeper.keep(_Ended("noop", request_id, True, (time.perf_counter() - began_s) * 1e3))
        return value

    def connection_lost(self, exc: Exception | None) -> None:
        """Who waits for an answer gets none."""
        for waiting in self._waiting.values():
            if not waiting.done():
                waiting.set_exception(exc or ConnectionError("the process that answers is gone"))

    def data_received(self, data: bytes) -> None:
        """Answers."""
        whole, self._came = _cut(self._came + data)
        for content in whole:
            result = _decode_result(content)
            self._waiting.pop(result.number).set_result(result.value)


@contextmanager
def answering() -> Iterator[socket.socket]:
    """A process that answers each call with its argument; the socket to it. Before any thread is started."""
    ours, theirs = socket.socketpair()
    child = os.fork()
    if child == 0:
        try:
            ours.close()
            _answer(theirs)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(0)
    theirs.close()
    try:
        yield ours
    finally:
        ours.close()
        os.waitpid(child, 0)


def _answer(end: socket.socket) -> None:
    came = b""
    while data := end.recv(65536):
        whole, came = _cut(came + data)
        for content in whole:
            call = _decode_call(content)
            end.sendall(_frame(_Result(call.number, call.arguments["n"])))


_encode = msgpack.Encoder().encode
_decode_call = msgpack.Decoder(_Call).decode
_decode_result = msgpack.Decoder(_Result).decode


def _frame(message: _Call | _Result) -> bytes:
    content = _encode(message)
    return _HEADER.pack(len(content)) + content


def _cut(stream: bytes) -> tuple[list[bytes], bytes]:
    """The whole frames' contents, and what is left."""
    whole, at = [], 0
    while len(stream) - at >= _HEADER.size:
        (length,) = _HEADER.unpack_from(stream, at)
        end = at + _HEADER.size + length
        if end > len(stream):
            break
        whole.append(stream[at + _HEADER.size : end])
        at = end
    return whole, stream[at:]
