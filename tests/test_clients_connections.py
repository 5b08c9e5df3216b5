"""Clients that take their time, and clients that are too many."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path

import pytest
from client_support import (
    HEALTH,
    RUN,
    UPLOAD,
    Reply,
    address_of,
    ask,
    attacked,
    connect,
    healthy,
    no_connections,
    parsed,
    post,
    to_the_end,
)
from http_support import Lab, connections
from support import until

from engine.api.keys import STALL_S, STREAMS

GET = f"GET {HEALTH} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode()
EVENTS = b"GET /v1/events HTTP/1.1\r\nHost: localhost\r\n\r\n"
JSON = "Content-Type: application/json"
ECHO = b'{"text": "x"}'
NDJSON = "Accept: application/x-ndjson"
FORM = "Content-Type: multipart/form-data; boundary=B"
PART = b'--B\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n'


class Dribble:
    """A connection that sends a text over and over, a byte at a time, for as long as it is let."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    async def until_ended(self, endless: bytes) -> Reply:
        """The answer that ended it."""
        sending = asyncio.create_task(self._send(endless))
        try:
            return parsed(await to_the_end(self.reader))
        finally:
            sending.cancel()
            await asyncio.gather(sending, return_exceptions=True)
            self.writer.transport.abort()

    async def _send(self, endless: bytes) -> None:
        with suppress(ConnectionError):
            for byte in itertools.cycle(endless):
                self.writer.write(bytes([byte]))
                await self.writer.drain()
                await asyncio.sleep(0.005)  # the attack's own pace


async def connected(lab: Lab) -> Dribble:
    """A fresh connection."""
    return Dribble(*await connect(address_of(lab)))


HEADS = {
    "method": (b"G", b""),
    "target": (b"GET /", b"e"),
    "headers": (b"GET / HTTP/1.1\r\nHost: localhost\r\n", b"X-A: b\r\n"),
    "blank_lines": (b"\r\n", b"\r\n"),
}


@pytest.mark.parametrize("part", HEADS)
async def test_a_head_that_trickles_is_told_408(plugins: Path, data_dir: Path, part: str) -> None:
    begin, endless = HEADS[part]
    async with attacked(plugins, data_dir, request_head_s=0.3) as lab:
        client = await connected(lab)
        client.writer.write(begin)
        reply = await client.until_ended(endless)
        assert (reply.status, reply.json["reason_code"]) == (408, "request_timeout")
        assert "0.3 s" in reply.json["error"]
        assert reply.headers["connection"] == "close"
        await no_connections(lab)


async def test_a_head_that_trickles_after_a_request_is_told_408(plugins: Path, data_dir: Path) -> None:
    async with attacked(plugins, data_dir, request_head_s=0.3) as lab:
        client = await connected(lab)
        client.writer.write(GET)
        assert (await client.reader.readline()).split()[1] == b"200"
        await client.reader.readuntil(b"}")
        client.writer.write(b"GET /")
        assert (await client.until_ended(b"e")).status == 408
        await no_connections(lab)


async def test_a_connection_that_says_nothing_is_closed(plugins: Path, data_dir: Path) -> None:
    """At once after the time for a head; after a request it is kept for longer, and then closed as well."""
    async with attacked(plugins, data_dir, request_head_s=0.2, idle_connection_s=0.4) as lab:
        client = await connected(lab)
        assert await to_the_end(client.reader) == b""
        client.writer.close()
        kept = await connected(lab)
        for _ in range(2):
            kept.writer.write(GET)
            assert (await kept.reader.readline()).split()[1] == b"200"
            await kept.reader.readuntil(b"}")
        assert await to_the_end(kept.reader) == b""
        kept.writer.close()


async def test_an_idle_connection_outlives_the_time_for_a_head(plugins: Path, data_dir: Path) -> None:
    async with attacked(plugins, data_dir, request_head_s=0.1) as lab:
        kept, silent = await connected(lab), await connected(lab)
        kept.writer.write(GET)
        await kept.reader.readuntil(b"}")
        for _ in range(3):  # each is open for as long as the time for a head
            assert await to_the_end(silent.reader) == b""
            silent.writer.close()
            silent = await connected(lab)
        kept.writer.write(GET)
        assert (await kept.reader.readline()).split()[1] == b"200"
        for client in (kept, silent):
            client.writer.transport.abort()


async def test_a_call_may_take_longer_than_a_head(plugins: Path, data_dir: Path, tmp_path: Path) -> None:
    async with attacked(plugins, data_dir, request_head_s=0.1) as lab:
        gate, calls = tmp_path / "gate", connections(lab)
        holding = asyncio.create_task(lab.run("hold", gate=str(gate)))
        await until(lambda: connections(lab) > calls)
        silent = await connected(lab)
        assert await to_the_end(silent.reader) == b""  # by now the call has taken longer
        silent.writer.close()
        gate.touch()
        assert (await holding)[0] == 200


BODIES = {"json": (RUN, JSON, b'{"text": "'), "form": (UPLOAD, FORM, PART)}


@pytest.mark.parametrize("body", BODIES)
async def test_a_body_that_trickles_is_told_408_and_removed(plugins: Path, data_dir: Path, body: str) -> None:
    """A byte now and then is not enough: it must keep to a rate."""
    path, kind, begin = BODIES[body]
    async with attacked(plugins, data_dir, {STALL_S: 0.3}, min_body_bytes_per_s=5000) as lab:
        client = await connected(lab)
        client.writer.write(post(path, begin, kind, length=1_000_000))
        reply = await client.until_ended(b"x")
        assert (reply.status, reply.json["error_type"]) == (408, "BodyStalled")


async def test_a_slow_body_that_keeps_to_the_rate_is_taken(plugins: Path, data_dir: Path) -> None:
    async with attacked(plugins, data_dir, {STALL_S: 0.2}, min_body_bytes_per_s=100) as lab:
        reader, writer = await connect(address_of(lab))
        text = "y" * 120
        body = f'{{"text": "{text}"}}'.encode()
        writer.write(post(RUN, b"", JSON, length=len(body)))
        for byte in body:
            writer.write(bytes([byte]))
            await writer.drain()
            await asyncio.sleep(0.005)  # 200 bytes in a second, over several times the stall
        reply = parsed(await to_the_end(reader))
        assert (reply.status, reply.json["value"]) == (200, text)
        writer.close()


async def test_an_answer_that_is_not_taken_is_cut_off(plugins: Path, data_dir: Path) -> None:
    """Whether it waits in the handler or was handed to the socket, and however the connection would end."""
    async with attacked(plugins, data_dir, {STALL_S: 0.3}) as lab:
        stuck = [await connect(address_of(lab), limit=1024, receive_bytes=4096) for _ in range(3)]
        large = post(RUN, b'{"text": "0123456789", "times": 800000}', JSON)
        kept = large.replace(b"Connection: close\r\n", b"")
        for (_, writer), request in zip(stuck, (large, kept, GET * 20_000), strict=True):
            writer.write(request)
        await until(lambda: connections(lab) == 3)
        await no_connections(lab)
        for reader, writer in stuck:
            taken = await to_the_end(reader)
            assert len(taken) < 8_000_000
            writer.close()


# Too many


async def test_beyond_the_limit_who_waits_longest_makes_room(plugins: Path, data_dir: Path) -> None:
    async with attacked(plugins, data_dir, max_connections=8) as lab:
        idle = [await connected(lab) for _ in range(8)]
        await until(lambda: connections(lab) == 8)
        for oldest in idle[:3]:
            newcomer = await connected(lab)
            newcomer.writer.write(post(RUN, ECHO, JSON).replace(b"Connection: close\r\n", b""))
            assert (await newcomer.reader.readline()).split()[1] == b"200"
            assert await to_the_end(oldest.reader) == b""
        idle[3].writer.write(GET)
        assert (await idle[3].reader.readline()).split()[1] == b"200"
        for client in idle:
            client.writer.transport.abort()


async def test_where_all_are_at_work_health_is_answered_and_the_rest_told_503(
    plugins: Path, data_dir: Path
) -> None:
    async with attacked(plugins, data_dir, max_connections=8) as lab, AsyncExitStack() as stack:
        address = address_of(lab)
        for _ in range(8):
            await stack.enter_async_context(working(lab))
        for _ in range(20):
            await healthy(address)
        for request in (post(RUN, b"{}"), EVENTS, post("/v1/plugins/lab/restart", b"")):
            reply = await ask(address, request)
            assert (reply.status, reply.json["reason_code"]) == (503, "service_unavailable")
            assert reply.headers["retry-after"] == "1"
            assert "max_connections" in reply.json["error"]
        for path in ("/livez", "/readyz", "/v1/plugins", "/metrics"):
            assert (await ask(address, f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())).status == 200
        # Those that are let in for health and say nothing do not keep others from it.
        silent = [await connect(address) for _ in range(50)]
        await healthy(address)
        for _, writer in silent:
            writer.transport.abort()


async def test_no_crowd_keeps_a_probe_from_health(plugins: Path, data_dir: Path) -> None:
    """Those let in for health alone make room for each other, whatever they do."""
    async with attacked(plugins, data_dir, max_connections=8) as lab, AsyncExitStack() as stack:
        for _ in range(8):
            await stack.enter_async_context(working(lab))
        head = post(RUN, b"{", length=1_000_000)
        for request in (b"", b"GET /v1/plu", head, GET * 1000):
            crowd = [await connect(address_of(lab)) for _ in range(12)]
            for _, writer in crowd:
                writer.write(request)
            await healthy(address_of(lab))
            for _, writer in crowd:
                writer.transport.abort()


@asynccontextmanager
async def working(lab: Lab) -> AsyncIterator[None]:
    """A connection whose handler waits for the rest of a body, or that was refused."""
    reader, writer = await connect(address_of(lab))
    writer.write(post(RUN, b"{", JSON, "Expect: 100-continue", length=100))
    await reader.readline()  # 100: the handler is there
    try:
        yield
    finally:
        writer.transport.abort()


async def test_streams_are_bounded_and_the_rest_goes_on(plugins: Path, data_dir: Path, tmp_path: Path) -> None:
    async with attacked(plugins, data_dir, max_streams=3, request_head_s=0.2) as lab:
        address = address_of(lab)
        streams = [await connected(lab) for _ in range(3)]
        for stream in streams:
            stream.writer.write(EVENTS)
            assert (await stream.reader.readline()).split()[1] == b"200"
        ndjson = post(RUN, ECHO, JSON, NDJSON)
        for request in (EVENTS, ndjson):
            reply = await ask(address, request.replace(b"localhost", b"localhost\r\nConnection: close", 1))
            assert (reply.status, reply.json["reason_code"]) == (503, "service_unavailable")
            assert reply.headers["retry-after"] == "1"
            assert "max_streams" in reply.json["error"]
        assert (await lab.run("echo", text="x"))[0] == 200
        assert (await lab.get("/v1/events?after=0", Accept="application/json"))[0] == 200
        assert (await lab.get("/readyz"))[0] == 200
        streams[0].writer.close()
        await until(lambda: lab.http.app[STREAMS].open == 2)
        assert (await ask(address, ndjson)).status == 200
        assert lab.http.app[STREAMS].open == 2
        # A stream is not a slow request: it outlives the time for a head.
        silent = await connected(lab)
        assert await to_the_end(silent.reader) == b""
        silent.writer.close()
        assert not streams[1].reader.at_eof()
        for stream in streams[1:]:
            stream.writer.transport.abort()
        await until(lambda: lab.http.app[STREAMS].open == 0)
