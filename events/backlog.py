"""What waits for the disk: bounded, and never with a hole in its numbers.

When it is full, the *oldest* events that the writer has not taken yet go: what stays runs on without a hole
to the newest, and the numbers that went are adjacent, so that one `gap` event, numbered like the first of
them, stands for all.
"""

from __future__ import annotations

import threading
import time
from collections import deque

from events.envelope import Event, Gap


class LogClosed(Exception):
    """The log was closed; nothing can be read from it or offered to it."""


class Backlog:
    """Many threads offer, one writer takes.

    Invariant: the numbers run durable → taken → gap → waiting without a hole, up to `offered`.
    """

    def __init__(self, limit: int, last: int) -> None:
        self.changed = threading.Condition()  # guards all that the writer and others share
        self.offered = last  # the last number seen
        self.dropped = 0  # events that a gap stands for
        self.trouble: str | None = None  # why events have to wait, for the gap's `why`
        self.closing = threading.Event()
        self._limit = limit
        self._waiting: deque[Event] = deque()
        self._gap: Gap | None = None  # what was dropped just before the first of `_waiting`
        self._taken = 0  # events that the writer has and that are not durable yet
        self._idle = False  # the writer waits for something to do

    def __len__(self) -> int:
        return self._taken + len(self._waiting)

    def offer(self, event: Event) -> None:
        """Append one event; never waits for the disk.

        Raises:
            LogClosed: the log is closing.
            ValueError: its number does not follow the last one's.
        """
        with self.changed:
            if self.closing.is_set():
                raise LogClosed(f"event {event.sequence} came after the log was closed")
            if event.sequence != self.offered + 1:
                raise ValueError(f"event {event.sequence} does not follow {self.offered}")
            self.offered = event.sequence
            self._waiting.append(event)
            if len(self) > self._limit:
                self._drop_oldest()
            if self._idle:
                self.changed.notify_all()

    def _drop_oldest(self) -> None:
        number = self._waiting.popleft().sequence
        first = number if self._gap is None else self._gap.first
        self._gap = Gap(first, number, f"could not be written: {self.trouble or 'the disk is too slow'}")
        self.dropped += 1

    def take(self, limit: int) -> list[Event]:
        """Up to `limit` events to write, after the gap before them; waits for one. Empty: closed and done.

        What is taken is numbered for good: it is never dropped, and the next drop begins a gap of its own.
        """
        with self.changed:
            while not self._waiting and self._gap is None and not self.closing.is_set():
                self._idle = True
                self.changed.wait()
                self._idle = False
            taken: list[Event] = []
            if self._gap is not None:
                taken.append(Event(self._gap.first, time.time_ns() // 1000 * 1000, None, self._gap))
                self._gap = None
            if len(self._waiting) <= limit:
                taken.extend(self._waiting)
                self._waiting = deque()
            else:
                taken.extend(self._waiting.popleft() for _ in range(limit))
            self._taken = len(taken)
            return taken

    def settle(self) -> None:
        """What was taken is durable."""
        with self.changed:
            self._taken = 0
            self.trouble = None

    def close(self) -> None:
        """Take no more; the writer is woken to write the rest."""
        with self.changed:
            self.closing.set()
            self.changed.notify_all()
