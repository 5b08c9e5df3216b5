"""Ten thousand clients, and a server that has no descriptor left: in a process of its own, as `holdfast serve`."""

from __future__ import annotations

import asyncio
import os
import resource
import socket
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

import psutil
import pytest
from client_support import (
    HEALTH,
    RUN,
    UPLOAD,
    Address,
    address_of,
    ask,
    attacked,
    connect,
    descriptor_count,
    hang_up,
    healthy,
    no_connections,
    open_raw,
    post,
    reset,
)
from http_support import write_lab
from support import until

from engine.api.keys import STREAMS

ROOT = Path(__file__).resolve().parents[1]
GET = f"GET {HEALTH} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode()
READY = b"GET /readyz HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
FORM = "Content-Type: multipart/form-data; boundary=B"
PART = b'--B\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\nfirst'

# What a client has sent when it drops the connection, and how it does.
DROPS: list[tuple[bytes, Callable[[socket.socket], None]]] = [
    (sent, drop)
    for sent in (
        b"",
        b"GET /v1/plugi",
        GET,
        GET + b"GET /",
        post(RUN, b'{"text": "x"}'),
        post(RUN, b'{"te', length=1000),
        post(UPLOAD, PART, FORM, length=100_000),
        b"GET /v1/events?after=0 HTTP/1.1\r\nHost: localhost\r\n\r\n",
    )
    for drop in (socket.socket.close, reset)
]
BATCH = 200


class Served(NamedTuple):
    """A server in a process of its own."""

    address: Address
    process: psutil.Process


@asynccontextmanager
async def served(root: Path, data_dir: Path, limits: str = "", **settings: object) -> AsyncIterator[Served]:
    """`holdfast serve` with the plugin `lab`; on leaving, health is 200 and SIGTERM ends it with 0.

    Args:
        root: the plugins' folder.
        data_dir: of the engine.
        limits: what the shell does before it.
        settings: of the server.
    """
    write_lab(root)
    command = [sys.executable, "-m", "engine", "serve", "--no-bundled", "--port", "0"]
    command += ["--plugins", str(root), "--data", str(data_dir)]
    environment = {f"HOLDFAST_{name.upper()}": str(value) for name, value in settings.items()}
    process = await asyncio.create_subprocess_exec(
        *("sh", "-c", f'{limits or ":"}; exec "$@"', "sh", *command),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
    )
    try:
        assert process.stdout is not None
        url = (await process.stdout.readline()).split()[-1].decode()
        address = Address("127.0.0.1", urlsplit(url).port or 0)
        await until_ready(address)
        yield Served(address, psutil.Process(process.pid))
        await healthy(address)
        process.terminate()
        assert await process.wait() == 0
    finally:
        await hang_up()
        if process.returncode is None:
            process.kill()
            await process.wait()


async def until_ready(address: Address) -> None:
    """Wait until the plugins have settled."""
    async with asyncio.timeout(20):
        while (await ask(address, READY)).status != 200:
            pass


def highest_descriptor(pid: int) -> int:
    """The highest number of a descriptor that a process holds."""
    return max(int(entry.name) for entry in Path(f"/proc/{pid}/fd").iterdir())


def drop_batch(address: Address, first: int) -> None:
    """Open a batch, one kind after the other, and only then drop all of it. Blocking."""
    opened = []
    for number in range(first, first + BATCH):
        sent, drop = DROPS[number % len(DROPS)]
        client = open_raw(address)
        client.sendall(sent)
        opened.append((client, drop))
    for client, drop in opened:
        drop(client)


@pytest.mark.timeout(180)
async def test_ten_thousand_dropped_connections_leave_nothing(plugins: Path, data_dir: Path) -> None:
    async with served(plugins, data_dir) as server:
        memory: list[int] = []

        async def drop(batches: int) -> None:
            for number in range(batches):
                await asyncio.to_thread(drop_batch, server.address, number * BATCH)
                await healthy(server.address)
                memory.append(server.process.memory_info().rss)

        before = descriptor_count(server.process.pid)
        await drop(10)
        warm = memory[-1]
        await drop(40)
        await until(lambda: descriptor_count(server.process.pid) <= before)
        grown_mib = (server.process.memory_info().rss - warm) / 2**20
        assert grown_mib < 8, [round(one / 2**20, 1) for one in memory]
        assert not await asyncio.to_thread(lambda: list(data_dir.glob("scratch/*/uploads/*")))


async def test_dropped_connections_leave_no_task(plugins: Path, data_dir: Path) -> None:
    async with attacked(plugins, data_dir) as lab:
        await asyncio.to_thread(drop_batch, address_of(lab), 0)
        await no_connections(lab)
        before = len(asyncio.all_tasks())
        for number in range(5):
            await asyncio.to_thread(drop_batch, address_of(lab), number * BATCH)
        await no_connections(lab)
        await until(lambda: len(asyncio.all_tasks()) <= before)
        assert lab.http.app[STREAMS].open == 0
        assert not lab.http.app[STREAMS]._waits


async def test_a_server_takes_all_descriptors_it_may_and_its_workers_do_not(plugins: Path, data_dir: Path) -> None:
    async with served(plugins, data_dir, "ulimit -Sn 200; ulimit -Hn 3000") as server:
        assert server.process.rlimit(psutil.RLIMIT_NOFILE) == (3000, 3000)
        below = server.process.children(recursive=True)
        assert len(below) >= 2
        assert {child.rlimit(psutil.RLIMIT_NOFILE) for child in below} == {(200, 3000)}


async def test_a_worker_starts_while_clients_hold_all_they_can(plugins: Path, data_dir: Path) -> None:
    """With 400 descriptors: 100 connections, and some that can only read health; the rest is for the engine."""
    async with served(plugins, data_dir, "ulimit -Sn 300; ulimit -Hn 400") as server:
        hold = post(RUN, b"{", "Content-Type: application/json", "Expect: 100-continue", length=100)
        for number in range(350):
            reader, held = await connect(server.address)
            held.write(hold)
            assert (await reader.readuntil(b"\r\n\r\n")).split()[1] == b"100"
            if number == 0:
                first = held
            if number >= 100:
                assert (await reader.readline()).split()[1] == b"503"
        assert descriptor_count(server.process.pid) < 300
        await healthy(server.address)
        first.transport.abort()  # a place for who asks for the restart
        restart = post("/v1/plugins/lab/restart", b"")
        async with asyncio.timeout(20):
            while (reply := await ask(server.address, restart)).status == 503:
                pass
        assert (reply.status, reply.json["state"], reply.json["incarnation"]) == (200, "INITIALIZED", 2)


async def test_without_a_descriptor_left_the_server_neither_spins_nor_ends(plugins: Path, data_dir: Path) -> None:
    """Not by its clients: a library may take them all, or an operator the limit."""
    async with served(plugins, data_dir) as server:
        reader, writer = await connect(server.address)
        pid = server.process.pid
        soft, hard = resource.prlimit(pid, resource.RLIMIT_NOFILE)
        highest = await asyncio.to_thread(highest_descriptor, pid)
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (highest + 1, hard))
        used_s = sum(server.process.cpu_times()[:2])
        shut_out = [await connect(server.address) for _ in range(60)]
        for _ in range(50):  # who is in is served
            writer.write(GET)
            assert (await reader.readline()).split()[1] == b"200"
            await reader.readuntil(b"}")
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (soft, hard))
        await healthy(server.address)
        for _, client in shut_out:
            client.transport.abort()
        assert sum(server.process.cpu_times()[:2]) - used_s < 1
