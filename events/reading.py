"""Where a reader's records come from: the ring where it reaches, the database where it does not.

And what a reader is told whose number does not fit: one made-up gap, never stored.
"""

from __future__ import annotations

import sqlite3
import time

from events.backlog import Backlog, LogClosed
from events.blocks import UNREADABLE
from events.cursor import Filter, Page, Ring
from events.envelope import Event, Gap
from events.record import Record, explain
from events.store import Store


class Reading:
    """Reads for pages and cursors, from any thread. The log keeps `durable` and `closed` up to date."""

    def __init__(self, store: Store, ring: Ring, backlog: Backlog, *, source: str, durable: int) -> None:
        self.durable = durable
        self.closed = False
        self._store = store
        self._ring = ring
        self._backlog = backlog
        self._source = source

    def read(self, after: int, limit: int, chosen: Filter) -> Page:
        """Up to `limit` records after number `after`, and the number up to which the reader knows everything."""
        if limit < 1:
            return Page([], after)
        if (notice := self.notice(after, chosen)) is not None:
            return Page([notice], notice.sequence)
        return self.read_recent(after, limit, chosen) or self.read_stored(after, limit, chosen)

    def read_recent(self, after: int, limit: int, chosen: Filter) -> Page | None:
        """From the ring, or None where it begins later than `after`."""
        durable = self.durable  # taken first: the ring holds all of it
        return self._ring.read(after, max(durable, after), limit, chosen)

    def read_stored(self, after: int, limit: int, chosen: Filter) -> Page:
        """From the database. Raises LogUnavailable, CorruptLog, LogClosed."""
        if self.closed:
            raise LogClosed(f"{self._store.path} was closed")
        durable = self.durable
        try:
            records = self._store.read(after, durable, limit, chosen.subjects, chosen.types)
        except sqlite3.Error as exc:
            if self.closed:
                raise LogClosed(f"{self._store.path} was closed") from exc
            raise explain(self._store.path, exc) from exc
        # Looked at after the read: the horizon is moved before anything below it is deleted.
        if (horizon := self._horizon(chosen)) > after:
            notice = self._gap(after, horizon, chosen)
            return Page([notice], notice.sequence)
        records = [self._unreadable(record) if record.json == UNREADABLE else record for record in records]
        return Page(records, records[-1].end if len(records) >= limit else durable)

    def notice(self, after: int, chosen: Filter) -> Record | None:
        """A made-up gap, never stored, for a reader whose number is not one of this log's; else None."""
        if after > self._backlog.offered:
            why = f"this log ends at {self.durable}; you have read a different one"
            return self._record(self.durable, Gap(self.durable + 1, after, why))
        horizon = self._horizon(chosen)
        # What the ring has needs no database.
        return None if after >= min(horizon, self._ring.floor) else self._gap(after, horizon, chosen)

    def _horizon(self, chosen: Filter) -> int:
        """The last number up to which something that the reader wants may have been let go."""
        numbering = self._store.numbering
        return (numbering.kept_from if chosen.lasting else numbering.complete_from) - 1

    def _gap(self, after: int, horizon: int, chosen: Filter) -> Record:
        why = f"events up to {horizon} are no longer kept"
        if not chosen.lasting:
            why += " in full: calls and log lines were let go; ask for lifecycle types to read the others"
        return self._record(horizon, Gap(max(after, 0) + 1, horizon, why))

    def _unreadable(self, record: Record) -> Record:
        number = record.sequence
        return self._record(
            number, Gap(number, number, f"event {number} is unreadable: the log's file is damaged")
        )

    def _record(self, number: int, gap: Gap) -> Record:
        return Record.of(Event(number, time.time_ns(), None, gap), self._source)
