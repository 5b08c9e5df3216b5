"""Who goes first where the processors are short: the engine, before what it hosts.

However many threads plugins run, health is answered and deadlines are kept. It costs a plugin nothing while a
processor is free.
"""

from __future__ import annotations

import contextlib
import os

SERVER_NICE = -10  # nine times the share of a process that asked for nothing; only with the privilege
WORKER_NICE = 10  # a ninth of it


def set_nice(nice: int) -> None:
    """Set this process's nice value, and its session's; without the privilege to lower it, nothing changes.

    From any thread: the value is the main thread's, and of those that it starts from now on.

    Where the kernel shares the processors out by session (`sched_autogroup`, see sched(7)), the value of a process
    counts only inside its session, and the session's own is what counts outside.
    """
    with contextlib.suppress(PermissionError):
        os.setpriority(os.PRIO_PROCESS, os.getpid(), nice)
    with contextlib.suppress(OSError):  # no such grouping; or, without privileges, too many at a time
        fd = os.open("/proc/self/autogroup", os.O_WRONLY | os.O_CLOEXEC)
        try:
            os.write(fd, b"%d" % nice)
        finally:
            os.close(fd)
