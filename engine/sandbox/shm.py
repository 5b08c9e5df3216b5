"""A worker's own /dev/shm, as the engine holds on to it; the worker makes it, in `engine.worker.mounts`."""

from __future__ import annotations

import contextlib
import os

_SHM = "/dev/shm"  # noqa: S108 - the place itself


def of(pid: int) -> int | None:
    """A descriptor of the /dev/shm of a process, to ask how full it is; None where that is not its own.

    To be called before any plugin code runs there: it could change its root folder. Never waits for a disk.
    """
    with contextlib.suppress(OSError), contextlib.ExitStack() as opened:
        its, ours = _open(f"/proc/{pid}/root{_SHM}", opened), _open(_SHM, opened)
        if os.fstat(its).st_dev != os.fstat(ours).st_dev:
            return os.dup(its)
    return None


def _open(path: str, opened: contextlib.ExitStack) -> int:
    fd = os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    opened.callback(os.close, fd)
    return fd


def full_bytes(fd: int | None) -> int:
    """How much lies in it, where it is full to the last page; else 0."""
    if fd is None:
        return 0
    room = os.fstatvfs(fd)
    return room.f_blocks * room.f_frsize if room.f_bfree == 0 else 0
