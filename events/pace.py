"""The log's thread as a neighbour of the event loop: how long it keeps the interpreter at a time.

A thread that works without a pause gives the interpreter up only when it is asked to, and that is after 5 ms
(`sys.getswitchinterval`): each call whose answer arrives meanwhile is late by as much. So the work on a batch is
cut into parts of about a tenth of a millisecond, with a pause between in which whoever waits gets its turn.
The more events wait for the thread, the larger its parts: far behind, it goes at full speed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from time import sleep

PART_EVENTS = 32
WAITING_PARTS = 32  # a part is as large as one of so many of all that waits, if that is more
# Asleep, not `sleep(0)`: that would take the interpreter back before a waiting thread has woken up.
PAUSE_S = 50e-6


class Pace:
    """Cuts batches into parts; `waiting` says how many events are still to come."""

    def __init__(self, waiting: Callable[[], int]) -> None:
        self._waiting = waiting

    def parts(self, count: int) -> Iterator[slice]:
        """Slices of a batch of `count` events, in order, with a pause between."""
        start = 0
        while start < count:
            end = min(count, start + max(PART_EVENTS, self._waiting() // WAITING_PARTS))
            yield slice(start, end)
            if end < count:
                sleep(PAUSE_S)
            start = end
