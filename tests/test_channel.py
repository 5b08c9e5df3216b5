"""The engine's ends of what connects it with a worker: channel, arena, output, stack pipe, arguments in flight."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import hashlib
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from msgspec import msgpack
from support import feed, open_descriptors

from engine.sandbox import arena, fingerprint, values, wire
from engine.sandbox.channel import Channel
from engine.sandbox.fingerprint import Argument, InFlight
from engine.sandbox.output import Output
from engine.sandbox.stack import StackPipe

MIB = 1024 * 1024
F_SETPIPE_SZ = 1031


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


# The channel, on a real socket.


async def connected(
    end: socket.socket, on_message: Callable[[Any], None], on_lost: Callable[[str | None], None]
) -> Channel:
    channel = Channel(on_message, on_lost)
    await channel.connect(end)
    channel.hear()
    return channel


async def test_a_channel_hands_on_nothing_before_it_is_to_hear() -> None:
    heard: asyncio.Queue[Any] = asyncio.Queue()
    ours, theirs = socket.socketpair()
    channel = Channel(heard.put_nowait, lambda _: None)
    with theirs:
        theirs.sendall(wire.frame(wire.Began(1)))
        await channel.connect(ours)
        # The other direction has gone round the loop meanwhile, and what came before it was read.
        channel.send(wire.Began(2))
        assert await asyncio.to_thread(theirs.recv, 64)
        assert heard.empty()
        channel.hear()
        assert heard.get_nowait() == wire.Began(1)
        theirs.sendall(wire.frame(wire.Began(3)))
        assert await asyncio.wait_for(heard.get(), 10) == wire.Began(3)
        channel.close()


async def test_a_channel_whose_other_end_closed_takes_everything_and_does_nothing() -> None:
    lost: asyncio.Queue[str | None] = asyncio.Queue()
    ours, theirs = socket.socketpair()
    channel = await connected(ours, lambda _: None, lost.put_nowait)
    theirs.close()
    async with asyncio.timeout(10):
        assert await lost.get() is None
    channel.pause()
    channel.resume()
    channel.send(wire.Began(1))
    channel.close()
    assert lost.empty(), "it is lost once"


async def test_a_channel_that_is_closed_before_it_is_connected_takes_everything_and_does_nothing() -> None:
    lost: list[str | None] = []
    channel = Channel(lambda _: None, lost.append)
    channel.hear()
    channel.send(wire.Began(1))
    channel.pause()
    channel.resume()
    channel.close()
    feed(channel, wire.frame(wire.Began(1)))
    assert lost == []


async def test_a_paused_channel_reads_on_only_when_it_is_resumed() -> None:
    heard: asyncio.Queue[Any] = asyncio.Queue()
    ours, theirs = socket.socketpair()
    channel = await connected(ours, heard.put_nowait, lambda _: None)
    with theirs:
        channel.pause()
        theirs.sendall(wire.frame(wire.Began(1)))
        # The other direction has gone round the loop meanwhile, and nothing was read.
        channel.send(wire.Began(2))
        assert await asyncio.to_thread(theirs.recv, 64)
        assert heard.empty()
        channel.resume()
        assert await asyncio.wait_for(heard.get(), 10) == wire.Began(1)
        channel.close()


# The arena.


def test_an_arena_that_cannot_be_made_leaves_no_descriptor() -> None:
    before = open_descriptors()
    with pytest.raises(OSError, match="Invalid argument"):
        arena.create(-MIB)
    assert open_descriptors() == before


def test_an_arena_stays_mapped_for_as_long_as_somebody_looks_at_it() -> None:
    fd = arena.create(MIB)
    shared = arena.Arena(fd, writable=True)
    try:
        view = shared.view(*shared.write(b"frame"))
        assert not shared.release()
        os.close(fd)
        fd = -1
        assert bytes(view) == b"frame"
        view.release()
        assert shared.release(), "there is nothing left to unmap"
    finally:
        if fd >= 0:
            os.close(fd)


async def test_more_than_the_socket_takes_at_once_arrives_whole_and_in_order() -> None:
    ours, theirs = socket.socketpair()
    channel = await connected(ours, lambda _: None, lambda _: None)
    lines = [wire.LogLine("info", character * 150_000) for character in "abcdef"]
    for line in lines[:3]:
        channel.send(line)  # the second no longer whole, the third not at all
    channel.write_soon(wire.frame(lines[3]))
    channel.write_soon(wire.frame(lines[4]))
    await asyncio.sleep(0)
    channel.send(lines[5])
    frames = b"".join(map(wire.frame, lines))
    with theirs, theirs.makefile("rb") as file:
        assert await asyncio.to_thread(file.read, len(frames)) == frames
    channel.close()
    await channel.ended.wait()


async def test_a_full_socket_is_written_to_once_it_is_empty() -> None:
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    filled = 0
    with contextlib.suppress(BlockingIOError):
        while True:
            filled += ours.send(bytes(4096))
    channel = await connected(ours, lambda _: None, lambda _: None)
    channel.send(wire.Began(7))
    frame = wire.frame(wire.Began(7))
    with theirs, theirs.makefile("rb") as file:
        assert (await asyncio.to_thread(file.read, filled + len(frame)))[filled:] == frame
    channel.close()
    await channel.ended.wait()


async def test_a_write_to_a_socket_that_broke_is_left_to_whoever_reads_it() -> None:
    lost: asyncio.Queue[str | None] = asyncio.Queue()
    ours, theirs = socket.socketpair()
    channel = await connected(ours, lambda _: None, lost.put_nowait)
    theirs.close()
    channel.send(wire.Began(1))
    async with asyncio.timeout(10):
        assert await lost.get() is None


# The output.


async def test_the_output_is_read_to_its_end_however_large_the_pipe_was_made() -> None:
    lines: list[str] = []
    reading, writing = os.pipe()
    capacity = fcntl.fcntl(writing, F_SETPIPE_SZ, MIB)
    output = Output(reading, lambda line, _dropped: lines.append(line), 1e9)
    line = b"x" * 63 + b"\n"
    os.write(writing, line * (capacity // 64 - 1) + b"y" * 63 + b"\n")
    os.close(writing)
    output.close()
    os.close(reading)
    assert len(lines) == capacity // 64
    assert output.tail().splitlines()[-1] == "y" * 63


async def test_output_that_somebody_still_holds_open_is_not_waited_for() -> None:
    lines: list[str] = []
    reading, writing = os.pipe()
    try:
        output = Output(reading, lambda line, _dropped: lines.append(line), 1e9)
        os.write(writing, b"all there is\nhalf")
        output.close()
        output.close()
        assert lines == ["all there is", "half"], "closed once"
    finally:
        os.close(writing)
        os.close(reading)


# The stack pipe.


async def test_a_stack_that_was_cut_off_by_the_end_of_its_worker_is_not_waited_for() -> None:
    reading, writing = os.pipe2(os.O_NONBLOCK)
    pipe = StackPipe(reading)
    try:
        os.write(writing, b"Current thread 0x1 (most recent call first):\n")
        os.close(writing)
        assert not await pipe.arrived()
        assert pipe.text().startswith("Current thread")
    finally:
        pipe.close()


async def test_a_stack_pipe_that_is_closed_is_not_waited_for_and_not_read() -> None:
    reading, writing = os.pipe2(os.O_NONBLOCK)
    pipe = StackPipe(reading)
    os.write(writing, b"Fatal Python error")
    assert pipe.text() == "Fatal Python error"
    waiting = asyncio.create_task(pipe.arrived())
    await asyncio.sleep(0)
    os.write(writing, b": more")
    pipe.close()
    assert os.dup2(writing, reading) == reading  # the number is another one's now
    assert not await waiting
    assert not await pipe.arrived()
    assert pipe.text() == "Fatal Python error"
    assert not asyncio.get_running_loop().remove_reader(reading)
    os.close(reading)
    os.close(writing)


# Arguments in flight.


def in_flight(arguments: dict[str, Any], shared: arena.Arena, encoding: str = "python") -> tuple[Argument, ...]:
    encoded = values.Encoder(shared).encode(arguments)
    names = ",".join(f'"{name}": {{}}' for name in arguments)
    call = InFlight("work", "r", 1.0, wire.Encoded(encoding, encoded), f'{{"properties": {{{names}}}}}', shared.fd)
    try:
        return call.fingerprints()
    finally:
        call.close()


def test_an_argument_that_has_no_json_form_is_hashed_as_it_was_sent() -> None:
    fd = arena.create(MIB)
    shared = arena.Arena(fd, writable=True)
    try:
        unknown = [msgpack.Ext(99, msgpack.encode("?"))]
        assert in_flight({"unknown": unknown}, shared) == (
            Argument("unknown", "msgpack", len(msgpack.encode(unknown)), digest(msgpack.encode(unknown))),
        )
    finally:
        shared.release()
        os.close(fd)


def test_a_file_that_is_none_or_is_gone_is_named_without_a_hash(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    fd = arena.create(MIB)
    shared = arena.Arena(fd, writable=True)
    try:
        for path in (pipe, tmp_path):
            told = in_flight({"clip": values.FilePart(str(path))}, shared, "form")
            assert told == (Argument("clip", "file", 0, None),)
        gone = in_flight({"clip": values.FilePart(str(tmp_path / "gone"))}, shared, "form")
        assert gone == (Argument("clip", "file", 0, None),)
    finally:
        shared.release()
        os.close(fd)


def test_an_arena_that_refers_to_itself_again_and_again_is_not_hashed_for_ever(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(fingerprint, "_BUDGET_BYTES", 10 * MIB)
    fd = arena.create(MIB)
    shared = arena.Arena(fd, writable=True)
    try:
        whole = msgpack.Ext(values.EXT_ARENA_BYTES, msgpack.encode((0, MIB)))
        encoded = msgpack.encode({f"a{n}": whole for n in range(11)})
        call = InFlight("work", "r", 1.0, wire.Encoded("python", encoded), "{}", fd)
        assert call.fingerprints() == (Argument("", "python", len(encoded), digest(encoded)),)
        call.close()
    finally:
        shared.release()
        os.close(fd)
