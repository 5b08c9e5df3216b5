"""The process table, read from /proc: who is whose child, and how much memory a tree holds.

Own code rather than psutil: one pass over /proc for all workers together, where a library walks it anew for
each, and the fork server, which needs it too, imports nothing but the standard library and msgspec.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import NamedTuple

_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


class Process(NamedTuple):
    """One line of the process table."""

    parent: int
    threads: int


class Tree(NamedTuple):
    """What a process and everything below it hold together."""

    resident_bytes: int  # a page that several of them map counts for each
    tasks: int  # processes and threads
    pids: list[int]


def processes() -> dict[int, Process]:
    """By pid, every process there is."""
    table = {}
    for name in os.listdir("/proc"):  # noqa: PTH208 - a hot loop; Path objects would double its cost
        if not name.isdigit():
            continue
        stat = _read(f"/proc/{name}/stat")
        if stat:
            # pid (comm) state ppid …; comm may hold spaces and parentheses. See proc(5).
            fields = stat[stat.rindex(b")") + 2 :].split(maxsplit=18)
            table[int(name)] = Process(int(fields[1]), int(fields[17]))
    return table


def children(pid: int) -> list[int]:
    """The direct children of a process."""
    return [child for child, process in processes().items() if process.parent == pid]


def trees(roots: Iterable[int]) -> dict[int, Tree]:
    """By root, what its tree holds."""
    table = processes()
    pids: dict[int, list[int]] = {root: [] for root in roots}
    tasks = dict.fromkeys(pids, 0)
    for pid, process in table.items():
        at = pid
        while at in table and at not in pids:
            at = table[at].parent
        if at in pids:
            pids[at].append(pid)
            tasks[at] += process.threads
    return {root: Tree(_resident_bytes(tree), tasks[root], tree) for root, tree in pids.items()}


def _resident_bytes(pids: Iterable[int]) -> int:
    statms = (_read(f"/proc/{pid}/statm") for pid in pids)  # size resident shared …, in pages
    return sum(int(statm.split(maxsplit=2)[1]) for statm in statms if statm) * _PAGE_BYTES


def member(pid: int) -> tuple[str, int]:
    """A process's command, as it names itself, and its resident memory in bytes."""
    return _read(f"/proc/{pid}/comm").decode("utf-8", "replace").strip(), _resident_bytes([pid])


def proportional_bytes(pids: Iterable[int]) -> int:
    """Resident memory of processes together, each shared page counted once.

    Reading this walks page tables, a few milliseconds per GiB, so it is for confirming a breach. Where a process
    does not let us look, what it maps counts in full.
    """
    return sum(_proportional_bytes(pid) for pid in pids)


def _proportional_bytes(pid: int) -> int:
    for line in _read(f"/proc/{pid}/smaps_rollup").splitlines():
        if line.startswith(b"Pss:"):
            return int(line.split()[1]) * 1024
    return _resident_bytes([pid])


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
