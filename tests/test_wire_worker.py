"""The worker's end of the wire: what it does when the engine goes, or says what no engine says."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest
from msgspec import msgpack
from support import HONEST, until, write_plugin

from engine.sandbox import arena, wire
from engine.sandbox.spawner import Spawner

ROOT = Path(__file__).resolve().parents[1]
MIB = 1024 * 1024


class Bare:
    """A worker with nobody but the test at the other end of its channel."""

    def __init__(self, channel: socket.socket, output: int, status: asyncio.Future[Any]) -> None:
        self.channel = channel
        self.output = output
        self.status = status
        self.scratch = Path()
        self.pid = 0
        self.arena_out = -1

    @property
    def sleeps(self) -> bool:
        """Whether it waits for something."""
        return Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[0] == "S"

    async def say(self, *messages: wire.Message) -> None:
        """Send a frame of each."""
        await asyncio.get_running_loop().sock_sendall(self.channel, b"".join(map(wire.frame, messages)))

    async def hear(self, kind: type[wire.Message]) -> Any:
        """The next message of a kind."""
        while True:
            (length,) = wire.HEADER.unpack(await self._read(wire.HEADER.size))
            message = wire.from_worker.decode(await self._read(length))
            if isinstance(message, kind):
                return message

    async def exit_code(self) -> int:
        """Its exit status, once it is gone."""
        status = await asyncio.wait_for(asyncio.shield(self.status), 20)
        assert isinstance(status, int)
        return os.waitstatus_to_exitcode(status)

    async def _read(self, length: int) -> bytes:
        data = b""
        while len(data) < length:
            chunk = await asyncio.get_running_loop().sock_recv(self.channel, length - len(data))
            assert chunk, "the worker closed the channel"
            data += chunk
        return data


@asynccontextmanager
async def bare_worker(scratch_root: Path) -> AsyncIterator[Bare]:
    """A worker that has said hello."""
    faults: list[tuple[str, BaseException]] = []
    spawner = Spawner(scratch_root, lambda name, exc: faults.append((name, exc)))
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    output, output_end = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    stack, stack_end = os.pipe2(os.O_CLOEXEC)
    arenas = [arena.create(MIB), arena.create(MIB)]
    try:
        scratch = scratch_root / "work"
        spawned = await spawner.spawn([theirs.fileno(), output_end, stack_end, *arenas], scratch)
        theirs.close()
        os.close(spawned.pidfd)
        worker = Bare(ours, output, spawned.status)
        worker.scratch, worker.pid, worker.arena_out = scratch, spawned.pid, arenas[1]
        async with asyncio.timeout(30):
            hello = await worker.hear(wire.Hello)
            assert (hello.protocol, hello.pid) == (wire.PROTOCOL, spawned.pid)
            yield worker
    finally:
        ours.close()
        theirs.close()
        for fd in (output, output_end, stack, stack_end, *arenas):
            os.close(fd)
        await spawner.close()
        assert not faults, faults


def start_of(folder: Path, worker: Bare, *tools: str) -> wire.Start:
    return wire.Start(
        name=folder.name,
        folder=str(folder),
        entry="plugin:Plugin",
        models={},
        settings=msgpack.encode({}),
        scratch=str(worker.scratch),
        tools=dict.fromkeys(tools, ()),
        memory_bytes=256 * MIB,
        max_result_bytes=MIB,
    )


async def test_a_worker_whose_engine_goes_before_it_says_anything_ends_in_peace(tmp_path: Path) -> None:
    async with bare_worker(tmp_path / "scratch") as worker:
        worker.channel.close()
        assert await worker.exit_code() == 0


async def test_a_worker_does_not_touch_the_plugin_before_it_is_told_to_go(plugins: Path, tmp_path: Path) -> None:
    touched = tmp_path / "touched"
    folder = write_plugin(plugins, "eager", f"open({str(touched)!r}, 'w')", ["work"])
    async with bare_worker(tmp_path / "scratch") as worker:
        await worker.say(start_of(folder, worker, "work"))
        worker.channel.close()
        assert await worker.exit_code() == 0
    assert not touched.exists()


async def test_a_worker_that_could_not_start_ends_in_peace_once_it_has_said_why(
    plugins: Path, tmp_path: Path
) -> None:
    folder = write_plugin(plugins, "broken", "raise RuntimeError('no')", ["work"])
    async with bare_worker(tmp_path / "scratch") as worker:
        await worker.say(start_of(folder, worker, "work"), wire.Go())
        report = await worker.hear(wire.StartFailed)
        assert (report.stage, report.kind, report.message) == ("import", "exception", "no")
        worker.channel.close()
        assert await worker.exit_code() == 0


@pytest.mark.parametrize("when", ["before its start", "instead of go", "after its start"])
async def test_a_worker_that_is_told_what_no_engine_tells_ends_as_broken_and_says_so(
    when: str, plugins: Path, tmp_path: Path
) -> None:
    folder = write_plugin(plugins, "honest", HONEST, ["echo"])
    async with bare_worker(tmp_path / "scratch") as worker:
        start, call = start_of(folder, worker, "echo"), wire.Call(1, "echo", "json", b"{}")
        if when == "after its start":
            await worker.say(start, wire.Go())
            await worker.hear(wire.Ready)
            await worker.say(start)
        else:
            await worker.say(*[start] * (when == "instead of go"), call)
        assert await worker.exit_code() == wire.EXIT_BROKEN
        assert b"holdfast worker: ValidationError" in os.read(worker.output, 65536)


async def test_a_worker_calls_and_answers_with_nothing_of_the_engine_but_the_wire(
    plugins: Path, tmp_path: Path
) -> None:
    folder = write_plugin(plugins, "honest", HONEST, ["echo"])
    async with bare_worker(tmp_path / "scratch") as worker:
        await worker.say(start_of(folder, worker, "echo"), wire.Go())
        ready = await worker.hear(wire.Ready)
        assert msgspec.json.decode(ready.tools["echo"].parameters)["properties"]["text"]["default"] == "hello"
        # In pieces: a frame that has come in part is waited for.
        frame = wire.frame(wire.Call(7, "echo", "json", b'{"text": "piecemeal"}'))
        for byte in frame:
            await asyncio.get_running_loop().sock_sendall(worker.channel, bytes([byte]))
        result = await worker.hear(wire.Result)
        assert (result.call_id, msgpack.decode(result.value)) == (7, "piecemeal")
        worker.channel.close()
        assert await worker.exit_code() == 0
    await until(lambda: not (tmp_path / "scratch").exists())


def test_a_worker_whose_fork_server_died_before_it_was_bound_to_it_does_not_begin() -> None:
    code = "from engine.worker import confine; import os; confine.detach(os.getpid())"  # nobody is its own parent
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "ProcessLookupError: the fork server is gone" in done.stderr


async def test_a_plugin_is_given_what_the_engine_has_sent(plugins: Path, tmp_path: Path) -> None:
    code = """
    import copy
    class Plugin:
        def __init__(self, context):
            context.log.info("a copy is as good")
            self.context = copy.deepcopy(context)
        def validate(self): pass
        def work(self) -> list:
            given = self.context
            assert given.models is given.models
            return [str(given.models["detector"]), given.settings, str(given.scratch)]
    """
    folder = write_plugin(plugins, "asks", code, ["work"])
    async with bare_worker(tmp_path / "scratch") as worker:
        start = start_of(folder, worker, "work")
        model = folder / "detector.pt"
        model.touch()
        models, settings = {"detector": str(model)}, msgpack.encode({"level": 3})
        await worker.say(msgspec.structs.replace(start, models=models, settings=settings), wire.Go())
        await worker.hear(wire.Ready)
        await worker.say(wire.Call(1, "work", "json", b"{}"))
        value = msgpack.decode((await worker.hear(wire.Result)).value)
        assert value == [str(model), {"level": 3}, str(worker.scratch)]
