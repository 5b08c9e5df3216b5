"""The durable, replayable log of events.

    bus ──offer──▶ Backlog ──▶ Writer: encode, one transaction, commit ──▶ Ring ──▶ cursors
    (any thread)   (bounded)   (own thread)                        └─▶ durable listeners (audit)

Nothing outside the process learns of an event before its commit, so what was seen is still there, with the
same number and bytes, after `kill -9` or lost power.
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Callable, Collection, Iterator
from pathlib import Path

import msgspec
import structlog

from events.backlog import Backlog, LogClosed
from events.bus import Fault
from events.cursor import Cursor, Filter, Page, Ring, Wakeups
from events.envelope import Event, Gap, decode, encode
from events.projections import HealthProjection, Views, fold_all
from events.record import CorruptLog, LogUnavailable, Record, explain
from events.store import Store, move_aside
from events.writer import Batch, Snapshot, Writer, load_snapshot

__all__ = ["Batch", "CorruptLog", "Cursor", "EventLog", "LogClosed", "LogState", "LogUnavailable", "Record"]

log = structlog.get_logger(__name__)

Listener = Callable[[Batch], None]


class LogState(msgspec.Struct, frozen=True):
    """How the log is."""

    ok: bool
    error: str | None  # fact, cause, next step
    durable: int  # the last number that is durable
    backlog: int  # events that are not durable yet
    dropped: int  # events of this run that a gap stands for


class EventLog:
    """A bus subscriber that keeps every event; readers on any thread and any event loop."""

    name = "log"

    def __init__(self, store: Store, *, source: str, backlog: int, ring: int) -> None:
        """Use `EventLog.open`."""
        self.faults: dict[str, Fault] = {}
        self.source = source
        self._store = store
        self._durable = self._settled = store.last()
        self._first = store.first
        self._closed = False
        self._listeners: tuple[tuple[str, Listener], ...] = ()
        self._wakeups = Wakeups()
        self._ring = Ring(ring, self._durable)
        self._backlog = Backlog(backlog, self._durable)
        self._changed = self._backlog.changed
        projection = HealthProjection(self._restore())
        self._initial = (projection.snapshot(), self._durable)
        self._writer = Writer(
            store,
            self._backlog,
            source=source,
            durable=self._durable,
            projection=projection,
            on_durable=self._publish,
            note_fault=self._note_fault,
        )

    @classmethod
    def open(cls, path: Path, *, source: str, backlog: int = 100_000, ring: int = 8192) -> EventLog:
        """Open or create the log at `path` and start its writer. Blocking.

        Args:
            path: the database file; its folder is created.
            source: the engine's instance, for the events written from now on.
            backlog: how many events may wait for the disk.
            ring: how many recent records are kept in memory for readers.

        Raises:
            CorruptLog: not a sound log; `repair` moves it aside.
            LogUnavailable: the folder cannot be written, or another process has the log.
        """
        store = Store(path)
        try:
            opened = cls(store, source=source, backlog=backlog, ring=ring)
        except BaseException as exc:
            store.close(clean=False)
            if isinstance(exc, sqlite3.Error):
                raise explain(path, exc) from exc
            raise
        opened._writer.start()
        return opened

    @staticmethod
    def repair(path: Path) -> Path:
        """Move an unusable log aside as `<name>.corrupt-<UTC time>`, whole. Returns that. Raises OSError."""
        return move_aside(path, "corrupt")

    def __enter__(self) -> EventLog:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def path(self) -> Path:
        """The database file."""
        return self._store.path

    @property
    def last(self) -> int:
        """The last durable number at open: the bus goes on from here."""
        return self._initial[1]

    @property
    def durable(self) -> int:
        """The last number that is durable now."""
        return self._durable

    @property
    def closed(self) -> bool:
        """Nothing more will become durable."""
        return self._closed

    @property
    def state(self) -> LogState:
        """How the log is; from any thread."""
        with self._changed:
            backlog = self._backlog
            error = backlog.trouble
            return LogState(error is None, error, self._durable, len(backlog), backlog.dropped)

    # Start

    def load(self) -> tuple[Views, int]:
        """The views after the last durable event at open, and its number: a projection goes on from here."""
        return self._initial

    @property
    def first(self) -> int:
        """The lowest number that is kept."""
        return self._first

    def replay(self, after: int = 0) -> Iterator[Event]:
        """Every durable event after number `after`, in order. Blocking; from any thread.

        An unreadable one comes as a gap, counted in `faults`.

        Raises:
            CorruptLog: a number is missing, or the file is damaged.
        """
        try:
            for record in self._store.replay(after, self._durable):
                try:
                    yield decode(record.json)
                except (msgspec.MsgspecError, ValueError) as exc:
                    self._note_fault("decode", exc)
                    why = f"event {record.sequence} is unreadable: {exc}"
                    yield Event(record.sequence, 0, None, Gap(record.sequence, record.end, why))
        except (sqlite3.Error, msgspec.MsgspecError) as exc:
            raise explain(self.path, exc) from exc

    def _restore(self) -> Views:
        try:
            snapshot = load_snapshot(self._store, self._durable)
        except (msgspec.MsgspecError, ValueError) as exc:
            self._note_fault("snapshot", exc)
            snapshot = Snapshot(0, {})
        return fold_all(self.replay(snapshot.sequence), snapshot.views)

    # Writing

    def offer(self, event: Event) -> None:
        """Take one event; never waits for the disk.

        Raises:
            LogClosed: the log is closing.
            ValueError: its number does not follow the last one's.
        """
        self._backlog.offer(event)

    def add_listener(self, name: str, callback: Listener) -> None:
        """Call `callback` with every batch from now on, once it is durable, on the writer thread."""
        with self._changed:
            self._listeners = (*self._listeners, (name, callback))

    def flush(self, timeout_s: float) -> bool:
        """Wait until all that was offered is durable and the listeners had it. False: not in time."""
        with self._changed:
            offered = self._backlog.offered
            self._changed.wait_for(lambda: self._settled >= offered or self._closed, timeout_s)
            return self._settled >= offered

    def close(self, timeout_s: float = 5.0) -> LogState:
        """Flush for at most `timeout_s`, keep a snapshot, end the writer; returns how that went. Blocking.

        What could not be written by then is counted in the returned state's `backlog`.
        """
        if not self._writer.close(timeout_s):
            log.error("log_writer_stuck", path=str(self.path))
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._wakeups.notify()
        return self.state

    def _publish(self, batch: Batch) -> None:
        self._ring.extend(batch.records)
        with self._changed:
            self._durable = batch.records[-1].end
            self._backlog.settle()
            listeners = self._listeners
        self._wakeups.notify()
        for name, callback in listeners:
            try:
                callback(batch)
            except Exception as exc:  # one listener's trouble is its own
                self._note_fault(name, exc)
        with self._changed:
            self._settled = self._durable
            self._changed.notify_all()

    def _note_fault(self, name: str, exc: Exception) -> None:
        seen = self.faults.get(name)
        last = f"{type(exc).__name__}: {exc}"
        self.faults[name] = Fault(1 if seen is None else seen.count + 1, last)
        log.error("log_fault", part=name, error=last)

    # Reading

    def subscribe(
        self,
        after: int | None = None,
        *,
        subjects: Collection[str] | None = None,
        types: Collection[str] | None = None,
    ) -> Cursor:
        """Batches of records after number `after` (None: from now on), replayed and then live.

        A reader whose number does not fit this log is first told so by one made-up `gap` record.
        """
        start = self._durable if after is None else after
        return Cursor(self, self._wakeups, start, Filter.of(subjects, types))

    def page(
        self,
        after: int,
        limit: int,
        *,
        subject: str | None = None,
        type: str | None = None,  # noqa: A002
    ) -> list[Record]:
        """Up to `limit` durable records after number `after`. Blocking; from any thread.

        Raises:
            LogUnavailable, CorruptLog: the database cannot be read now.
            LogClosed: the log was closed.
        """
        chosen = Filter.of(None if subject is None else (subject,), None if type is None else (type,))
        return self.read(after, limit, chosen).records

    def read(self, after: int, limit: int, chosen: Filter) -> Page:
        """Like `page`, with the number up to which a filtered reader now knows everything."""
        if (notice := self.notice(after)) is not None:
            return Page([notice], notice.sequence)
        return self.read_recent(after, limit, chosen) or self.read_stored(after, limit, chosen)

    def read_recent(self, after: int, limit: int, chosen: Filter) -> Page | None:
        """From the ring, or None where it begins later than `after`."""
        durable = self._durable  # taken first: the ring holds all of it
        return self._ring.read(after, max(durable, after), limit, chosen)

    def read_stored(self, after: int, limit: int, chosen: Filter) -> Page:
        """From the database; see `page` for errors."""
        if self._closed:
            raise LogClosed(f"{self.path} was closed")
        durable = self._durable
        try:
            records = self._store.read(after, durable, limit, chosen.subjects, chosen.types)
        except sqlite3.Error as exc:
            if self._closed:
                raise LogClosed(f"{self.path} was closed") from exc
            raise explain(self.path, exc) from exc
        return Page(records, records[-1].end if len(records) >= limit else durable)

    def notice(self, after: int) -> Record | None:
        """A made-up gap, never stored, for a reader whose number is not one of this log's; else None."""
        if after > self._backlog.offered:
            at, why = self._durable, f"this log ends at {self._durable}; you have read a different one"
            missing = (at + 1, after)
        elif after < self._first - 1:
            at, why = self._first - 1, f"events before {self._first} are no longer kept"
            missing = (max(after, 0) + 1, at)
        else:
            return None
        gap = Event(at, time.time_ns(), None, Gap(*missing, why))
        return Record(at, gap.type, None, encode(gap, self.source))
