"""What a worker gives up before any plugin code is near it.

Constants are from linux/prctl.h. `prctl` has no binding in the standard library, and the two or three calls
made here do not justify a package.
"""

from __future__ import annotations

import ctypes
import os
import resource
import signal

from engine.sandbox import priority
from engine.worker import native
from engine.worker.native import checked

PR_SET_PDEATHSIG = 1
_PR_SET_NAME = 15
PR_SET_CHILD_SUBREAPER = 36
PR_SET_NO_NEW_PRIVS = 38
_SIGKILL = int(signal.SIGKILL)

# Beyond the limit, for telling that it was reached: a plugin that holds every byte leaves none to say so with.
RESERVE_BYTES = 16 * 1024 * 1024
_with_reserve = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)


def prctl(option: int, value: int) -> None:
    """`prctl(2)` with one argument.

    Raises:
        OSError: the kernel refused.
    """
    checked(native.prctl(option, ctypes.c_ulong(value), 0, 0, 0), "prctl")


def rename(name: bytes) -> None:
    """Give this process a name for `ps`, of at most 15 bytes."""
    checked(native.prctl(_PR_SET_NAME, name, 0, 0, 0), "prctl")


def become_subreaper() -> None:
    """Adopt the orphans among our descendants, so that a daemon cannot slip out of the process tree."""
    prctl(PR_SET_CHILD_SUBREAPER, 1)


def detach(parent: int) -> None:
    """Own session, death with the parent, and a place behind the engine.

    Raises:
        ProcessLookupError: the parent died before the death signal was armed.
    """
    os.setsid()
    prctl(PR_SET_PDEATHSIG, _SIGKILL)
    if os.getppid() != parent:
        raise ProcessLookupError("the fork server is gone")
    become_subreaper()
    priority.set_process(priority.WORKER)
    prctl(PR_SET_NO_NEW_PRIVS, 1)


def limit(memory_bytes: int) -> None:
    """Cap the worker's data segment, and forbid core dumps.

    `RLIMIT_DATA` counts private writable memory (since Linux 4.7), so an allocation past it fails at once, in
    this process alone. `RLIMIT_AS` would count address space too, which torch and CUDA reserve by the gigabyte.
    """
    global _with_reserve
    hard = memory_bytes + RESERVE_BYTES
    _with_reserve = (hard, hard)
    resource.setrlimit(resource.RLIMIT_DATA, (memory_bytes, hard))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def volunteer() -> None:
    """For the kernel's OOM killer."""
    # Not by `Path`: what an open file object touches, every worker would have a copy of.
    fd = os.open("/proc/self/oom_score_adj", os.O_WRONLY | os.O_CLOEXEC)
    os.write(fd, b"1000")
    os.close(fd)


def open_reserve() -> None:
    """Let this worker use its reserve, to report and end. Allocates nothing itself."""
    resource.setrlimit(resource.RLIMIT_DATA, _with_reserve)
