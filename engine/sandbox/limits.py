"""Memory and processes, watched from outside: what each worker's whole process tree holds.

`RLIMIT_DATA` in the worker makes an allocation past the limit fail at once, but for one process at a time. This
watch sees the tree, and what is not private data. Both are needed. `RLIMIT_NPROC` counts the processes of a user
and does not bind root, so their number is watched, too.

    event loop     add · discard                          on_memory_breach · on_process_breach
                       │                                               ▲
    watch thread   look when due: /proc → Reading → over? SIGKILL for the tree, then tell the loop

A thread of its own, so that a busy event loop does not hold a look up, and neither the kill. How soon a tree is
looked at again follows from how soon it could be over.
"""

from __future__ import annotations

import asyncio
import math
import os
import threading
import time
from collections.abc import Callable
from typing import Protocol

from engine.sandbox import priority, proc
from engine.sandbox.evidence import Process
from engine.sandbox.memory import Meter, Reading
from engine.sandbox.scratch import ScratchWatch, tell

_MIB = 1024 * 1024
# What a limit may be exceeded by: a tenth, and no less than this.
ALLOWANCE_BYTES = 64 * _MIB
# The most that a tree is taken to grow in a second: two cores that do nothing but touch new pages.
GROWTH_BYTES_PER_S = 4096 * _MIB
_SHARE = 16  # near the limit, looks are this many times as frequent; a power of two
_COST = 2  # a look is followed by this many times as long without one; while memory grows nowhere, by
_COST_AT_REST = 20
_STIR_BYTES = 4 * _MIB  # less than this on the whole machine is nothing
_WHOLE_INTERVALS = 20  # after so many, all are looked at whatever the machine's figures say
_OOM_BEFORE_S = 1.0  # from the kernel's decision to kill a process until the engine learns of its death, at most
_OOM_KEPT_S = 10.0
_FRESH_LOOKS = 10  # of these, one looks for shared memory anew in a tree that does nothing


class Watched(Protocol):
    """A worker, as far as this watch is concerned. The watch's thread writes `memory_bytes` to `process_count`."""

    pid: int
    pidfd: int
    memory_limit_bytes: int
    process_limit: int
    shm_fd: int | None  # its own /dev/shm; None where it has none
    scratch: str
    scratch_limit_bytes: int

    memory_bytes: int
    memory_peak_bytes: int
    memory_shared_bytes: int  # at the peak
    processes: tuple[Process, ...]
    process_count: int
    over_memory: bool
    over_processes: bool

    @property
    def busy(self) -> bool:
        """Whether plugin code may be running."""

    def on_memory_breach(self) -> None:
        """It was over its limit, and has been sent SIGKILL."""

    def on_process_breach(self) -> None:
        """Likewise, of processes and threads."""

    def on_scratch_breach(self, what: str) -> None:
        """Its scratch folder holds more than it may, and `what` says how much: end it."""


class _Tree:
    """One worker, as the watch's thread sees it.

    Args:
        worker: a new one, which was told a moment ago to touch its plugin.
        machine: from before that, if anything is known of it.
        interval_s: the watch's.
    """

    def __init__(self, worker: Watched, machine: proc.Machine | None, interval_s: float) -> None:
        self.worker = worker
        self.pidfd = os.dup(worker.pidfd)  # ours, so that it means the same process until we close it
        shared_bytes = None if machine is None else machine.shared_bytes
        self.meter = Meter(worker.pid, worker.memory_limit_bytes, worker.process_limit, shared_bytes)
        self.busy_due_s = 0.0
        self.stirs_at_bytes = 0  # taken on the whole machine
        self.expect(0, interval_s)
        self.come_again(time.monotonic())
        self.looks = 0
        self.ended = False

    def close(self) -> None:
        """It is watched no more."""
        os.close(self.pidfd)
        self.meter.close()

    def rests(self, now_s: float, machine: proc.Machine) -> bool:
        """Whether it has not grown much, since memory did not grow on the whole machine."""
        due = self.worker.busy and now_s >= self.busy_due_s
        return machine.taken_bytes < self.stirs_at_bytes and not due

    def looked(self, reading: Reading, machine: proc.Machine, cost_s: float, interval_s: float) -> None:
        """Decide on the next look: in half of the time in which it could use up its allowance."""
        now_s = time.monotonic()
        left = self.expect(reading.used_bytes, interval_s)
        self.come_again(now_s + _COST * cost_s)
        self.busy_due_s = now_s + max(interval_s, _COST_AT_REST * cost_s)
        self.stirs_at_bytes = machine.taken_bytes + max(_STIR_BYTES, left // 8)

    def expect(self, used_bytes: int, interval_s: float) -> int:
        """Choose the period for a tree that holds so much; returns how much more it may take."""
        limit = self.worker.memory_limit_bytes
        left = limit + allowance_bytes(limit) - used_bytes
        self.period_s = interval_s  # a power of two of them: so that many trees are due at once, in one look
        while self.period_s > max(left / GROWTH_BYTES_PER_S / 2, interval_s / _SHARE):
            self.period_s /= 2
        return left

    def come_again(self, after_s: float) -> None:
        """At the next multiple of its period."""
        self.due_s = (after_s // self.period_s + 1) * self.period_s


def allowance_bytes(limit_bytes: int) -> int:
    """By how much a tree may be over its limit for the moment until it is noticed and dead."""
    return max(limit_bytes // 10, ALLOWANCE_BYTES)


class MemoryWatch:
    """Looks at all workers; and, by a watch of its own, at their scratch folders.

    Args:
        interval_s: the longest time between two looks at a worker that is busy; a sixteenth of it near its limit.
        on_fault: counts a look that failed; the next one is due all the same. Called on the event loop.
    """

    def __init__(self, interval_s: float, on_fault: Callable[[str, BaseException], None]) -> None:
        self._interval_s = interval_s
        self._on_fault = on_fault
        self._trees: dict[int, _Tree] = {}  # by id(worker): pids are used again
        self._gone: list[_Tree] = []
        self._wake = threading.Event()
        self._stopping = False
        self._scratch = ScratchWatch(on_fault)
        self._wakes_at_s = math.inf  # when the watch's thread looks next, unless it is woken
        self._machine: proc.Machine | None = None  # at the last look
        self._whole_due_s = 0.0
        self._idle = False  # no worker was there before the next pass
        self._oom_kills: tuple[tuple[float, int], ...] = ((-math.inf, 0),)  # when, and how many by then
        self.looks = 0
        self.cpu_s = 0.0  # of this watch's thread

    def add(self, worker: Watched) -> None:
        """Watch it from now on: it was told to touch its plugin, and until then only our own code ran in it."""
        self._idle = self._idle or not self._trees
        # While there are others, the last look at them was a moment ago.
        tree = _Tree(worker, None if self._idle else self._machine, self._interval_s)
        self._trees[id(worker)] = tree
        self._scratch.add(worker)
        if self._idle or tree.due_s < self._wakes_at_s:
            self._wake.set()

    def discard(self, worker: Watched) -> None:
        """Its process is gone."""
        if (tree := self._trees.pop(id(worker), None)) is not None:
            self._gone.append(tree)
            self._scratch.discard(worker)
            self._wake.set()

    def oom_kills_since(self, died_s: float) -> int:
        """How many processes the kernel's OOM killer has ended from about a second before `died_s` until now, on
        the whole machine. Blocks.

        The kernel counts a kill when it sends the signal, and a large process takes a while to die: a look in
        between has counted it already. So what is compared with is at least a second older than the death, and
        otherwise the oldest there is: from when the first worker came.

        Args:
            died_s: when the engine learnt of a death, as of `time.monotonic`.
        """
        if self._idle:  # nobody has counted since
            return 0
        known = self._oom_kills
        before = [count for at_s, count in known if at_s <= died_s - _OOM_BEFORE_S]
        return proc.oom_kills() - (before[-1] if before else known[0][1])

    async def run(self) -> None:
        """Watch until cancelled. Does nothing while there is no worker."""
        self._oom_kills = ((-math.inf, await asyncio.to_thread(proc.oom_kills)),)
        loop = asyncio.get_running_loop()
        thread = threading.Thread(target=self._work, args=(loop,), name="memory-watch", daemon=True)
        thread.start()
        try:
            await self._scratch.run()
        finally:
            self._stopping = True
            self._wake.set()
            await asyncio.to_thread(thread.join)

    # The watch's thread.

    def _work(self, loop: asyncio.AbstractEventLoop) -> None:
        priority.set_thread(priority.SERVER, threading.get_native_id())  # before the plugins
        while not self._stopping:
            self._wake.wait(self._pass(loop))
            self._wake.clear()
        for tree in (*self._trees.values(), *self._gone):
            tree.close()

    def _pass(self, loop: asyncio.AbstractEventLoop) -> float | None:
        """Look at those that are due; returns how long there is nothing to do, or None: until somebody comes."""
        while self._gone:
            self._gone.pop().close()
        self._wakes_at_s = math.inf  # whoever comes from here on is not in the list
        trees = list(self._trees.values())
        now_s = time.monotonic()
        due = [tree for tree in trees if tree.due_s <= now_s and not tree.ended]
        if due or self._idle:
            try:
                if self._idle:
                    self._note_oom_kills(now_s)
                if due:
                    self._look(due, now_s, loop)
            except Exception as exc:  # a watch that died would be a limit that is gone
                tell(loop, self._on_fault, "memory_watch", exc)
                for tree in due:
                    tree.due_s = now_s + self._interval_s
            self.cpu_s = time.thread_time()
        self._wakes_at_s = min((tree.due_s for tree in trees if not tree.ended), default=math.inf)
        return None if self._wakes_at_s == math.inf else max(0.0, self._wakes_at_s - time.monotonic())

    def _look(self, due: list[_Tree], now_s: float, loop: asyncio.AbstractEventLoop) -> None:
        machine = self._machine = proc.machine()
        # The lists of children may leave one out; the table of all processes, read less often, does not.
        whole = now_s >= self._whole_due_s
        if whole:
            self._whole_due_s = now_s + _WHOLE_INTERVALS * self._interval_s
            self._note_oom_kills(now_s)
            due = [tree for tree in list(self._trees.values()) if not tree.ended]
        table = proc.trees(tree.worker.pid for tree in due) if whole else {}
        stirring = []
        for tree in due:
            if not whole and tree.rests(now_s, machine):
                tree.come_again(now_s)
            else:
                stirring.append(tree)
        for tree in stirring:
            try:
                self._look_at(tree, table.get(tree.worker.pid), machine, loop)
            except Exception as exc:  # whatever a plugin did to make this fail, the others are looked at
                tree.meter.close()
                tree.due_s = now_s + self._interval_s
                tell(loop, self._on_fault, "memory_watch", exc)

    def _note_oom_kills(self, now_s: float) -> None:
        # What was killed while there was no worker was none.
        recent = [] if self._idle else [each for each in self._oom_kills if each[0] >= now_s - _OOM_KEPT_S]
        kept = recent if recent or self._idle else self._oom_kills[-1:]
        self._idle = False
        self._oom_kills = (*kept, (now_s, proc.oom_kills()))

    def _look_at(
        self, tree: _Tree, pids: list[int] | None, machine: proc.Machine, loop: asyncio.AbstractEventLoop
    ) -> None:
        worker, began_s = tree.worker, time.thread_time()
        afresh = pids is not None and (worker.busy or tree.looks % _FRESH_LOOKS == 0)
        tree.looks += pids is not None
        try:
            reading = tree.meter.read(pids or proc.tree(worker.pid), worker.shm_fd, machine, afresh=afresh)
        except OSError:
            if proc.alive(tree.pidfd):
                raise
            tree.ended = True  # and what we held of it was closed while we looked
            return
        self.looks += 1
        tree.looked(reading, machine, time.thread_time() - began_s, self._interval_s)
        if not proc.alive(tree.pidfd):  # then the number may be another process's, and so may be what was read
            tree.ended = True
            return
        worker.memory_bytes = reading.used_bytes
        if reading.used_bytes >= worker.memory_peak_bytes:
            worker.memory_shared_bytes = reading.shared_bytes
            worker.memory_peak_bytes, worker.processes = reading.used_bytes, reading.processes
        if reading.tasks > worker.process_limit:
            worker.process_count = reading.tasks
            worker.over_processes = tree.ended = True
        elif reading.used_bytes > worker.memory_limit_bytes:
            worker.over_memory = tree.ended = True
        if tree.ended:  # said before it is done: whoever finds it dead knows why
            proc.kill_tree(worker.pid, tree.pidfd, reading.pids)
            tell(loop, worker.on_memory_breach if worker.over_memory else worker.on_process_breach)
