"""The process table, read from /proc: who is whose child, and what a process holds.

Own code rather than psutil: one pass over /proc for all workers together, where a library walks it anew for
each, and the fork server, which needs it too, imports nothing but the standard library and msgspec.
"""

from __future__ import annotations

import contextlib
import functools
import os
import re
import signal
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

_KILLED_AT_ONCE = 64  # each takes a descriptor of ours for a moment
_TRIES = 16  # to catch a thread of those that follow one another, each for a moment


class Process(NamedTuple):
    """One line of the process table."""

    parent: int
    threads: int


class Usage(NamedTuple):
    """What one process holds."""

    threads: int
    resident_bytes: int
    shared_bytes: int  # of that: shared memory, as anonymous shared mappings, memfds and files in a tmpfs


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


def trees(roots: Iterable[int]) -> dict[int, list[int]]:
    """By root, the processes of its tree, itself among them. One pass over all processes of the machine."""
    table = processes()
    pids: dict[int, list[int]] = {root: [] for root in roots}
    for pid in table:
        at = pid
        while at in table and at not in pids:
            at = table[at].parent
        if at in pids:
            pids[at].append(pid)
    return pids


def tree(root: int) -> list[int]:
    """The processes of one tree, the root first; in time that depends on this tree alone.

    While children come and go, the kernel may leave one out (proc(5), /proc/PID/task/TID/children): `trees` does
    not. Where it keeps no such lists, this is `trees`.
    """
    if not _lists_children():
        return trees([root])[root]
    found = {root: None}
    pending = [root]
    while pending:
        pid = pending.pop()
        for thread in _names(f"/proc/{pid}/task"):
            for child in map(int, _read(f"/proc/{pid}/task/{thread}/children").split()):
                if child not in found:
                    found[child] = None
                    pending.append(child)
    return list(found)


@functools.cache
def _lists_children() -> bool:
    return Path("/proc/thread-self/children").exists()


_VM_RSS = re.compile(rb"^VmRSS:\s+(\d+)", re.MULTILINE)
_RSS_SHMEM = re.compile(rb"^RssShmem:\s+(\d+)", re.MULTILINE)
_THREADS = re.compile(rb"^Threads:\s+(\d+)", re.MULTILINE)


def usage(pid: int) -> Usage:
    """What it holds; nothing where it is gone, or a zombie."""
    _, status = _living(pid)
    return Usage(_field(_THREADS, status), _field(_VM_RSS, status) * 1024, _field(_RSS_SHMEM, status) * 1024)


def task(pid: int) -> int:
    """The number under which /proc tells what a process holds: its own, or that of a thread.

    A process whose first thread has ended is a zombie by its own number, with nothing mapped or open, for as long
    as its other threads go on. Each of those has a folder in /proc that tells all, though no list names it.
    """
    return _living(pid)[0]


def _living(pid: int) -> tuple[int, bytes]:
    """The task to ask, and its /proc/PID/status."""
    status = _read(f"/proc/{pid}/status")
    for _ in range(_TRIES):
        if _VM_RSS.search(status) or _field(_THREADS, status) < 2:
            break
        for thread in _names(f"/proc/{pid}/task"):
            other = _read(f"/proc/{pid}/task/{thread}/status")
            if _VM_RSS.search(other):
                return int(thread), other
        status = _read(f"/proc/{pid}/status")
    return pid, status


def member(pid: int) -> tuple[str, int]:
    """A process's command, as it names itself, and its resident memory in bytes."""
    return _read(f"/proc/{pid}/comm").decode("utf-8", "replace").strip(), usage(pid).resident_bytes


_PSS_PRIVATE = re.compile(rb"^Pss_(?:Anon|File):\s+(\d+)", re.MULTILINE)


def proportional_private_bytes(pid: int) -> int | None:
    """Resident memory without shared memory, a page that several processes map counted in parts; None where the
    process does not let us look.

    Reading this walks page tables, a few milliseconds per GiB, so it is for confirming a breach.
    """
    found = _PSS_PRIVATE.findall(_read(f"/proc/{task(pid)}/smaps_rollup"))
    return sum(map(int, found)) * 1024 if found else None


class Machine(NamedTuple):
    """Memory of the whole machine: cheap to read, and what grew nowhere did not grow in any tree."""

    taken_bytes: int  # anonymous, shared, and mapped; what is shared and mapped counts twice
    shared_bytes: int


_ANON_PAGES = re.compile(rb"^AnonPages:\s+(\d+)", re.MULTILINE)
_MAPPED = re.compile(rb"^Mapped:\s+(\d+)", re.MULTILINE)
_SHMEM = re.compile(rb"^Shmem:\s+(\d+)", re.MULTILINE)


def machine() -> Machine:
    """As of now."""
    info = _read("/proc/meminfo")
    anonymous, mapped, shared = (_field(each, info) * 1024 for each in (_ANON_PAGES, _MAPPED, _SHMEM))
    return Machine(anonymous + mapped + shared, shared)


def oom_kills() -> int:
    """How many processes the kernel's OOM killer has ended since boot; 0 where the kernel does not count."""
    for line in _read("/proc/vmstat").splitlines():
        if line.startswith(b"oom_kill "):
            return int(line.split()[1])
    return 0


def alive(pidfd: int) -> bool:
    """Whether the process still has its number: it runs, or nobody has collected it yet."""
    try:
        signal.pidfd_send_signal(pidfd, 0)
    except ProcessLookupError:
        return False
    return True


def kill_tree(root: int, root_pidfd: int, pids: Iterable[int]) -> None:
    """SIGKILL for a process and, as far as descriptors reach, for `pids` that are below it; the first ones first.

    The rest dies when whoever adopts it looks. Done at once because a large process takes a while to die, and its
    children could go on taking memory meanwhile.
    """
    wanted = [pid for pid in pids if pid != root][:_KILLED_AT_ONCE]
    opened: dict[int, int] = {}
    try:
        for pid in wanted:
            with contextlib.suppress(OSError):  # gone, or no descriptor left
                opened[pid] = os.pidfd_open(pid)
        # Invariant: a number that is in the tree after its pidfd was opened, and whose pidfd can still be
        # signalled after that, belonged to that process all the while.
        below = set(tree(root)) if opened else set()
        if not alive(root_pidfd):
            return
        _kill(root_pidfd)
        for pid, pidfd in opened.items():
            if pid in below:
                _kill(pidfd)
    finally:
        for pidfd in opened.values():
            os.close(pidfd)


def _kill(pidfd: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)


def _field(pattern: re.Pattern[bytes], text: bytes) -> int:
    found = pattern.search(text)
    return int(found[1]) if found else 0


def _names(folder: str) -> list[str]:
    try:
        return os.listdir(folder)  # noqa: PTH208 - as above
    except OSError:
        return []


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
