"""The bases of a call: a message of 64 bytes to another process and back, over a socketpair.

python -m benchmarks.probes.echo streams|blocking FD        # the other process
"""

from __future__ import annotations

import asyncio
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from benchmarks.probes import Plan
from benchmarks.probes.timing import CALLS_S, async_latencies, in_us, latencies

_BYTES = 64


def streams(plan: Plan) -> dict[str, float]:
    """Asyncio's streams on both sides, on asyncio's own loop, as one would write it."""
    with _peer("streams") as sock:
        return asyncio.run(_ask(sock, plan.of(CALLS_S)))


async def _ask(sock: socket.socket, for_s: float) -> dict[str, float]:
    reader, writer = await asyncio.open_unix_connection(sock=sock)

    async def call(n: int) -> None:
        writer.write(bytes([n]) * _BYTES)
        await writer.drain()
        if (await reader.readexactly(_BYTES))[0] != n:
            raise RuntimeError("the echo is of another message")

    found = await async_latencies(call, for_s)
    writer.close()
    await writer.wait_closed()
    return in_us(found)


async def _answer(sock: socket.socket) -> None:
    reader, writer = await asyncio.open_unix_connection(sock=sock)
    try:
        while True:
            writer.write(await reader.readexactly(_BYTES))
            await writer.drain()
    except (asyncio.IncompleteReadError, ConnectionError):
        writer.close()


def blocking(plan: Plan) -> dict[str, float]:
    """Blocking sockets on both sides: what the kernel takes."""
    with _peer("blocking") as sock:

        def call(n: int) -> None:
            sock.sendall(bytes([n]) * _BYTES)
            if sock.recv(_BYTES, socket.MSG_WAITALL)[0] != n:
                raise RuntimeError("the echo is of another message")

        return in_us(latencies(call, plan.of(CALLS_S / 2)))


@contextmanager
def _peer(kind: str) -> Iterator[socket.socket]:
    ours, theirs = socket.socketpair()
    with ours:
        with theirs:
            command = [sys.executable, "-m", "benchmarks.probes.echo", kind, str(theirs.fileno())]
            process = subprocess.Popen(command, pass_fds=[theirs.fileno()])
        yield ours
    process.wait()


def _serve(kind: str, fd: int) -> None:
    with socket.socket(fileno=fd) as sock:
        if kind == "streams":
            asyncio.run(_answer(sock))
            return
        while message := sock.recv(_BYTES, socket.MSG_WAITALL):
            sock.sendall(message)


if __name__ == "__main__":
    _serve(sys.argv[1], int(sys.argv[2]))
