"""A streamed answer to a reader that may be slow, or gone."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from contextlib import suppress
from types import TracebackType

from aiohttp import web


class Outlet:
    """Sends an answer piece by piece; leaving it by an exception cuts the connection, so that nobody takes
    half an answer for a whole one.

    A reader whose socket takes nothing for `stall_s` to twice that is cut off. The time is measured on the
    socket, not on `send`: a reader may take long for a large piece, as long as it takes.

    Raises (from `send`):
        ConnectionError: the reader is gone.
    """

    def __init__(
        self, request: web.Request, content_type: str, stall_s: float, headers: Mapping[str, str] | None = None
    ) -> None:
        self._request = request
        self._response = web.StreamResponse(headers=headers)
        self._response.content_type = content_type
        self._stall_s = stall_s
        self._loop = asyncio.get_running_loop()
        self._sent = 0
        self._taken = 0
        self._moved_s = 0.0
        self._timer: asyncio.TimerHandle | None = None

    @property
    def response(self) -> web.StreamResponse:
        """For the handler to return."""
        return self._response

    async def __aenter__(self) -> Outlet:
        await self._response.prepare(self._request)
        self._moved_s = self._loop.time()
        self._look()
        return self

    async def send(self, data: bytes) -> None:
        """Send a piece; waits while the reader is behind."""
        self._sent += len(data)
        await self._response.write(data)

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                with suppress(ConnectionError):
                    await self._response.write_eof()
        finally:
            if self._timer is not None:
                self._timer.cancel()
            if kind is not None:
                self._cut()

    def _look(self) -> None:
        """Whether the socket took anything since the last look."""
        transport = self._request.transport
        if transport is None:
            return
        waiting = transport.get_write_buffer_size()
        taken = self._sent - waiting
        now_s = self._loop.time()
        if not waiting or taken > self._taken:
            self._taken, self._moved_s = taken, now_s
        elif now_s - self._moved_s >= self._stall_s:
            self._cut()
            return
        self._timer = self._loop.call_later(self._stall_s / 2, self._look)

    def _cut(self) -> None:
        if self._request.transport is not None:
            self._request.transport.abort()
