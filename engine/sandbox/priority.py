"""Who goes first where the processors are short: the engine, before what it hosts.

However many threads plugins run, health is answered and deadlines are kept. It costs a plugin nothing while a
processor is free.
"""

from __future__ import annotations

import contextlib
import os
import struct
from typing import Final, NamedTuple

from engine.worker.machine import machine
from engine.worker.native import syscall

# struct sched_attr: size, policy, flags, nice, priority, runtime, deadline, period. See sched_setattr(2).
_SCHED_ATTR = struct.Struct("=IIQiIQQQ")
_KEEP_POLICY = 0x08  # SCHED_FLAG_KEEP_POLICY


class Priority(NamedTuple):
    """A place in the queue for a processor."""

    nice: int
    # How long it runs before others have their turn. Since Linux 6.12 a thread may choose; one that wakes up may
    # take the place of one whose slice is longer, and otherwise waits for the next tick, milliseconds away.
    slice_ns: int


SERVER: Final = Priority(-10, 100_000)  # nine times the share of a process that asked for nothing; if it may
WORKER: Final = Priority(10, 10_000_000)  # a ninth of it


def set_process(priority: Priority) -> None:
    """Set this process's priority, and its session's; what it may not have, it goes on without.

    From any thread: the value is the main thread's, and of those that it starts from now on.

    Where the kernel shares the processors out by session (`sched_autogroup`, see sched(7)), the nice value of a
    process counts only inside its session, and the session's own is what counts outside.
    """
    set_thread(priority, os.getpid())
    with contextlib.suppress(OSError):  # no such grouping; or, without privileges, too many at a time
        fd = os.open("/proc/self/autogroup", os.O_WRONLY | os.O_CLOEXEC)
        try:
            os.write(fd, b"%d" % priority.nice)
        finally:
            os.close(fd)


def set_thread(priority: Priority, thread: int) -> None:
    """Set the priority of one thread, by its number; likewise."""
    with contextlib.suppress(PermissionError):
        os.setpriority(os.PRIO_PROCESS, thread, priority.nice)
    nice = os.getpriority(os.PRIO_PROCESS, thread)  # which the next call sets, too
    attributes = _SCHED_ATTR.pack(_SCHED_ATTR.size, 0, _KEEP_POLICY, nice, 0, priority.slice_ns, 0, 0)
    if machine is not None:
        with contextlib.suppress(OSError):  # before Linux 5.3, or filtered
            syscall("sched_setattr", machine.sched_setattr, thread, attributes, 0)
