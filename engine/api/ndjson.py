"""A call's items as they come: one JSON object per line.

    {"progress": {"done": 3.0, "total": 10.0}}     the latest, between items
    {"item": …}
    {"outcome": {"ok": true, "value": null, …}}    always the last; without it the answer was cut short

What is known before the first item or progress, such as bad input, gets its proper status and no lines. A tool
that does not stream answers the one line of its outcome, with its value.
"""

from __future__ import annotations

import asyncio
from typing import NamedTuple

import msgspec
from aiohttp import web

from engine.api.answers import Told, encode_line, no_json, state_of, tell, told_response
from engine.api.body import Spool
from engine.api.errors import REQUEST_ID
from engine.api.keys import BACKGROUND, STALL_S
from engine.api.outlet import Outlet
from engine.call import Stream
from engine.engine import Engine
from engine.errors import StreamStalled
from engine.outcome import CallFailed, Outcome
from engine.sandbox.wire import Encoded

CONTENT_TYPE = "application/x-ndjson"
_PENDING_BYTES = 256 * 1024  # lines that wait for a slow reader; beyond them the stream has to


class Progress(msgspec.Struct, frozen=True):
    """How far a call is."""

    done: float
    total: float


class Call(NamedTuple):
    """A call to be made."""

    engine: Engine
    plugin: str
    tool: str
    arguments: Encoded
    request_id: str

    def state(self) -> str | None:
        """The plugin's present state."""
        return state_of(self.engine, self.plugin)


class _Lines:
    """Lines on their way: many are sent as one piece when the reader is slower than the tool."""

    def __init__(self) -> None:
        self._pending = bytearray()
        self._progress = b""
        self._ended = False
        self._changed = asyncio.Event()
        self._room = asyncio.Event()
        self._room.set()

    def progress(self, done: float, total: float) -> None:
        """Only the latest that was not sent yet matters."""
        self._progress = encode_line("progress", Progress(done, total))
        self._changed.set()

    async def add(self, line: bytes) -> None:
        """Add a line; waits while too many wait."""
        self._pending += self._progress + line
        self._progress = b""
        self._changed.set()
        if len(self._pending) >= _PENDING_BYTES:
            self._room.clear()
            await self._room.wait()

    def end(self) -> None:
        """No more lines."""
        self._ended = True
        self._changed.set()

    async def take(self) -> bytes:
        """All that waits, once there is something; empty at the end."""
        while not (self._pending or self._progress or self._ended):
            self._changed.clear()
            await self._changed.wait()
        taken = bytes(self._pending + self._progress)
        self._pending.clear()
        self._progress = b""
        self._room.set()
        return taken


def wanted(request: web.Request) -> bool:
    """Whether the caller asked for lines."""
    return CONTENT_TYPE in request.headers.get("Accept", "")


async def answer(request: web.Request, call: Call, spool: Spool) -> web.StreamResponse:
    """Make the call and answer with its lines."""
    lines = _Lines()
    stream = call.engine.stream(
        call.plugin, call.tool, call.arguments, request_id=call.request_id, on_progress=lines.progress
    )
    pump = asyncio.get_running_loop().create_task(_pump(call, stream, lines))
    try:
        first = await lines.take()
        if not first and not (told := await pump).outcome.ok:
            return told_response(told)
        outlet = Outlet(request, CONTENT_TYPE, request.app[STALL_S], {REQUEST_ID: call.request_id})
        async with outlet:
            piece = first
            while piece:
                await outlet.send(piece)
                piece = await lines.take()
            await outlet.send(b'{"outcome":' + (await pump).body + b"}\n")
        return outlet.response
    except StreamStalled as exc:  # the answer was cut: to go on would hide the items that are missing
        raise ConnectionResetError(str(exc)) from exc
    finally:
        pump.cancel()
        request.app[BACKGROUND].start(_finish(stream, spool))
        await asyncio.gather(pump, return_exceptions=True)


async def _pump(call: Call, stream: Stream, lines: _Lines) -> Told:
    """Items into lines, to the end; how the call ended, as it is told."""
    try:
        return tell(await _outcome(call, stream, lines), call.engine, call.plugin)
    finally:
        lines.end()


async def _outcome(call: Call, stream: Stream, lines: _Lines) -> Outcome:
    try:
        async for item in stream:
            try:
                line = encode_line("item", item)
            except Exception as exc:  # a worker's value may be anything that MessagePack can hold
                return no_json(exc, call.state(), call.request_id)
            await lines.add(line)
    except CallFailed as exc:
        return exc.outcome
    assert stream.outcome is not None  # noqa: S101 - what ends the iteration
    return stream.outcome


async def _finish(stream: Stream, spool: Spool) -> None:
    """Whether or not somebody still reads: the call runs to its end, and only then its files are removed."""
    await stream.aclose()
    await stream.ended()
    await spool.remove()
