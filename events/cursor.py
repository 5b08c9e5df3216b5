"""Reading the log as it grows: a reader is a number, not a queue.

    writer ──▶ Ring (the latest events, shared by all) ──▶ Cursor: position 4711
                    │ one wake-up per event loop and batch ──▶ every cursor of that loop
    database ───────┴─▶ a cursor that is behind the ring

So a subscriber costs nothing while it waits, memory does not grow with slow ones, and none of them misses an
event.
"""

from __future__ import annotations

import asyncio
import threading
from bisect import bisect_right
from collections.abc import AsyncIterator, Collection, Iterable, Sequence
from operator import attrgetter
from typing import Protocol

import msgspec

from events.backlog import AVERAGE_BYTES, LogClosed, weight
from events.envelope import TYPE_PREFIX, Event, Gap
from events.record import Record
from events.retention import LET_GO

BATCH_LIMIT = 1000  # records in one batch of a cursor
BATCH_BYTES = 256 * 1024  # of JSON in one batch, or one record: what each of many slow readers holds

_sequence = attrgetter("sequence")


class Filter(msgspec.Struct, frozen=True):
    """Which records a reader wants; None is all. A gap passes every filter: it may hide anything."""

    subjects: frozenset[str] | None = None
    types: frozenset[str] | None = None

    @classmethod
    def of(cls, subjects: Collection[str] | None, types: Collection[str] | None) -> Filter:
        """Types may carry the `holdfast.` prefix."""
        return cls(
            None if subjects is None else frozenset(subjects),
            None if types is None else frozenset(name.removeprefix(TYPE_PREFIX) for name in types),
        )

    @property
    def lasting(self) -> bool:
        """Whether retention keeps all that the reader wants."""
        return self.types is not None and self.types.isdisjoint(LET_GO)

    def passes(self, entry: Event | Record) -> bool:
        """Whether the reader wants it."""
        kind = entry.type
        if kind == Gap.TYPE:
            return True
        return (self.subjects is None or entry.subject in self.subjects) and (
            self.types is None or kind in self.types
        )


class Page(msgspec.Struct, frozen=True):
    """What a reader got, and the number up to which it now knows everything it wants."""

    records: list[Record]
    position: int


class Ring:
    """The latest events, as records for those who read them. One writer; readers on any thread, without a lock.

    Invariants: `_kept` holds everything numbered above `_kept.floor`, in order. Its list only grows, and an event
    becomes its record in place; to shrink, the whole of it is replaced, so a reader keeps what it began with.
    No entry comes to weigh more than when it was added.
    """

    class _Kept:
        __slots__ = ("entries", "floor")

        def __init__(self, floor: int, entries: list[Event | Record]) -> None:
            self.floor = floor
            self.entries = entries

    def __init__(self, size: int, floor: int, source: str) -> None:
        """Keeps `size` events of the engine `source`, on average `AVERAGE_BYTES` each; for a while twice that."""
        self._size = size
        self._source = source
        self._bytes = 0  # the writer's own
        self._kept = Ring._Kept(floor, [])

    @property
    def floor(self) -> int:
        """Everything numbered above it is here."""
        return self._kept.floor

    def extend(self, events: Sequence[Event], made: Iterable[Record] = ()) -> None:
        """Add a batch, of which some records are `made`; lets the oldest go.

        That is at twice the size, so that the cost per event is constant.
        """
        kept, records = self._kept, {record.sequence: record for record in made}
        entries = [records.get(event.sequence, event) for event in events] if records else events
        kept.entries.extend(entries)
        self._bytes += sum(map(_weight, entries))
        if len(kept.entries) >= 2 * self._size or self._bytes >= 2 * self._size * AVERAGE_BYTES:
            self._shrink(kept.entries)

    def _shrink(self, entries: list[Event | Record]) -> None:
        first, room = len(entries), self._size * AVERAGE_BYTES
        while first > max(0, len(entries) - self._size) and (left := room - _weight(entries[first - 1])) >= 0:
            first, room = first - 1, left
        floor = entries[first].sequence - 1 if first < len(entries) else entries[-1].end
        self._bytes = self._size * AVERAGE_BYTES - room
        self._kept = Ring._Kept(floor, entries[first:])

    def read(self, after: int, until: int, limit: int, chosen: Filter) -> Page | None:
        """Up to `limit` wanted records numbered in (after, until], or None where the ring begins later."""
        kept = self._kept
        if after < kept.floor:
            return None
        found: list[Record] = []
        everything = chosen == _EVERYTHING
        entries = kept.entries
        start = bisect_right(entries, after, key=_sequence)
        if start and entries[start - 1].sequence < after < entries[start - 1].end:
            start -= 1  # `after` was never stored: the reader has to learn of the gap around it
        for index in range(start, len(entries)):
            entry = entries[index]
            if entry.sequence > until:
                break
            if everything or chosen.passes(entry):
                if len(found) == limit:
                    return Page(found, found[-1].end)
                if isinstance(entry, Event):  # made for all by whoever comes first; two at once make the same
                    record = Record.of(entry, self._source)
                    if _weight(record) <= _weight(entry):  # else every reader makes its own
                        entries[index] = record
                    entry = record
                found.append(entry)
        return Page(found, until)


def _weight(entry: Event | Record) -> int:
    return weight(entry) if isinstance(entry, Event) else len(entry.json)


_EVERYTHING = Filter()


class Readable(Protocol):
    """What a cursor needs of the log."""

    @property
    def durable(self) -> int:
        """The last number that is durable."""

    @property
    def closed(self) -> bool:
        """Nothing more will become durable."""

    def notice(self, after: int, chosen: Filter) -> Record | None:
        """A made-up gap for a reader whose number does not fit this log."""

    def read_recent(self, after: int, limit: int, chosen: Filter) -> Page | None:
        """From memory, or None."""

    def read_stored(self, after: int, limit: int, chosen: Filter) -> Page:
        """From the database; blocking."""


class Wakeups:
    """Wakes the waiting cursors of every event loop: one `call_soon_threadsafe` per loop and batch."""

    class _Loop:
        def __init__(self) -> None:
            self.event = asyncio.Event()
            self.waiting = 0
            self.called = False  # a wake-up is on its way

        def wake(self) -> None:
            self.called = False
            event, self.event = self.event, asyncio.Event()
            event.set()

    def __init__(self) -> None:
        self._loops: dict[asyncio.AbstractEventLoop, Wakeups._Loop] = {}
        self._lock = threading.Lock()

    def notify(self) -> None:
        """Something changed; from any thread."""
        with self._lock:
            called = [(loop, state) for loop, state in self._loops.items() if not state.called]
            for _, state in called:
                state.called = True
        for loop, state in called:
            try:
                loop.call_soon_threadsafe(state.wake)
            except RuntimeError:  # that loop was closed with cursors still waiting on it
                with self._lock:
                    self._loops.pop(loop, None)

    async def wait(self, log: Readable, position: int) -> None:
        """Returns once something past `position` may be durable, or the log is closed."""
        loop = asyncio.get_running_loop()
        with self._lock:
            state = self._loops.setdefault(loop, Wakeups._Loop())
            state.waiting += 1
        try:
            # Invariant: registered first, looked second. A batch durable after the look calls `wake` on this
            # loop, which cannot run before we wait on the very event it sets.
            event = state.event
            if log.durable <= position and not log.closed:
                await event.wait()
        finally:
            with self._lock:
                state.waiting -= 1
                if not state.waiting and self._loops.get(loop) is state:
                    del self._loops[loop]


def _bounded(page: Page) -> Page:
    """As many of a page's records as make a batch."""
    left_bytes = BATCH_BYTES
    for index, record in enumerate(page.records):
        left_bytes -= len(record.json)
        if left_bytes < 0 and index > 0:
            return Page(page.records[:index], page.records[index - 1].end)
    return page


class Cursor(AsyncIterator[list[Record]]):
    """Batches of records after a number: what is stored first, then each batch as it becomes durable.

    Iteration stops when the log is closed. For one task at a time; a cancelled `__anext__` loses nothing, and
    a cursor that is not iterated holds no resources, so it can simply be dropped.

    Raises (from iteration):
        LogUnavailable: the database cannot be read now; a new cursor at `position` continues.
        CorruptLog: what comes next is damaged.
    """

    def __init__(self, log: Readable, wakeups: Wakeups, after: int, chosen: Filter) -> None:
        self.position = after
        self._log = log
        self._wakeups = wakeups
        self._chosen = chosen
        self._stopped = False
        self._limit = BATCH_LIMIT // 8  # of the next batch from the database: large records are not read in vain

    @property
    def behind(self) -> bool:
        """Whether there is more to read now."""
        return self.position < self._log.durable

    def __aiter__(self) -> Cursor:
        return self

    async def __anext__(self) -> list[Record]:
        while not self._stopped:
            if (notice := self._log.notice(self.position, self._chosen)) is not None:
                self.position = notice.sequence
                return [notice]
            if self.behind:
                try:
                    page = await self._page()
                except LogClosed:
                    break
                self.position = page.position
                if page.records:
                    return page.records
            elif self._log.closed:
                break
            else:
                await self._wakeups.wait(self._log, self.position)
        self._stopped = True
        raise StopAsyncIteration

    async def _page(self) -> Page:
        page = self._log.read_recent(self.position, BATCH_LIMIT, self._chosen)
        if page is None:
            page = await asyncio.to_thread(self._log.read_stored, self.position, self._limit, self._chosen)
            fits = len(_bounded(page).records) == len(page.records)
            self._limit = min(BATCH_LIMIT, self._limit * 2) if fits else max(1, self._limit // 2)
        return _bounded(page)

    async def aclose(self) -> None:
        """Iteration stops here."""
        self._stopped = True
