"""Clients that behave badly: bytes as they stand, sockets that are dropped, readers that do not read."""

from __future__ import annotations

import asyncio
import json
import socket
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

from http_support import Lab, connections, serving, write_lab
from support import until

HEALTH = "/v1/plugins/lab/health"
RUN = "/v1/plugins/lab/tools/echo/run"
UPLOAD = "/v1/plugins/lab/tools/size/run"


class Address(NamedTuple):
    """Where a server listens."""

    host: str
    port: int


class Reply(NamedTuple):
    """An answer that was read to the connection's end."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        """Of the body."""
        return json.loads(self.body)


@asynccontextmanager
async def attacked(
    root: Path, data_dir: Path, keys: dict[Any, Any] | None = None, **changes: Any
) -> AsyncIterator[Lab]:
    """A server with the plugin `lab`. On leaving: health is 200, no upload is left, no fault was ours."""
    write_lab(root)
    async with serving(root, data_dir, keys, **changes) as lab:
        try:
            yield lab
            await healthy(address_of(lab))
            await until(lambda: not left_uploads(lab))
        finally:
            await hang_up()


_writers: list[asyncio.StreamWriter] = []


async def connect(
    address: Address, limit: int = 65536, receive_bytes: int | None = None
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A connection that is open until `hang_up`, or until somebody ends it.

    Args:
        address: of the server.
        limit: of the reader's buffer, in bytes.
        receive_bytes: of the socket's; less than what the kernel gives is for who does not read.
    """
    made = socket.socket()
    if receive_bytes is not None:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
    made.setblocking(False)
    await asyncio.get_running_loop().sock_connect(made, address)
    reader, writer = await asyncio.open_connection(sock=made, limit=limit)
    _writers.append(writer)
    return reader, writer


async def hang_up() -> None:
    """End every connection that is left."""
    while _writers:
        writer = _writers.pop()
        writer.transport.abort()
        with suppress(ConnectionError):
            await writer.wait_closed()


def address_of(lab: Lab) -> Address:
    """Of a server in this process."""
    assert lab.http.port is not None
    return Address("127.0.0.1", lab.http.port)


async def healthy(address: Address) -> None:
    """Health is 200 over a connection of its own."""
    reply = await ask(address, f"GET {HEALTH} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
    assert reply.status == 200, reply
    assert reply.json["name"] == "lab"


async def ask(address: Address, request: bytes) -> Reply:
    """Send bytes as they stand; the first answer. The connection must end by itself."""
    reader, writer = await asyncio.open_connection(*address)
    try:
        with suppress(ConnectionError):  # answered and closed before all was sent
            writer.write(request)
            await writer.drain()
        return parsed(await to_the_end(reader))
    finally:
        writer.transport.abort()


async def to_the_end(reader: asyncio.StreamReader) -> bytes:
    """All that comes until the connection ends, however it does."""
    taken = bytearray()
    with suppress(ConnectionError):
        while chunk := await reader.read(65536):
            taken += chunk
    return bytes(taken)


def parsed(raw: bytes) -> Reply:
    """The first answer in what came; status 0 where nothing came."""
    head, _, rest = raw.partition(b"\r\n\r\n")
    first, *lines = head.decode("latin-1").split("\r\n")
    if not raw:
        return Reply(0, {}, b"")
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    return Reply(int(first.split()[1]), headers, rest[: int(headers.get("content-length", len(rest)))])


def post(path: str, body: bytes, *headers: str, length: int | None = None) -> bytes:
    """A request that ends its connection."""
    size = len(body) if length is None else length
    lines = [f"POST {path} HTTP/1.1", "Host: localhost", "Connection: close", f"Content-Length: {size}", *headers]
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + body


def open_raw(address: Address) -> socket.socket:
    """A plain connected socket."""
    return socket.create_connection(address, timeout=20)


def reset(connected: socket.socket) -> None:
    """End a connection with RST instead of FIN."""
    connected.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connected.close()


def left_uploads(lab: Lab) -> list[Path]:
    """What lies in the uploads folder."""
    return list(lab.engine.uploads.iterdir()) if lab.engine.uploads.exists() else []


def descriptor_count(pid: int | None = None) -> int:
    """How many descriptors a process holds."""
    return len(list(Path(f"/proc/{pid or 'self'}/fd").iterdir()))


async def no_connections(lab: Lab) -> None:
    """Wait until the server holds none."""
    await until(lambda: not connections(lab))
