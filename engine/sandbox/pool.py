"""The workers of one incarnation, and the bounded queue of calls that wait for one."""

from __future__ import annotations

import asyncio
from collections import deque

from engine.errors import Cause
from engine.sandbox.host import Worker
from engine.sandbox.verdict import Ending


class QueueFull(Exception):
    """As many calls wait as may wait."""


class PoolClosed(Exception):
    """No call gets a worker any more; `cause` says why."""

    def __init__(self, cause: Cause) -> None:
        super().__init__(cause.reason)
        self.cause = cause


class Pool:
    """Hands out workers, first come, first served. Lives on the engine's event loop.

    Invariant: a worker is idle, or leased to exactly one call; nobody waits while one is idle.

    Args:
        workers: all INITIALIZED.
        queue: how many calls may wait.
    """

    def __init__(self, workers: list[Worker], queue: int) -> None:
        self.workers = tuple(workers)
        self._queue = queue
        self._idle = deque(workers)
        self._waiting: deque[asyncio.Future[Worker]] = deque()
        self._closed: Cause | None = None
        self._leased = 0
        self._free = asyncio.Event()  # set iff nothing is leased
        self._free.set()

    @property
    def waiting(self) -> int:
        """How many calls wait for a worker."""
        return len(self._waiting)

    async def lease(self) -> Worker:
        """A worker for one call; give it back afterwards.

        Raises:
            QueueFull: too many calls wait already.
            PoolClosed: the plugin left service, maybe while this call waited.
        """
        if self._closed is not None:
            raise PoolClosed(self._closed)
        if self._idle:
            return self._lease(self._idle.popleft())
        if len(self._waiting) >= self._queue:
            raise QueueFull
        turn: asyncio.Future[Worker] = asyncio.get_running_loop().create_future()
        self._waiting.append(turn)
        try:
            return self._lease(await turn)
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled() and turn.exception() is None:
                self._pass_on(turn.result())  # it was handed over in the very moment of the cancellation
            elif turn in self._waiting:
                self._waiting.remove(turn)
            raise

    def _lease(self, worker: Worker) -> Worker:
        self._leased += 1
        self._free.clear()
        return worker

    def give_back(self, worker: Worker) -> None:
        """The call is over: the next one's turn."""
        self._leased -= 1
        if self._leased == 0:
            self._free.set()
        self._pass_on(worker)

    def _pass_on(self, worker: Worker) -> None:
        if self._closed is not None or worker.dead:
            return
        while self._waiting:
            turn = self._waiting.popleft()
            if not turn.done():
                turn.set_result(worker)
                return
        self._idle.append(worker)

    def close(self, cause: Cause) -> None:
        """Refuse every call that waits or comes. The first cause stands."""
        if self._closed is not None:
            return
        self._closed = cause
        self._idle.clear()
        while self._waiting:
            turn = self._waiting.popleft()
            if not turn.done():
                turn.set_exception(PoolClosed(cause))

    async def end(self) -> None:
        """End every worker that still lives; returns once all are gone and every call has its outcome."""
        await asyncio.gather(*(worker.end(Ending.STOP) for worker in self.workers))
        await self._free.wait()
