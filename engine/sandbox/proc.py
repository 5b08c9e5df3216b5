"""The process table, read from /proc: who is whose child, and how much memory a tree holds.

Own code rather than psutil: one pass over /proc for all workers together, where a library walks it anew for
each, and the fork server, which needs it too, imports nothing but the standard library and msgspec.
"""

from __future__ import annotations

import os
from collections.abc import Iterable

_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


def parents() -> dict[int, int]:
    """pid → parent's pid, of every process there is."""
    table = {}
    for name in os.listdir("/proc"):  # noqa: PTH208 - a hot loop; Path objects would double its cost
        if not name.isdigit():
            continue
        stat = _read(f"/proc/{name}/stat")
        if stat:
            # pid (comm) state ppid …; comm may hold spaces and parentheses. See proc(5).
            table[int(name)] = int(stat[stat.rindex(b")") + 2 :].split(maxsplit=2)[1])
    return table


def children(pid: int) -> list[int]:
    """The direct children of a process."""
    return [child for child, parent in parents().items() if parent == pid]


def resident_bytes(pids: Iterable[int]) -> dict[int, int]:
    """pid → resident memory in bytes of the process and everything below it."""
    roots = set(pids)
    table = parents()
    totals = dict.fromkeys(roots, 0)
    for pid in table:
        at = pid
        while at in table and at not in roots:
            at = table[at]
        if at in roots:
            statm = _read(f"/proc/{pid}/statm")  # size resident shared …, in pages
            if statm:
                totals[at] += int(statm.split(maxsplit=2)[1]) * _PAGE_BYTES
    return totals


def oom_kills() -> int:
    """How many processes the kernel's OOM killer has ended since boot; 0 where the kernel does not count."""
    for line in _read("/proc/vmstat").splitlines():
        if line.startswith(b"oom_kill "):
            return int(line.split()[1])
    return 0


def _read(path: str) -> bytes:
    """A small file of /proc; empty where the process is gone."""
    try:
        fd = os.open(path, os.O_RDONLY)
    except OSError:
        return b""
    try:
        return os.read(fd, 65536)
    except OSError:
        return b""
    finally:
        os.close(fd)
