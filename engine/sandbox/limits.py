"""Memory, watched from outside: the resident memory of each worker's whole process tree.

`RLIMIT_DATA` in the worker makes an allocation past the limit fail at once, but for one process at a time. This
watch sees the tree, and what is not private data. Both are needed.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Protocol

import structlog

from engine.sandbox import proc

log = structlog.get_logger(__name__)

_IDLE_INTERVALS = 10  # with no worker busy, one look in ten is enough


class Watched(Protocol):
    """A worker, as far as this watch is concerned."""

    pid: int
    memory_limit_bytes: int
    memory_bytes: int
    memory_peak_bytes: int

    @property
    def busy(self) -> bool:
        """Whether plugin code may be running."""

    def on_memory_breach(self) -> None:
        """It is over its limit: end it."""


class MemoryWatch:
    """Looks at all workers together, every `interval_s` while any is busy.

    Args:
        interval_s: between two looks.
        on_fault: counts a look that failed; the next one is due all the same.
    """

    def __init__(self, interval_s: float, on_fault: Callable[[str, BaseException], None]) -> None:
        self._interval_s = interval_s
        self._on_fault = on_fault
        self._workers: dict[int, Watched] = {}
        self._wake = asyncio.Event()
        self.oom_kills = 0  # as of the last look

    def add(self, worker: Watched) -> None:
        """Watch it from now on."""
        self._workers[worker.pid] = worker
        self._wake.set()

    def discard(self, worker: Watched) -> None:
        """Its process is gone."""
        self._workers.pop(worker.pid, None)

    async def run(self) -> None:
        """Watch until cancelled. Does nothing while there is no worker."""
        self.oom_kills = await asyncio.to_thread(proc.oom_kills)
        skipped = 0
        while True:
            if not self._workers:
                self._wake.clear()
                await self._wake.wait()
            await asyncio.sleep(self._interval_s)
            skipped += 1
            if skipped < _IDLE_INTERVALS and not any(w.busy for w in self._workers.values()):
                continue
            skipped = 0
            try:
                await self._look()
            except Exception as exc:  # a watch that died would be a limit that is gone
                log.exception("memory_watch_fault")
                self._on_fault("memory_watch", exc)

    async def _look(self) -> None:
        used = await asyncio.to_thread(proc.resident_bytes, list(self._workers))
        self.oom_kills = await asyncio.to_thread(proc.oom_kills)
        for pid, resident in used.items():
            worker = self._workers.get(pid)
            if worker is None:  # it died while we looked
                continue
            worker.memory_bytes = resident
            worker.memory_peak_bytes = max(worker.memory_peak_bytes, resident)
            if resident > worker.memory_limit_bytes:
                worker.on_memory_breach()
