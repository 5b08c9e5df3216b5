"""The arena: a sealed memfd through which large payloads cross, one copy in and one copy out.

Each worker has two, one per direction. Both are created by the engine at their full size (sparse: a page
costs memory once it is written) and sealed against shrinking and growing, so that no worker can make the
engine touch a page that is gone. What the engine reads out of an arena it copies before it looks at it.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import struct
from collections.abc import Iterable
from typing import Final, TypeAlias

Span: TypeAlias = tuple[int, int]  # (offset, length) in an arena

_SEALS: Final = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
ALIGN: Final = 64  # a cache line; also enough for any vector instruction

# Below this, a copy through the socket costs less than the arena's bookkeeping.
THRESHOLD_BYTES: Final = 64 * 1024

# Behind the payloads, one number of the writer's: which call it has begun, and before the first which stage of its
# start (`wire.note_of`). So the reader knows, whatever happens, how far it came.
_NOTE: Final = struct.Struct("<Q")
_NOTE_BYTES: Final = ALIGN


def _aligned(offset: int) -> int:
    return -(-offset // ALIGN) * ALIGN


class ArenaFull(ValueError):
    """The payloads of one call are larger than the arena."""


def create(size: int) -> int:
    """A new sealed memfd of `size` bytes; returns its descriptor."""
    fd = os.memfd_create("holdfast-arena", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, size + _NOTE_BYTES)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
    except BaseException:
        os.close(fd)
        raise
    return fd


class Arena:
    """A mapping of an arena, in either process.

    One call owns it at a time: the writer calls `reset` when a call begins, and every `write` of that call
    goes behind the one before. What a plugin keeps of a call's payloads is never written over: the worker
    says with its answer what is still held, and the writer goes around that.
    """

    def __init__(self, fd: int, *, writable: bool) -> None:
        self.fd = fd
        self.size = os.fstat(fd).st_size - _NOTE_BYTES
        self._access = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
        self._mapping: mmap.mmap | None = None
        self._end = 0
        self._held: list[Span] = []  # in order

    @property
    def mapping(self) -> mmap.mmap:
        """The shared pages, mapped on first use."""
        if self._mapping is None:
            self._mapping = mmap.mmap(self.fd, self.size, mmap.MAP_SHARED, self._access)
        return self._mapping

    @property
    def used(self) -> bool:
        """Whether this call wrote anything."""
        return self._end > 0

    def reset(self, held: Iterable[Span] = ()) -> None:
        """Begin a call: what was written before may be overwritten, but for `held`."""
        self._end = 0
        self._held = sorted(held)

    def write(self, data: memoryview | bytes | bytearray) -> tuple[int, int]:
        """Copy `data` in; returns its (offset, length).

        Raises:
            ArenaFull: it does not fit behind what this call wrote before.
        """
        length = len(data)
        offset = self._end
        for start, size in self._held:
            if offset + length <= start:
                break
            offset = max(offset, _aligned(start + size))
        if offset + length > self.size:
            raise ArenaFull(f"{length} bytes; of {self.size} there are {max(0, self.size - offset)} left")
        self.mapping[offset : offset + length] = bytes(data) if isinstance(data, bytearray) else data
        self._end = _aligned(offset + length)
        return offset, length

    @property
    def note(self) -> int:
        """The writer's number, from 0 to 2**64 - 1; 0 as long as there is none. Raises OSError."""
        number: int = _NOTE.unpack(os.pread(self.fd, _NOTE.size, self.size))[0]
        return number

    @note.setter
    def note(self, number: int) -> None:
        os.pwrite(self.fd, _NOTE.pack(number), self.size)

    def view(self, offset: int, length: int) -> memoryview:
        """The bytes at (offset, length), without a copy; the other side may still change them.

        Raises:
            ValueError: outside the arena.
        """
        if offset < 0 or length < 0 or offset + length > self.size:
            raise ValueError(f"arena reference ({offset}, {length}) is outside its {self.size} bytes")
        return memoryview(self.mapping)[offset : offset + length]

    def copy(self, offset: int, length: int) -> bytes:
        """The bytes at (offset, length), copied. Raises ValueError like `view`."""
        with self.view(offset, length) as view:
            return bytes(view)

    def release(self) -> bool:
        """Unmap. False where a view is still held; then it stays mapped for as long as that view lives."""
        if self._mapping is None:
            return True
        mapping, self._mapping = self._mapping, None
        try:
            mapping.close()
        except BufferError:
            return False
        return True
