"""What a plugin prints: captured line by line, rate-limited, with a tail kept for the verdict."""

from __future__ import annotations

import asyncio
import os
import time
from collections import deque
from collections.abc import Callable
from typing import TypeAlias

_CHUNK_BYTES = 65536
_LINE_BYTES = 4096  # a longer line is cut into pieces of this size
_TAIL_LINES = 20

OnLine: TypeAlias = Callable[[str, int], None]  # (line, lines dropped before it)


class RateLimit:
    """A token bucket: `per_s` on average, twice that in a burst."""

    def __init__(self, per_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._per_s = per_s
        self._clock = clock
        self._tokens = 2 * per_s
        self._at = clock()
        self._dropped = 0

    def admit(self) -> int | None:
        """None: over the limit. Otherwise how many were dropped since the last one admitted."""
        if self.available() < 1:
            self._dropped += 1
            return None
        self._tokens -= 1
        dropped, self._dropped = self._dropped, 0
        return dropped

    def available(self) -> int:
        """How many would be admitted now."""
        now = self._clock()
        self._tokens = min(2 * self._per_s, self._tokens + (now - self._at) * self._per_s)
        self._at = now
        return int(self._tokens)

    def drop(self, count: int) -> None:
        """Count some as dropped, unseen."""
        self._dropped += count

    def take_dropped(self) -> int:
        """How many were dropped since the last one admitted; they are told of now."""
        dropped, self._dropped = self._dropped, 0
        return dropped


class Output:
    """Reads the pipe behind a worker's descriptors 1 and 2 without ever blocking.

    Args:
        fd: the reading end, open until after `close`.
        on_line: takes each line that is within the rate.
        lines_per_s: the rate.
    """

    def __init__(self, fd: int, on_line: OnLine, lines_per_s: float) -> None:
        self._fd = fd
        self._on_line = on_line
        self._rate = RateLimit(lines_per_s)
        self._partial = b""
        self._closed = False
        self._tail: deque[str] = deque(maxlen=_TAIL_LINES)
        os.set_blocking(fd, False)
        asyncio.get_running_loop().add_reader(fd, self._read)

    def tail(self) -> str:
        """The last lines, oldest first."""
        return "\n".join(self._tail)

    def close(self) -> None:
        """Read what is left, at most a pipe's worth, and stop. A second call does nothing."""
        if self._closed:
            return
        self._closed = True
        for _ in range(16):
            if not self._read():
                break
        if self._partial:
            self._line(self._partial)
        if dropped := self._rate.take_dropped():
            self._on_line("(the lines before this one were over the rate limit)", dropped)
        asyncio.get_running_loop().remove_reader(self._fd)

    def _read(self) -> bool:
        """One chunk. False where there is nothing more for now."""
        try:
            chunk = os.read(self._fd, _CHUNK_BYTES)
        except BlockingIOError:
            return False
        if not chunk:  # every writer is gone; the pidfd tells the rest
            asyncio.get_running_loop().remove_reader(self._fd)
            return False
        *lines, self._partial = (self._partial + chunk).split(b"\n")
        # A flood: what is neither within the rate nor part of the tail is counted and not looked at.
        first, last = self._rate.available(), len(lines) - _TAIL_LINES
        if first < last:
            for line in lines[:first]:
                self._line(self._cut(line))
            self._rate.drop(last - first)
            del lines[:last]
        for line in lines:
            self._line(self._cut(line))
        self._partial = self._cut(self._partial)
        return True

    def _cut(self, line: bytes) -> bytes:
        """Deliver all whole pieces of a long line; returns the rest."""
        while len(line) > _LINE_BYTES:
            self._line(line[:_LINE_BYTES])
            line = line[_LINE_BYTES:]
        return line

    def _line(self, raw: bytes) -> None:
        dropped = self._rate.admit()
        text = raw.decode("utf-8", "replace").rstrip("\r")
        self._tail.append(text)
        if dropped is not None:
            self._on_line(text, dropped)
