"""What waits for the disk: bounded, and never with a hole in its numbers.

When it is full, the *oldest* events that the writer has not taken yet go: what stays runs on without a hole
to the newest, and the numbers that went are adjacent, so that one `gap` event, numbered like the first of
them, stands for all.
"""

from __future__ import annotations

import math
import sys
import threading
import time
from collections import deque

from events.envelope import Event, Gap, PluginLog, Transition, WorkerExited

EVENT_BYTES = 512  # about what an event takes in memory, beside a long text
AVERAGE_BYTES = 1024  # that the bound on memory allows an event on average

_LONG_TEXT = {PluginLog: "message", Transition: "reason", WorkerExited: "reason"}


class LogClosed(Exception):
    """The log was closed; nothing can be read from it or offered to it."""


class Backlog:
    """Many threads offer, one writer takes.

    Invariant: the numbers run durable → taken → gap → waiting without a hole, up to `offered`.
    """

    def __init__(self, limit: int, last: int) -> None:
        """At most `limit` events, and on average `AVERAGE_BYTES` each."""
        self._lock = threading.RLock()  # guards all that the writer and others share; `take` gathers under it
        self.changed = threading.Condition(self._lock)
        self.offered = last  # the last number seen
        self.dropped = 0  # events that a gap stands for
        self.trouble: str | None = None  # why events have to wait, for the gap's `why`
        self.closing = threading.Event()
        self._limit = limit
        self._max_bytes = limit * AVERAGE_BYTES
        self._waiting: deque[Event] = deque()
        self._waiting_bytes = 0
        self._gap: Gap | None = None  # what was dropped just before the first of `_waiting`
        self._taken = 0  # events that the writer has and that are not durable yet
        self._taken_bytes = 0
        self._moved = 0.0  # monotonic: when the writer last took or settled, or began to have something to do
        self._wake_bytes = math.inf  # the writer waits until so much is there

    def __len__(self) -> int:
        return self._taken + len(self._waiting)

    @property
    def stalled_s(self) -> float:
        """For how long the writer has not moved, though there is something to write."""
        with self.changed:
            return time.monotonic() - self._moved if len(self) else 0.0

    def offer(self, event: Event) -> None:
        """Append one event; never waits for the disk.

        Raises:
            LogClosed: the log is closing.
            ValueError: its number does not follow the last one's.
        """
        number = event.sequence
        with self._lock:
            if self.closing.is_set():
                raise LogClosed(f"event {number} came after the log was closed")
            if number != self.offered + 1:
                raise ValueError(f"event {number} does not follow {self.offered}")
            self.offered = number
            waiting = self._waiting
            if not waiting and not self._taken:
                self._moved = time.monotonic()
            waiting.append(event)
            self._waiting_bytes += weight(event)
            if self._taken + len(waiting) > self._limit:
                self._drop_oldest()
            while waiting and self._taken_bytes + self._waiting_bytes > self._max_bytes:
                self._drop_oldest()
            if self._waiting_bytes >= self._wake_bytes:
                self._wake_bytes = math.inf
                self.changed.notify_all()

    def _drop_oldest(self) -> None:
        oldest = self._waiting.popleft()
        self._waiting_bytes -= weight(oldest)
        number = oldest.sequence
        first = number if self._gap is None else self._gap.first
        self._gap = Gap(first, number, f"could not be written: {self.trouble or 'the disk is too slow'}")
        self.dropped += 1

    def take(self, limit: int, wait_s: float | None = None, gather_s: float = 0.0) -> list[Event] | None:
        """Up to `limit` events to write, after the gap before them.

        Waits for one, at most `wait_s`; where it had to, it then lets more gather for `gather_s`. None: none came.
        Empty: closed and done. What is taken is numbered for good: it is never dropped, and the next drop begins a
        gap of its own.
        """
        with self.changed:
            if not self._has_work() and wait_s != 0:
                self._wake_bytes = 0
                self.changed.wait_for(self._has_work, wait_s)
                self._wake_bytes = math.inf
                if self._waiting:
                    self.gather(limit, gather_s)
            if not self._has_work():
                return None
            taken: list[Event] = []
            if self._gap is not None:
                taken.append(Event(self._gap.first, time.time_ns() // 1000 * 1000, None, self._gap))
                self._gap = None
            if len(self._waiting) <= limit:
                taken.extend(self._waiting)
                self._waiting = deque()
                self._taken_bytes = self._waiting_bytes
            else:
                first = [self._waiting.popleft() for _ in range(limit)]
                taken.extend(first)
                self._taken_bytes = sum(map(weight, first))
            self._waiting_bytes -= self._taken_bytes
            self._taken = len(taken)
            self._moved = time.monotonic()
            return taken

    def gather(self, limit: int, wait_s: float) -> None:
        """Let events gather for so long; not when `limit` of them are there, half of what may wait, or the end.

        Those with long texts count for more than one.
        """
        enough_bytes = min(limit, self._limit // 2) * EVENT_BYTES
        with self.changed:
            self.changed.wait_for(lambda: self._has_gathered(enough_bytes), wait_s)
            self._wake_bytes = math.inf

    def _has_gathered(self, enough_bytes: int) -> bool:
        self._wake_bytes = enough_bytes  # each wake-up takes it back
        return self.closing.is_set() or self._gap is not None or self._waiting_bytes >= enough_bytes

    def _has_work(self) -> bool:
        return bool(self._waiting) or self._gap is not None or self.closing.is_set()

    def settle(self) -> None:
        """What was taken is durable."""
        with self.changed:
            self._taken = self._taken_bytes = 0
            self._moved = time.monotonic()
            self.trouble = None

    def close(self) -> None:
        """Take no more; the writer is woken to write the rest."""
        with self.changed:
            self.closing.set()
            self.changed.notify_all()


def weight(event: Event) -> int:
    """Bytes that an event takes in memory, about."""
    field = _LONG_TEXT.get(type(event.data))
    return EVENT_BYTES if field is None else EVENT_BYTES + sys.getsizeof(getattr(event.data, field))
