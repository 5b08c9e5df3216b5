"""The files that a process holds: behind its descriptors, and behind its address space."""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import re
from collections.abc import Generator, Iterator
from typing import NamedTuple

from engine.sandbox import proc

_CHUNK_BYTES = 1 << 20


def descriptors(pid: int) -> Generator[tuple[str, str], None, None]:
    """Path and target of each descriptor of a process: `/proc/1/fd/3`, `/memfd:name (deleted)`, "" if too long.

    Raises:
        PermissionError: it does not let us look.
    """
    folder = f"/proc/{proc.task(pid)}/fd"
    with contextlib.suppress(FileNotFoundError, ProcessLookupError), os.scandir(folder) as entries:
        for entry in entries:
            try:
                target = os.readlink(entry.path)  # noqa: PTH115 - there may be a million
            except (FileNotFoundError, ProcessLookupError):
                continue
            except OSError as exc:
                if exc.errno != errno.ENAMETOOLONG:
                    raise
                target = ""
            yield entry.path, target


class Mapping(NamedTuple):
    """Part of a process's address space that a file lies behind."""

    path: str  # in /proc/PID/map_files: to stat it takes a capability
    device: int  # as of st_dev
    inode: int
    deleted: bool


def mappings(pid: int, devices: frozenset[int]) -> Iterator[Mapping]:
    """Those of files on `devices`; none where the process does not let us look."""
    task = proc.task(pid)
    for start, end, major, minor, inode, rest in _pattern(devices).findall(_read_all(f"/proc/{task}/maps")):
        device = os.makedev(int(major, 16), int(minor, 16))
        path = f"/proc/{task}/map_files/{int(start, 16):x}-{int(end, 16):x}"
        yield Mapping(path, device, int(inode), rest.endswith(b" (deleted)"))


@functools.lru_cache(maxsize=16)
def _pattern(devices: frozenset[int]) -> re.Pattern[bytes]:
    named = b"|".join(f"0*{os.major(each):x}:0*{os.minor(each):x}".encode() for each in devices)
    # start-end permissions offset device inode path; see proc(5).
    line = rb"^([0-9a-f]+)-([0-9a-f]+) \S+ \S+ (?=(?:%b) )(\w+):(\w+) (\d+)(.*)$" % named
    return re.compile(line, re.MULTILINE)


_HEAD = re.compile(rb"^[0-9a-f]+-[0-9a-f]+ \S+ \S+ (\w+):(\w+) (\d+).*$", re.MULTILINE)
_PSS = re.compile(rb"^Pss:\s+(\d+)", re.MULTILINE)


def resident(pid: int) -> dict[tuple[int, int], int]:
    """By device and inode, what is resident of a process, in bytes; a page that n processes map counts for 1/n.

    What no file lies behind has inode 0. Nothing where the process does not let us look. Expensive: it walks page
    tables, a few milliseconds per GiB, and there may be thousands of mappings.
    """
    found: dict[tuple[int, int], int] = {}
    text = _read_all(f"/proc/{proc.task(pid)}/smaps")
    for head in _HEAD.finditer(text):
        major, minor, inode = head.groups()
        pss = _PSS.search(text, head.end())
        key = os.makedev(int(major, 16), int(minor, 16)), int(inode)
        found[key] = found.get(key, 0) + (int(pss[1]) * 1024 if pss else 0)
    return found


def memory_file_systems(pid: int) -> set[int]:
    """Devices of the tmpfs mounts that a process sees, as of st_dev."""
    found = set()
    for line in _read_all(f"/proc/{proc.task(pid)}/mountinfo").splitlines():
        fields, _, kind = line.partition(b" - ")
        if kind.startswith(b"tmpfs "):
            major, _, minor = fields.split()[2].partition(b":")
            found.add(os.makedev(int(major), int(minor)))
    return found


def _read_all(path: str) -> bytes:
    """A file of /proc of any length; what came of it where the process went away meanwhile."""
    parts = []
    with contextlib.suppress(OSError), open(path, "rb", buffering=0) as file:  # noqa: PTH123 - hot
        while part := file.read(_CHUNK_BYTES):
            parts.append(part)
    return b"".join(parts)
