"""The server below the application: it lets connections in, and looks after all of them at once.

When all places are taken, the connection that has waited longest for its client makes room. Where all of them are
at work, a few more are let in that can only read health (`crowded`), so that a probe gets through.
"""

from __future__ import annotations

import asyncio
from collections import deque
from operator import itemgetter
from typing import Any

import structlog
from aiohttp import web

from engine.api.connections import Connection, Limits
from engine.api.keys import ENGINE, STALL_S

log = structlog.get_logger(__name__)

_LOOK_S = 1.0  # between two looks at all connections, at most
_NEVER_S = 86_400.0  # aiohttp's own limit on idle connections counts a half head as idle; ours does not


class Connections(web.Server):
    """All connections of a server.

    Args:
        made: what aiohttp made of the application.
        limits: of connections.
        options: of a `Connection`.
    """

    def __init__(self, made: web.Server, limits: Limits, **options: Any) -> None:
        super().__init__(
            made.request_handler,
            request_factory=made.request_factory,
            handler_cancellation=made.handler_cancellation,
        )
        self.limits = limits
        self._options = options
        self._all: set[Connection] = set()
        self._counted: set[Connection] = set()  # less those that are being closed to make room
        self._patient: deque[tuple[Connection, float]] = deque()  # that waited when it was made, the longest first
        self._crowd: dict[Connection, None] = {}  # the oldest first
        self._crowded = 0  # since the last look
        self._interval_s = min(_LOOK_S, limits.head_s / 4, limits.idle_s / 4, limits.stall_s / 4)
        self._timer = self._loop.call_later(self._interval_s, self._look)

    def __call__(self) -> Connection:
        return Connection(self, loop=self._loop, **self._options)

    def connection_made(self, handler: web.RequestHandler, transport: asyncio.Transport) -> None:
        """Let it in: as one of those that count, or, where all of these are at work, into the crowd."""
        super().connection_made(handler, transport)
        assert isinstance(handler, Connection)  # noqa: S101 - we made it
        self._all.add(handler)
        if len(self._counted) < self.limits.connections or self._make_room():
            self._counted.add(handler)
            return
        handler.enter_crowd()
        self._crowded += 1
        self._crowd[handler] = None
        if len(self._crowd) > self.limits.crowded:
            next(iter(self._crowd)).cut()  # what it asked for takes a millisecond: it had its time

    def connection_lost(self, handler: web.RequestHandler, exc: BaseException | None = None) -> None:
        """It is gone."""
        super().connection_lost(handler, exc)
        assert isinstance(handler, Connection)  # noqa: S101 - we made it
        self._all.discard(handler)
        self._counted.discard(handler)
        self._crowd.pop(handler, None)

    def _make_room(self) -> bool:
        """Close the connection that has waited longest for its client; False where none waits."""
        for _ in range(2):
            while self._patient:
                connection, since_s = self._patient.popleft()
                if connection in self._counted and connection.waits_since_s == since_s:
                    self._counted.discard(connection)
                    connection.force_close()
                    return True
            waiting = [(one, one.waits_since_s) for one in self._counted if one.waits_since_s is not None]
            self._patient.extend(sorted(waiting, key=itemgetter(1)))
        return False

    def _look(self) -> None:
        self._timer = self._loop.call_later(self._interval_s, self._look)  # first: whatever happens below
        now_s = self._loop.time()
        for connection in tuple(self._all):
            connection.look(now_s, self.limits)
        if self._crowded:
            log.warning("connections_crowded", count=self._crowded, limit=self.limits.connections)
            self._crowded = 0

    async def shutdown(self, timeout: float | None = None) -> None:
        """End every connection, after what its handler still does in `timeout` seconds."""
        await super().shutdown(timeout)
        self._timer.cancel()
        for connection in tuple(self._all):
            connection.cut()


class Runner(web.AppRunner):
    """Runs the application over connections that are looked after.

    Args:
        app: the application.
        options: of aiohttp's connections.
    """

    def __init__(self, app: web.Application, **options: Any) -> None:
        # A body is taken as it comes: what a client has packed, no handler of ours unpacks.
        super().__init__(app, access_log=None, auto_decompress=False, keepalive_timeout=_NEVER_S, **options)

    async def _make_server(self) -> web.Server:
        app = self.app
        limits = Limits.of(app[ENGINE].settings, app[STALL_S])
        options = {name: value for name, value in self._kwargs.items() if name != "handler_cancellation"}
        return Connections(await super()._make_server(), limits, on_fault=app[ENGINE].note_fault, **options)
