"""The workers of one incarnation, and the bounded queue of calls that wait for one."""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Protocol

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


class Waiting(Protocol):
    """A call that wants a worker. Neither method may raise."""

    def begin(self, worker: Worker) -> None:
        """It has one, for itself until it gives it back to the pool."""

    def turned_away(self, cause: Cause) -> None:
        """It gets none: the plugin left service while the call waited."""


class Pool:
    """Hands out workers, first come, first served. Lives on the engine's event loop.

    Synchronous throughout: the worker that answers one call has the next one before the loop does anything else.

    Invariant: a worker is idle, or belongs to exactly one call; nobody waits while one is idle.

    Args:
        workers: all INITIALIZED.
        queue: how many calls may wait.
    """

    def __init__(self, workers: list[Worker], queue: int) -> None:
        self.workers = tuple(workers)
        self._queue = queue
        self._idle = deque(workers)
        self._waiting: deque[Waiting] = deque()
        self._closed: Cause | None = None
        self._leased = 0
        self._free = asyncio.Event()  # set iff no call has a worker
        self._free.set()

    @property
    def waiting(self) -> int:
        """How many calls wait for a worker."""
        return len(self._waiting)

    def submit(self, call: Waiting) -> None:
        """Begin the call now, or once a worker is free.

        Raises:
            QueueFull: too many calls wait already.
            PoolClosed: the plugin left service.
        """
        if self._closed is not None:
            raise PoolClosed(self._closed)
        if self._idle:
            self._lease(self._idle.popleft(), call)
        elif len(self._waiting) >= self._queue:
            raise QueueFull
        else:
            self._waiting.append(call)

    def withdraw(self, call: Waiting) -> bool:
        """Let a call go that has not begun. False: it has, and goes on."""
        if call not in self._waiting:
            return False
        self._waiting.remove(call)
        return True

    def _lease(self, worker: Worker, call: Waiting) -> None:
        self._leased += 1
        self._free.clear()
        call.begin(worker)

    def give_back(self, worker: Worker) -> None:
        """The call is over: the next one's turn."""
        self._leased -= 1
        if self._leased == 0:
            self._free.set()
        if self._closed is not None or worker.dead:
            return
        if self._waiting:
            self._lease(worker, self._waiting.popleft())
        else:
            self._idle.append(worker)

    def close(self, cause: Cause) -> None:
        """Refuse every call that waits or comes. The first cause stands."""
        if self._closed is not None:
            return
        self._closed = cause
        self._idle.clear()
        while self._waiting:
            self._waiting.popleft().turned_away(cause)

    async def end(self) -> None:
        """End every worker that still lives; returns once all are gone and every call has its outcome."""
        await asyncio.gather(*(worker.end(Ending.STOP) for worker in self.workers))
        await self._free.wait()
