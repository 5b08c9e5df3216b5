"""stdout and stderr of a server, which waits for nobody who reads them.

A pipe that is full (`holdfast serve | less`, paused) and a terminal that was stopped (Ctrl-S) put to sleep whoever
writes there, and with it the event loop. So a thread of its own writes, and lines that nobody takes are counted:

    print, structlog ──▶ queue, at most MAX_QUEUED_BYTES ──thread──▶ descriptor
"""

from __future__ import annotations

import contextlib
import io
import os
import select
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import TextIO, cast

MAX_QUEUED_BYTES = 1 << 20  # per stream
_FLUSH_S = 0.05  # of a reader that takes what it is given; one that does not is waited for once
_LAST_S = 1.0  # for what is left when the server ends


class LossyStream(io.TextIOBase):
    """A text stream whose `write` never blocks.

    `flush` waits until everything is written, as `print` and structlog expect, but only of a reader that keeps up.

    Args:
        under: where the lines go; written by its descriptor alone.
        lost: makes the line that stands for so many missing ones.
    """

    def __init__(self, under: TextIO, lost: Callable[[int], str]) -> None:
        under.flush()
        self._under = under
        self._fd = under.fileno()
        self._lost_line = lost
        self._partial = ""
        self._queue: list[bytes] = []
        self._queued_bytes = 0
        self._lost = 0  # lines, since it was last said
        self._error = "nobody reads them"
        self._writing = 0  # lines that the thread is at
        self._stuck = False  # a flush was in vain, and nothing was written since
        self._changed = threading.Condition()  # its lock is reentrant: a finalizer may print anywhere
        threading.Thread(target=self._pump, name=f"holdfast-{under.name}", daemon=True).start()

    @property
    def encoding(self) -> str:  # type: ignore[override]
        """As of the stream below."""
        return self._under.encoding

    def isatty(self) -> bool:
        """Whether a person sees it."""
        return self._under.isatty()

    def fileno(self) -> int:
        """The descriptor."""
        return self._fd

    def writable(self) -> bool:
        """It is."""
        return True

    def write(self, text: str) -> int:
        """Queue the lines that are whole; where there is no room, they are counted instead."""
        with self._changed:
            *lines, self._partial = (self._partial + text).split("\n")
            for line in lines:
                self._take(line + "\n")
        return len(text)

    def flush(self) -> None:
        """Queue what is there of a line; wait a moment until all is written, unless that was in vain before."""
        with self._changed:
            if self._partial:
                self._take(self._partial)
                self._partial = ""
            if not self._stuck:
                self._stuck = not self._changed.wait_for(self._is_written, _FLUSH_S)

    def settle(self, deadline_s: float) -> str:
        """Wait until all is written, to a moment of the monotonic clock. What is missing then, in words, or ""."""
        with self._changed:
            self._changed.wait_for(self._is_written, max(0.0, deadline_s - time.monotonic()))
            missing = self._lost + len(self._queue) + self._writing
            return f"{missing} lines of {self._under.name} are missing: {self._error}" if missing else ""

    def _is_written(self) -> bool:
        return not self._queue and not self._writing

    def _take(self, line: str) -> None:
        data = line.encode(self.encoding, "backslashreplace")
        if self._queued_bytes + len(data) > MAX_QUEUED_BYTES:
            self._lost += 1
            return
        self._queue.append(data)
        self._queued_bytes += len(data)
        self._changed.notify_all()

    def _pump(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._queue)
                lines, self._queue, self._queued_bytes = self._queue, [], 0
                # Invariant: what was lost came after these lines, and before whatever is queued from now on.
                if lost := self._lost:
                    lines.append(f"{self._lost_line(lost)}\n".encode(self.encoding, "backslashreplace"))
                self._writing = len(lines)
            error = self._put(lines)
            with self._changed:
                if error is None:
                    self._lost -= lost
                else:
                    self._error = error.strerror or type(error).__name__
                    self._lost += self._writing - (lost > 0)  # the line about those lost before is none of them
                self._writing, self._stuck = 0, False
                self._changed.notify_all()

    def _put(self, lines: list[bytes]) -> OSError | None:
        """Write one line after the other, however long that takes: whoever shares the pipe comes between two."""
        for line in lines:
            left = line
            while left:
                try:
                    left = left[os.write(self._fd, left) :]
                except BlockingIOError:  # whoever shares the pipe has set it so
                    select.select([], [self._fd], [])
                except OSError as exc:  # nobody has the other end any more, or the disk is full
                    return exc
            self._writing -= 1
        return None


def open_closed_streams() -> None:
    """Put /dev/null where a standard stream was closed (`>&-`): else the next file that opens takes its place."""
    while (fd := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(fd, True)
    os.close(fd)
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(number, "w" if number else "r", closefd=False))


@contextlib.contextmanager
def lossy_streams(lost: Callable[[int], str]) -> Iterator[None]:
    """Within, stdout and stderr never block; at the end, each says what the other could not.

    Args:
        lost: makes the line on stderr that stands for so many missing ones.
    """
    out = LossyStream(sys.stdout, lambda count: f"holdfast: {count} lines are missing here: nobody took them")
    err = LossyStream(sys.stderr, lost)
    with contextlib.redirect_stdout(cast(TextIO, out)), contextlib.redirect_stderr(cast(TextIO, err)):
        try:
            yield
        finally:
            deadline_s = time.monotonic() + _LAST_S
            for stream, other in ((out, err), (err, out)):
                if missing := stream.settle(deadline_s):
                    print(f"holdfast: {missing}", file=other, flush=True)
