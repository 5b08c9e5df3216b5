"""The workers of one incarnation, and the bounded queue of calls that wait for one."""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Protocol

from engine.errors import Cause
from engine.sandbox.host import Worker
from engine.sandbox.replies import Invocation
from engine.sandbox.verdict import Ending


class QueueFull(Exception):
    """As many calls wait as may wait."""


class PoolClosed(Exception):
    """No call gets a worker any more; `cause` says why."""

    def __init__(self, cause: Cause) -> None:
        super().__init__(cause.reason)
        self.cause = cause


class Waiting(Invocation, Protocol):
    """A call that wants a worker."""

    def sent_to(self, worker: Worker) -> None:
        """It has one, which it gives back to the pool in the end. It may not begin at once. Must not raise."""


class Pool:
    """Hands out workers, first come, first served. Lives on the engine's event loop.

    Synchronous throughout: the worker that answers one call has the next one before the loop does anything else.
    A worker that is the only one gets short calls even before (`engine.sandbox.calls`): among several, another one
    might be free sooner.

    Invariant: nobody waits while a worker is idle.

    Args:
        workers: all INITIALIZED.
        queue: how many calls may wait.
    """

    def __init__(self, workers: list[Worker], queue: int) -> None:
        self.workers = tuple(workers)
        self._queue = queue
        self._idle = deque(workers)
        self._only = workers[0] if len(workers) == 1 else None
        self._waiting: deque[Waiting] = deque()
        self._kept: Waiting | None = None  # the first of them, if it is known that it cannot be sent ahead
        self._closed: Cause | None = None
        self._leased = 0  # calls that have a worker
        self._free = asyncio.Event()  # set iff there are none
        self._free.set()

    @property
    def waiting(self) -> int:
        """How many calls have not begun."""
        return len(self._waiting) + (0 if self._only is None else self._only.calls.ahead)

    def submit(self, call: Waiting) -> None:
        """Begin the call now, or once a worker is free.

        Raises:
            QueueFull: too many calls wait already.
            PoolClosed: the plugin left service.
        """
        if self._closed is not None:
            raise PoolClosed(self._closed)
        if self._has_idle():
            self._begin(call)
        elif self.waiting >= self._queue:
            raise QueueFull
        else:
            self._waiting.append(call)
            self._hand_out()

    def withdraw(self, call: Waiting) -> bool:
        """Let a call go that no worker has. False: one has, and it goes on."""
        if call not in self._waiting:
            return False
        self._waiting.remove(call)
        return True

    def give_back(self, worker: Worker) -> None:
        """A call is over: the next one's turn."""
        self._leased -= 1
        if self._leased == 0:
            self._free.set()
        if self._closed is None:
            if worker.calls.free:
                self._idle.append(worker)
            self._hand_out()

    def _has_idle(self) -> bool:
        """A worker that died is none: what waits then is turned away with the cause, once that is known."""
        while self._idle and self._idle[0].gone:
            self._idle.popleft()
        return bool(self._idle)

    def _hand_out(self) -> None:
        while self._waiting:
            call = self._waiting[0]
            if self._has_idle():
                self._begin(self._waiting.popleft())
            elif self._only is not None and call is not self._kept and self._only.calls.takes_ahead:
                if not self._only.calls.send_ahead(call):
                    self._kept = call
                    return
                self._waiting.popleft()
                self._lease(self._only, call)
            else:
                return

    def _begin(self, call: Waiting) -> None:
        worker = self._idle.popleft()
        self._lease(worker, call)
        worker.begin(call)

    def _lease(self, worker: Worker, call: Waiting) -> None:
        self._kept = None
        self._leased += 1
        self._free.clear()
        call.sent_to(worker)

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
