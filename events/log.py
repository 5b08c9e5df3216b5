"""The durable, replayable log of events.

    bus ──offer──▶ Backlog ──▶ Writer: pack, one transaction, commit ────▶ Ring ──▶ cursors
    (any thread)   (bounded)   (own thread)                        └─▶ durable listeners (audit)

What is read is `Record`s, with an event's JSON. That of a call is made when the first reader comes.

Nothing outside the process learns of an event before its commit, so what was seen is still there, with the
same number and bytes, after `kill -9` or lost power.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path

import msgspec
import structlog

from events.backlog import Backlog, LogClosed
from events.bus import Fault
from events.cursor import Cursor, Filter, Page, Ring, Wakeups
from events.envelope import Event, Gap, decode
from events.files import move_aside
from events.projections import HealthProjection, Views, fold_all
from events.reading import Reading
from events.record import CorruptLog, LogUnavailable, Record, explain
from events.snapshot import Snapshot, load_snapshot
from events.store import Store
from events.writer import Writer

__all__ = ["CorruptLog", "Cursor", "EventLog", "LogClosed", "LogState", "LogUnavailable", "Record"]

STALLED_S = 5.0  # a write that takes longer is trouble, though it has not failed

log = structlog.get_logger(__name__)

Listener = Callable[[Sequence[Event]], None]


class LogState(msgspec.Struct, frozen=True):
    """How the log is."""

    ok: bool
    error: str | None  # fact, cause, next step
    durable: int  # the last number that is durable
    backlog: int  # events that are not durable yet
    dropped: int  # events of this run that a gap stands for
    first: int  # from this number on every event is kept


class EventLog:
    """A bus subscriber that keeps every event; readers on any thread and any event loop."""

    name = "log"

    def __init__(
        self,
        store: Store,
        *,
        source: str,
        backlog: int,
        ring: int,
        retain_events: int | None,
        retain_days: float | None,
    ) -> None:
        """Use `EventLog.open`."""
        self.faults: dict[str, Fault] = {}
        self._store = store
        self._settled = last = store.last()
        self._listeners: tuple[tuple[str, Listener], ...] = ()
        self._wakeups = Wakeups()
        self._ring = Ring(ring, last, source)
        self._backlog = Backlog(backlog, last)
        self._reading = Reading(store, self._ring, self._backlog, source=source, durable=last)
        self._changed = self._backlog.changed
        snapshot = self._load_snapshot()
        projection = HealthProjection(fold_all(self.replay(snapshot.sequence), snapshot.views))
        self._initial = (projection.snapshot(), last)
        self._writer = Writer(
            store,
            self._backlog,
            source=source,
            durable=last,
            snapshot=snapshot.sequence,
            projection=projection,
            retain_events=retain_events,
            retain_days=retain_days,
            on_durable=self._publish,
            note_fault=self._note_fault,
        )

    @classmethod
    def open(
        cls,
        path: Path,
        *,
        source: str,
        backlog: int = 100_000,
        ring: int = 16_384,
        retain_events: int | None = None,
        retain_days: float | None = None,
    ) -> EventLog:
        """Open or create the log at `path` and start its writer. Blocking.

        Args:
            path: the database file; its folder is created.
            source: the engine's instance, for the events written from now on.
            backlog: how many events may wait for the disk, with 1 KiB each on average.
            ring: how many recent events are kept in memory for readers, with 1 KiB each on average.
            retain_events: at least that many of the latest numbers are kept in full; before them calls and log
                lines go (see `events.retention`). None: they are kept for ever.
            retain_days: calls and log lines older than that go too. None: none goes for its age.

        Raises:
            CorruptLog: not a sound log; `repair` moves it aside.
            LogUnavailable: the folder cannot be written, or another process has the log.
        """
        store = Store(path)
        try:
            opened = cls(
                store,
                source=source,
                backlog=backlog,
                ring=ring,
                retain_events=retain_events,
                retain_days=retain_days,
            )
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
        return self._reading.durable

    @property
    def closed(self) -> bool:
        """Nothing more will become durable."""
        return self._reading.closed

    @property
    def state(self) -> LogState:
        """How the log is; from any thread."""
        with self._changed:
            backlog = self._backlog
            error = backlog.trouble
            if error is None and (stalled_s := backlog.stalled_s) > STALLED_S:
                error = f"{self.path}: a write has not come back for {stalled_s:.0f} s; check the disk"
            return LogState(error is None, error, self._reading.durable, len(backlog), backlog.dropped, self.first)

    # Start

    def load(self) -> tuple[Views, int]:
        """The views after the last durable event at open, and its number: a projection goes on from here."""
        return self._initial

    @property
    def first(self) -> int:
        """From this number on every event is kept; below it retention may have let calls and log lines go."""
        return self._store.numbering.complete_from

    def replay(self, after: int = 0) -> Iterator[Event]:
        """Every durable event after number `after` that is kept, in order. Blocking; from any thread.

        Below `first` there may be holes, and no gap event for them. An unreadable one comes as a gap, counted
        in `faults`.

        Raises:
            CorruptLog: a number is missing, or the file is damaged.
        """
        try:
            for record in self._store.replay(after, self._reading.durable):
                try:
                    yield decode(record.json)
                except (msgspec.MsgspecError, ValueError) as exc:
                    self._note_fault("decode", exc)
                    why = f"event {record.sequence} is unreadable: {exc}"
                    yield Event(record.sequence, 0, None, Gap(record.sequence, record.end, why))
        except (sqlite3.Error, msgspec.MsgspecError) as exc:
            raise explain(self.path, exc) from exc

    def _load_snapshot(self) -> Snapshot:
        try:
            return load_snapshot(self._store, self._reading.durable)
        except (msgspec.MsgspecError, ValueError) as exc:  # counters of what was let go are lost with it
            self._note_fault("snapshot", exc)
            return Snapshot(0, {})

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
            self._changed.wait_for(lambda: self._settled >= offered or self._reading.closed, timeout_s)
            return self._settled >= offered

    def close(self, timeout_s: float = 5.0) -> LogState:
        """Flush for at most `timeout_s`, keep a snapshot, end the writer; returns how that went. Blocking.

        What could not be written by then is counted in the returned state's `backlog`.
        """
        if not self._writer.close(timeout_s):
            log.error("log_writer_stuck", path=str(self.path))
        with self._changed:
            self._reading.closed = True
            self._changed.notify_all()
        self._wakeups.notify()
        return self.state

    def _publish(self, batch: Sequence[Event], made: Sequence[Record]) -> None:
        self._ring.extend(batch, made)
        with self._changed:
            self._reading.durable = batch[-1].end
            self._backlog.settle()
            listeners = self._listeners
        self._wakeups.notify()
        for name, callback in listeners:
            try:
                callback(batch)
            except Exception as exc:  # one listener's trouble is its own
                self._note_fault(name, exc)
        with self._changed:
            self._settled = self._reading.durable
            self._changed.notify_all()

    def _note_fault(self, name: str, exc: Exception) -> None:
        last = f"{type(exc).__name__}: {exc}"
        self.faults[name] = Fault.after(self.faults.get(name), last)
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

        A reader whose number does not fit this log is first told so by one made-up `gap` record. So is one from
        before `first`: the gap bears the last number that it stands for, says why, and what follows is complete.
        Lifecycle events below `first` are kept: a reader whose `types` are all of that kind gets them from the
        beginning and no gap, for it misses nothing.
        """
        start = self.durable if after is None else after
        return Cursor(self._reading, self._wakeups, start, Filter.of(subjects, types))

    def page(
        self,
        after: int,
        limit: int,
        *,
        subject: str | None = None,
        type: str | None = None,  # noqa: A002
    ) -> list[Record]:
        """Up to `limit` durable records after number `after`. Blocking; from any thread. For gaps see `subscribe`.

        Raises:
            LogUnavailable, CorruptLog: the database cannot be read now.
            LogClosed: the log was closed.
        """
        chosen = Filter.of(None if subject is None else (subject,), None if type is None else (type,))
        return self.read(after, limit, chosen).records

    def read(self, after: int, limit: int, chosen: Filter) -> Page:
        """Like `page`, with the number up to which a filtered reader now knows everything."""
        return self._reading.read(after, limit, chosen)
