"""What a process tree holds in memory, mapped or not, each byte once.

    private memory and files    resident, by process (`VmRSS` less `RssShmem`)
    shared memory               by object, for as long as the tree holds it: files of the worker's own /dev/shm,
                                memfds behind descriptors and mappings, shared anonymous mappings

Shared memory that nobody maps, or whose pages were let go of by `madvise`, is resident in no process: only the
object tells. Objects are looked for again when shared memory grew anywhere on the machine, which is cheap to ask.

What cannot be seen: a memfd on its way through a socket, in no process's hands; pages of pipes and sockets; files
in a tmpfs other than /dev/shm that nobody maps; huge pages of `hugetlbfs`; swap. A cgroup sees them.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Container, Generator
from typing import Final, NamedTuple

from engine.sandbox import mappings, proc
from engine.sandbox.evidence import Process

_BLOCK_BYTES = 512  # of st_blocks, whatever the file system
_INODE_BYTES = 1024  # of kernel memory, by file in a tmpfs: about
_GROWTH_BYTES = 1 << 20  # of all shared memory, that is worth looking for objects again
_SEARCH_S = 0.02  # at most, by look
_END: Final = object()
_MAX_MEMBERS = 64  # of a tree, by name


class Reading(NamedTuple):
    """What a tree held."""

    used_bytes: int
    shared_bytes: int  # of that: shared memory, mapped or not
    tasks: int  # processes and threads
    pids: list[int]  # the largest first
    processes: tuple[Process, ...]  # the largest first; empty where it held less than half of its limit


class Meter:
    """Reads one tree, time and again.

    Args:
        pid: its root.
        limit_bytes: what is over this is read as exactly as can be.
        tasks: nothing is read exactly of a tree that has more processes and threads.
        machine_shared_bytes: the machine's shared memory before its plugin was there; None: nobody knows.
    """

    def __init__(self, pid: int, limit_bytes: int, tasks: int, machine_shared_bytes: int | None = None) -> None:
        self._pid = pid
        self._tasks = tasks
        self._limit_bytes = limit_bytes
        self._objects: dict[tuple[int, int], int] = {}  # by device and inode, the bytes of a shared memory object
        self._whole = True  # whether every process let us look for its objects
        self._search: Generator[None, None, None] | None = None  # one that goes on at the next look
        self._seen_at = machine_shared_bytes  # the machine's shared memory, when we looked for them
        self._devices: frozenset[int] = frozenset()  # those of shared memory, but for the tree's own /dev/shm

    def read(self, pids: list[int], shm_fd: int | None, machine: proc.Machine, *, afresh: bool) -> Reading:
        """What the tree holds now.

        Args:
            pids: its processes.
            shm_fd: the worker's own /dev/shm, the same at each look; None where it has none.
            machine: as of now.
            afresh: look for objects, though shared memory grew nowhere.
        """
        seen_at = machine.shared_bytes - _GROWTH_BYTES if self._seen_at is None else self._seen_at
        grown = abs(machine.shared_bytes - seen_at) >= _GROWTH_BYTES
        if self._search is None and (afresh or grown):
            self._search = self._look_for_objects(pids, shm_fd)
            self._seen_at = machine.shared_bytes
        until_s = time.monotonic() + _SEARCH_S
        while self._search is not None and time.monotonic() < until_s:
            if next(self._search, _END) is _END:
                self._search = None
        files_bytes, own_device = _shm(shm_fd)
        shared = sum(self._objects.values()) + files_bytes
        usages = {pid: proc.usage(pid) for pid in pids}
        mapped = sum(usage.shared_bytes for usage in usages.values())
        used = sum(usage.resident_bytes for usage in usages.values()) - mapped + shared
        if not self._whole:
            used += mapped
        tasks = sum(usage.threads for usage in usages.values())
        if used > self._limit_bytes and tasks <= self._tasks:
            exact = self._exact if self._whole else self._exact_by_mapping
            used = exact(usages, files_bytes, own_device)
        largest = sorted(pids, key=lambda pid: -usages[pid].resident_bytes)
        members = largest[:_MAX_MEMBERS] if used > self._limit_bytes // 2 else []
        shown = [Process(pid, *proc.member(pid)) for pid in members]
        shown.sort(key=lambda process: -process.resident_bytes)  # as of now, which is a moment later
        return Reading(used, min(shared, used), tasks, largest, tuple(shown))

    def close(self) -> None:
        """Let go of a search that did not come to its end: it holds descriptors of ours."""
        if self._search is not None:
            self._search.close()
            self._search = None

    def _look_for_objects(self, pids: list[int], shm_fd: int | None) -> Generator[None, None, None]:
        """Step by step: who has a million descriptors must not hold up the looks at others."""
        if not self._devices:
            own = set() if shm_fd is None else {os.fstat(shm_fd).st_dev}
            self._devices = frozenset((mappings.memory_file_systems(self._pid) | {_anonymous_device()}) - own)
        found: dict[tuple[int, int], int] = {}
        whole = True
        for pid in pids:
            try:
                with contextlib.closing(self._paths(pid, found)) as paths:
                    for path in paths:
                        yield
                        if path:
                            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                                stat = os.stat(path)  # noqa: PTH116 - hundreds of them, each of them a string
                                found[stat.st_dev, stat.st_ino] = stat.st_blocks * _BLOCK_BYTES
            except PermissionError:
                whole = False
        self._objects, self._whole = found, whole

    def _paths(self, pid: int, found: Container[tuple[int, int]]) -> Generator[str, None, None]:
        """Where a process has shared memory objects; "" for what is none."""
        with contextlib.closing(mappings.descriptors(pid)) as descriptors:
            for path, target in descriptors:
                # Only these: to stat any other file may take for ever.
                yield path if target.startswith("/memfd:") else ""
        for each in mappings.mappings(pid, self._devices):
            yield "" if (each.device, each.inode) in found else each.path

    def _exact(self, usages: dict[int, proc.Usage], files_bytes: int, _own_device: int | None) -> int:
        """Pages that forked children share are counted once."""
        used = sum(self._objects.values()) + files_bytes
        for pid, usage in usages.items():
            private = proc.proportional_private_bytes(pid)
            used += usage.resident_bytes - usage.shared_bytes if private is None else private
        return used

    def _exact_by_mapping(self, usages: dict[int, proc.Usage], files_bytes: int, own_device: int | None) -> int:
        """Likewise, where objects cannot be told from what maps them: of each, the larger figure holds."""
        used = files_mapped = 0
        objects = dict.fromkeys(self._objects, 0)
        for pid, usage in usages.items():
            resident = mappings.resident(pid)
            for key, pss_bytes in resident.items():
                if key[0] == own_device:
                    files_mapped += pss_bytes
                elif key[0] in self._devices:
                    objects[key] = objects.get(key, 0) + pss_bytes
                else:
                    used += pss_bytes
            if not resident:
                used += usage.resident_bytes
        shared = sum(max(mapped, self._objects.get(key, 0)) for key, mapped in objects.items())
        return used + shared + max(files_bytes, files_mapped)


def _shm(fd: int | None) -> tuple[int, int | None]:
    """Bytes that the files of a worker's own /dev/shm take, and its device."""
    if fd is None:
        return 0, None
    try:
        stat = os.fstatvfs(fd)
        blocks, inodes = stat.f_blocks - stat.f_bfree, stat.f_files - stat.f_ffree
        return blocks * stat.f_frsize + inodes * _INODE_BYTES, os.fstat(fd).st_dev
    except OSError:  # closed: the worker is gone, and nobody will ask what it held
        return 0, None


def _anonymous_device() -> int:
    """Where memfds, shared anonymous mappings and System V segments are."""
    fd = os.memfd_create("holdfast-probe", os.MFD_CLOEXEC)
    try:
        return os.fstat(fd).st_dev
    finally:
        os.close(fd)
