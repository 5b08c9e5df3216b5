"""What the routes find in their application, and the work that outlives a request."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from aiohttp import web

from engine.api.body import BodyLimits
from engine.api.budget import Budget
from engine.api.errors import busy
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


_LINGER_EACH_S = 100e-6  # more than twice what it takes to send a batch
_LINGER_MOST_S = 0.1  # what a person hardly notices


class Streams:
    """The open streams: so many and no more; stopping can wake and end those of events."""

    def __init__(self, limit: int) -> None:
        self.stopping = False
        self.open = 0
        self._limit = limit
        self._waits: set[asyncio.Timeout] = set()

    @contextmanager
    def place(self) -> Iterator[None]:
        """A stream's place, for as long as it is open.

        Raises:
            Problem: 503, all places are taken.
        """
        if self.open >= self._limit:
            raise busy(
                f"all {self._limit} streams of this server are open; close one, or raise `max_streams`, then retry"
            )
        self.open += 1
        try:
            yield
        finally:
            self.open -= 1

    @property
    def linger_s(self) -> float:
        """How long a stream of events that has sent all there was waits for more before it sends again.

        A batch costs the event loop about as much with one event in it as with twenty. So the more streams are
        open, NDJSON answers included, the fewer batches each is sent: a thousand take less than half of the loop.
        A server that stops waits for this.
        """
        return min(self.open * _LINGER_EACH_S, _LINGER_MOST_S)

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
BODY_LIMITS = web.AppKey("body_limits", BodyLimits)  # from the start of the server on
PENDING = web.AppKey("pending", Budget)  # arguments in memory
UPLOADED = web.AppKey("uploaded", Budget)  # files of forms
KEEP_ALIVE_S = web.AppKey("keep_alive_s", float)  # between two signs of life on an event stream
STALL_S = web.AppKey("stall_s", float)  # a reader or sender whose socket moves nothing for so long is dropped
