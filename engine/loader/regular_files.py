"""Opening files that others put there: only regular ones, never blocking on a pipe or a device."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

_KINDS = (
    (stat.S_ISDIR, "a directory"),
    (stat.S_ISFIFO, "a named pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISBLK, "a block device"),
    (stat.S_ISCHR, "a character device"),
)


class NotRegular(Exception):
    """The path is there, but is no regular file; the message says what it is ("a directory")."""


@contextmanager
def open_regular(path: Path) -> Iterator[BinaryIO]:
    """Open `path` for reading, unbuffered.

    Raises `NotRegular` for a directory, pipe, socket or device, and `OSError` as `open` does.
    The kind is asked before opening, because opening a device can act on it, and again afterwards,
    because the path may have been swapped in between; O_NONBLOCK keeps a swapped-in pipe from blocking.
    """
    _require_regular(path.stat().st_mode)
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY)
    with open(descriptor, "rb", buffering=0) as file:  # noqa: PTH123 - a descriptor, not a path
        _require_regular(os.fstat(descriptor).st_mode)
        yield file


def read_exactly(file: BinaryIO, size: int) -> bytes:
    """Up to `size` bytes, fewer only at the end of the file (a raw `read` may return less at any time)."""
    parts = bytearray()
    while len(parts) < size and (part := file.read(size - len(parts))):
        parts += part
    return bytes(parts)


def nameable(path: Path) -> bool:
    """Whether its name is UTF-8: otherwise no message to a worker could hold it, nor any JSON."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        return False
    return True


def why(error: OSError) -> str:
    """The system's words for an error, without the path that the caller names already."""
    return (error.strerror or str(error) or type(error).__name__).lower()


def _require_regular(mode: int) -> None:
    if not stat.S_ISREG(mode):
        raise NotRegular(next((kind for is_kind, kind in _KINDS if is_kind(mode)), "a special file"))
