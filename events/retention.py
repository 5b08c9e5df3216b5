"""Retention: what the log lets go of, so that its file stays bounded.

    1 ············ kept_from ─ ─ ─ ─ ─ ─ ─ ─ ─ ─ ─ ─ complete_from ━━━━━━━━━━━━━━━━━━━━━━ durable
      nothing left           calls and log lines gone,              every event
                             lifecycle events kept

Calls and log lines (`LET_GO`) go once they are older than a bound. What tells how a plugin came to its state
stays: of these the latest `LIFECYCLE_EVENTS` below `complete_from`, more than a hundred thousand restarts.

A number that was let go is never given again. Counters lose nothing, because the snapshot of the projection is
past an event before the event goes. Age is what the clock says, in the order of the numbers: an event goes only
with all that were published before it, so a clock set back keeps some longer and never lets one go early.
"""

from __future__ import annotations

import contextlib
import sqlite3
import time
from collections.abc import Callable, Iterator

import msgspec

from events import blocks
from events.envelope import CallFinished, CallProgress, CallStarted, PluginLog, rfc3339
from events.readers import COLUMNS
from events.record import Record
from events.store import Numbering, Store

LET_GO = frozenset(kind.TYPE for kind in (CallStarted, CallFinished, CallProgress, PluginLog))
LIFECYCLE_EVENTS = 1_000_000
ROWS = 500  # in one turn, where fewer were written: a few milliseconds
LOOK_EVERY_S = 60.0  # for events that have come of age, and after a failure
SPARE_PAGES = 256  # may be empty in any file
VACUUM_PAGES = 64  # given back in one turn
DAY_NS = 86_400 * 1_000_000_000

_TYPES = ",".join(f"'{name}'" for name in sorted(LET_GO))
_RANGE = "FROM events WHERE sequence >= ? AND sequence <= ?"


class _Timed(msgspec.Struct):
    time: str


_decoder = msgspec.json.Decoder(_Timed)


def _time_of(record: Record) -> str:
    """RFC 3339, or "", which is before all others, where it cannot be read."""
    try:
        return _decoder.decode(record.json).time
    except (msgspec.MsgspecError, ValueError):
        return ""


class Retention:
    """Lets go a little at each turn, on the writer's thread, between its batches.

    Args:
        events: of these latest numbers every event is kept; None: of all.
        days: what is older goes too; None: nothing goes for its age.
        save_snapshot: brings the kept snapshot up to what is durable and returns its number.
        note_fault: takes what went wrong; the log goes on.
    """

    def __init__(
        self,
        store: Store,
        *,
        events: int | None,
        days: float | None,
        save_snapshot: Callable[[], int],
        note_fault: Callable[[str, Exception], None],
    ) -> None:
        self._store = store
        self._events = events
        self._days = days
        self._save_snapshot = save_snapshot
        self._note_fault = note_fault
        # Fewer at a time would cost a transaction for each small batch.
        self._least = 1 if events is None else max(1, min(ROWS, events // 10))
        self._next_look = self._retry_at = 0.0  # monotonic
        self._vacuum = True  # there may be pages to give back
        self._sure = True  # the store's numbering is what its file says
        self.pause_s = None if events is None and days is None else 0.0  # until the next turn; None: at an event

    def turn(self, durable: int, snapshot: int, batch: int) -> None:
        """Let go of what may go, twice as many as the `batch` of events that was written, at least `ROWS`.

        Args:
            durable: the last number that is durable.
            snapshot: the number that the kept snapshot is of.
        """
        if self.pause_s is None or time.monotonic() < self._retry_at:
            return
        more = False
        try:
            self._read_back()
            more = self._turn(durable, snapshot, max(ROWS, 2 * batch))
        except Exception as exc:  # whatever it is, the log goes on without; a later turn tries again
            self._note_fault("retention", exc)
            self._retry_at = time.monotonic() + LOOK_EVERY_S
            with contextlib.suppress(sqlite3.Error):
                self._read_back()
        self.pause_s = 0.0 if more else LOOK_EVERY_S

    def _turn(self, durable: int, snapshot: int, rows: int) -> bool:
        """Whether there is more to do."""
        numbering = self._store.numbering
        first, farthest = numbering.complete_from, min(numbering.complete_from - 1 + rows, durable)
        until = self._outnumbered(first, durable)
        if until < farthest and time.monotonic() >= self._next_look:
            until = max(until, self._aged(max(first, until + 1), farthest))
            if until < farthest:
                self._next_look = time.monotonic() + LOOK_EVERY_S
        until = min(until, farthest)
        if until >= first and (until <= snapshot or until <= self._save_snapshot()):
            self._let_go(first, until, numbering)
            return True
        if numbering.kept_below > LIFECYCLE_EVENTS:
            self._let_go_of_lifecycle(min(rows, numbering.kept_below - LIFECYCLE_EVENTS), numbering)
            return True
        return self._give_back()

    def _outnumbered(self, first: int, durable: int) -> int:
        """The last number that is too many; 0 where it is not worth a turn yet."""
        if self._events is None:
            return 0
        until = durable - self._events
        return until if until - first + 1 >= self._least else 0

    def _aged(self, first: int, last: int) -> int:
        """The last number of those in a row from `first` on that are all too old."""
        if self._days is None:
            return 0
        oldest = rfc3339(max(0, time.time_ns() - int(self._days * DAY_NS)))
        while first <= last:
            until = last
            try:
                page = self._store.read(first - 1, until, ROWS)
            except blocks.DamagedBlock as exc:  # nobody knows its age: it goes with what is before and after it
                self._note_fault("damaged", exc)
                until = blocks.window_end(exc.first)
                page = self._store.read(first - 1, blocks.window(exc.first), ROWS)
            for record in page:
                if _time_of(record) >= oldest:
                    return record.sequence - 1
            first = page[-1].end + 1 if len(page) == ROWS else until + 1
        return last

    def _let_go(self, first: int, until: int, numbering: Numbering) -> None:
        before = f"SELECT {COLUMNS} FROM events WHERE sequence <= ? ORDER BY sequence DESC LIMIT 1"  # noqa: S608
        until = max([until, *(Record(*row).end for row in self._store.rows(before, until))])  # a gap stays whole
        with self._moving_to(Numbering(numbering.kept_from, until + 1, numbering.kept_below)) as writer:
            damaged = self._store.delete_calls(writer, until)
            writer.execute(f"DELETE {_RANGE} AND type IN ({_TYPES})", (first, until))
            [(kept,)] = writer.execute(f"SELECT count(*) {_RANGE}", (first, until)).fetchall()
            after = Numbering(numbering.kept_from, until + 1, numbering.kept_below + kept)
            self._store.renumber(writer, after)
        for exc in damaged:
            self._note_fault("damaged", exc)
        self._vacuum = True

    def _let_go_of_lifecycle(self, count: int, numbering: Numbering) -> None:
        [(last,)] = self._store.rows("SELECT sequence FROM events ORDER BY sequence LIMIT 1 OFFSET ?", count - 1)
        after = Numbering(last + 1, numbering.complete_from, numbering.kept_below - count)
        with self._moving_to(after) as writer:
            writer.execute("DELETE FROM events WHERE sequence <= ?", (last,))
            self._store.renumber(writer, after)
        self._vacuum = True

    @contextlib.contextmanager
    def _moving_to(self, ahead: Numbering) -> Iterator[sqlite3.Connection]:
        """A transaction; readers see the horizon move before anything below it is gone."""
        self._sure = False
        self._store.numbering = ahead
        with self._store.transaction(synced=False) as writer:
            yield writer
        self._read_back()

    def _read_back(self) -> None:
        """A commit that reports an error may have come through: only the file knows."""
        if not self._sure:
            self._store.load_numbering()
            self._sure = True

    def _give_back(self) -> bool:
        """Shrink the file where much of it is empty; a little is kept, for what comes next."""
        if not self._vacuum:
            return False
        [(free,)], [(pages,)] = self._store.rows("PRAGMA freelist_count"), self._store.rows("PRAGMA page_count")
        self._vacuum = free > max(SPARE_PAGES, pages // 4) and self._store.rows("PRAGMA auto_vacuum") != [(0,)]
        if self._vacuum:
            self._store.run_script(f"PRAGMA incremental_vacuum({VACUUM_PAGES})")
        return self._vacuum
