"""Memory and processes, watched from outside: what each worker's whole process tree holds.

`RLIMIT_DATA` in the worker makes an allocation past the limit fail at once, but for one process at a time. This
watch sees the tree, and what is not private data. Both are needed. `RLIMIT_NPROC` counts the processes of a user
and does not bind root, so their number is watched, too.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Protocol

from engine.sandbox import proc
from engine.sandbox.evidence import Process

_MAX_MEMBERS = 64  # of a tree, by name
_IDLE_INTERVALS = 10  # with no worker busy, one look in ten is enough


class Watched(Protocol):
    """A worker, as far as this watch is concerned."""

    pid: int
    memory_limit_bytes: int
    memory_bytes: int
    memory_peak_bytes: int
    processes: tuple[Process, ...]
    process_limit: int

    @property
    def busy(self) -> bool:
        """Whether plugin code may be running."""

    def on_memory_breach(self) -> None:
        """It is over its limit: end it."""

    def on_process_breach(self, count: int) -> None:
        """Its tree has so many processes and threads, more than it may: end it."""


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
                self._on_fault("memory_watch", exc)

    async def _look(self) -> None:
        limits = {pid: worker.memory_limit_bytes for pid, worker in self._workers.items()}
        used = await asyncio.to_thread(_measure, limits)
        self.oom_kills = await asyncio.to_thread(proc.oom_kills)
        for pid, (resident, tasks, processes) in used.items():
            worker = self._workers.get(pid)
            if worker is None:  # it died while we looked
                continue
            worker.memory_bytes = resident
            if resident >= worker.memory_peak_bytes:
                worker.memory_peak_bytes, worker.processes = resident, processes
            if tasks > worker.process_limit:
                worker.on_process_breach(tasks)
            elif resident > worker.memory_limit_bytes:
                worker.on_memory_breach()


def _measure(limits: dict[int, int]) -> dict[int, tuple[int, int, tuple[Process, ...]]]:
    """By root, its tree's resident bytes, its processes and threads, and, over half of its limit, whose it is.

    Pages that forked children share are told apart only where counting them for each would be over the limit.
    """
    return {
        root: (
            tree.resident_bytes if tree.resident_bytes <= limits[root] else proc.proportional_bytes(tree.pids),
            tree.tasks,
            _members(tree.pids) if tree.resident_bytes > limits[root] // 2 else (),
        )
        for root, tree in proc.trees(limits).items()
    }


def _members(pids: list[int]) -> tuple[Process, ...]:
    """The largest first."""
    members = [Process(pid, *proc.member(pid)) for pid in pids[:_MAX_MEMBERS]]
    return tuple(sorted(members, key=lambda process: -process.resident_bytes))
