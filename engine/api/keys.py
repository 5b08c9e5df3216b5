"""What the routes find in their application, and the work that outlives a request."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from aiohttp import web

from engine.engine import Engine

T = TypeVar("T")


class Background:
    """Owns what must go on when its request is over, such as the removal of an upload."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[Any]] = set()

    def start(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """Run a coroutine that no request can cancel."""
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def run(self, work: Coroutine[Any, Any, T]) -> T:
        """The result of `work`, which goes on if whoever waits here is cancelled."""
        return await asyncio.shield(self.start(work))

    async def close(self) -> None:
        """Wait for what is left; each of it ends with its call."""
        if self._tasks:
            await asyncio.wait(self._tasks)


class Streams:
    """The open event streams: so that stopping can wake and end them."""

    def __init__(self) -> None:
        self.stopping = False
        self._waits: set[asyncio.Timeout] = set()

    def stop(self) -> None:
        """End every stream that waits, and let none begin to wait."""
        self.stopping = True
        now_s = asyncio.get_running_loop().time()
        for wait in self._waits:
            wait.reschedule(now_s)

    async def wait(self, work: Coroutine[Any, Any, T], timeout_s: float) -> T:
        """The result of `work`.

        Raises:
            TimeoutError: it did not come in time, or the streams are to end.
        """
        wait = asyncio.timeout(timeout_s)
        async with wait:
            self._waits.add(wait)
            try:
                return await work
            finally:
                self._waits.discard(wait)


ENGINE = web.AppKey("engine", Engine)
BACKGROUND = web.AppKey("background", Background)
STREAMS = web.AppKey("streams", Streams)
KEEP_ALIVE_S = web.AppKey("keep_alive_s", float)  # between two signs of life on an event stream
STALL_S = web.AppKey("stall_s", float)  # a reader or sender whose socket moves nothing for so long is dropped
