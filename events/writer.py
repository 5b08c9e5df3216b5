"""The log's writer: one thread that makes events durable, however long the disk takes.

When the disk fails it keeps its batch, says why (`Backlog.trouble`) and retries after 0.1 s, doubling to 5 s.
A batch that was taken is written whole, once, under its numbers; only closing can cut that short.
"""

from __future__ import annotations

import math
import sqlite3
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import structlog

from events import pace
from events.backlog import Backlog
from events.blocks import Packed, pack
from events.envelope import Event, Gap
from events.projections import HealthProjection
from events.record import CorruptLog, LogUnavailable, Record, explain
from events.retention import Retention
from events.snapshot import Snapshot, save_snapshot
from events.store import Store

BATCH_EVENTS = 16_384  # in one transaction
# That many are written without waiting for more: fewer than a batch may have, so that those that come until the
# thread runs go with them; and than the ring keeps, so that a reader that is one batch behind stays off the disk.
ENOUGH_EVENTS = 12_000
SNAPSHOT_EVERY = 50_000  # events
RETRY_FIRST_S = 0.1
RETRY_MAX_S = 5.0

log = structlog.get_logger(__name__)


class Writer:
    """Takes from the backlog, writes, and hands each durable batch to `on_durable`. Runs until closed."""

    def __init__(
        self,
        store: Store,
        backlog: Backlog,
        *,
        source: str,
        durable: int,
        snapshot: int,
        projection: HealthProjection,
        retain_events: int | None,
        retain_days: float | None,
        on_durable: Callable[[Sequence[Event], Sequence[Record]], None],
        note_fault: Callable[[str, Exception], None],
    ) -> None:
        self._store = store
        self._backlog = backlog
        self._source = source
        self._durable = durable
        self._snapshot_at = snapshot  # the number that the kept snapshot is of
        self._projection = projection  # between batches: of what is durable, for the snapshots
        self._on_durable = on_durable
        self._note_fault = note_fault
        self._retention = Retention(
            store, events=retain_events, days=retain_days, save_snapshot=self._save_snapshot, note_fault=note_fault
        )
        self._deadline = math.inf
        self._thread = threading.Thread(target=self._run, name="holdfast-log", daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def close(self, timeout_s: float) -> bool:
        """Write what is left for at most `timeout_s`, end the thread. False: it is stuck in a system call."""
        if math.isinf(self._deadline):
            self._deadline = time.monotonic() + timeout_s
            self._backlog.close()
        # On a dead disk `fsync` may never return. The thread is a daemon, so it holds nothing up.
        self._thread.join(max(0.0, self._deadline - time.monotonic()) + 1.0)
        return not self._thread.is_alive()

    def _run(self) -> None:
        complete = False
        try:
            complete = self._write_all()
        except Exception as exc:  # a fault of ours: the log must say that it is dead
            self._note_fault("writer", exc)
            self._backlog.trouble = f"{self._path}: the writer failed ({exc!r}); restart the engine"
            self._backlog.close()
        finally:
            try:
                if complete:
                    self._save_snapshot()
                else:
                    log.error("log_closed_incomplete", path=str(self._path), lost=len(self._backlog))
            finally:
                self._store.close(clean=complete)

    @property
    def _path(self) -> Path:
        return self._store.path

    def _write_all(self) -> bool:
        while (events := self._backlog.take(BATCH_EVENTS, self._retention.pause_s, pace.QUIET_GATHER_S)) != []:
            count = len(events or ())
            if events is not None and not self._write_batch(events):
                return False
            self._retention.turn(self._durable, self._snapshot_at, count)
            self._backlog.gather(ENOUGH_EVENTS, pace.gather_s(count))
        return True

    def _write_batch(self, events: list[Event]) -> bool:
        """Pack and fold them, make them durable, hand them on. False: the closing deadline came first."""
        sound: list[Event] = []
        packed = Packed([], [])
        for part in pace.parts(len(events)):
            batch, (rows, calls) = self._pack(events[part])
            sound += batch
            packed.rows.extend(rows)
            packed.calls.extend(calls)
        if not self._write(packed, sound[-1].end):
            return False
        self._durable = sound[-1].end
        self._on_durable(sound, packed.rows)
        if self._durable - self._snapshot_at >= SNAPSHOT_EVERY:
            self._save_snapshot()
        return True

    def _pack(self, events: list[Event]) -> tuple[list[Event], Packed]:
        """With what stands for these events: a gap for one that has no JSON form."""
        try:
            packed = pack(events, self._source)
        except Exception:  # data from a plugin: lone surrogates, numbers that JSON does not have
            events = [self._sound(event) for event in events]
            packed = pack(events, self._source)
        for event in events:
            self._projection.apply(event)
        return events, packed

    def _sound(self, event: Event) -> Event:
        try:
            pack([event], self._source)
        except Exception as exc:  # which of them it is
            self._note_fault("encode", exc)
            number, why = event.sequence, f"{event.type} has no JSON form: {type(exc).__name__}"
            with self._backlog.changed:
                self._backlog.dropped += 1
            now_ns = time.time_ns() // 1000 * 1000  # the event's own time may be what is wrong
            return Event(number, now_ns, None, Gap(number, number, why))
        return event

    def _write(self, packed: Packed, end: int) -> bool:
        """Make durable all up to `end`, however long it takes. False: the closing deadline came first."""
        delay_s = RETRY_FIRST_S
        while True:
            try:
                missing = packed
                if self._backlog.trouble is not None:
                    self._store.recover()
                    missing = self._missing_from_store(packed, end)
                self._store.append(missing)
            except (sqlite3.Error, OSError, CorruptLog, LogUnavailable) as exc:
                self._degrade(exc)
            else:
                if self._backlog.trouble is not None:
                    log.warning("log_recovered", path=str(self._path))
                return True
            if not self._pause(delay_s):
                return False
            delay_s = min(delay_s * 2, RETRY_MAX_S)

    def _missing_from_store(self, packed: Packed, end: int) -> Packed:
        """What of the batch is not stored: a commit that reported an error may have come through, with all of it.

        Where the file was lost altogether, a gap says so in the place of what was in it.
        """
        last = self._store.last()
        if last < self._durable:
            self._snapshot_at = -SNAPSHOT_EVERY  # it was in the file; the next batch brings a new one
            lost = Gap(last + 1, self._durable, "the log's file was lost while it was open")
            gap = pack([Event(lost.first, time.time_ns(), None, lost)], self._source)
            return Packed(gap.rows + packed.rows, packed.calls)
        return Packed([], []) if last >= end else packed

    def _degrade(self, exc: Exception) -> None:
        known = exc if isinstance(exc, (CorruptLog, LogUnavailable)) else explain(self._path, exc)
        if self._backlog.trouble != str(known):
            log.error("log_degraded", path=str(self._path), error=str(known))
            with self._backlog.changed:
                self._backlog.trouble = str(known)
                self._backlog.changed.notify_all()
        transient = ("SQLITE_FULL", "SQLITE_BUSY")
        if isinstance(exc, sqlite3.Error) and getattr(exc, "sqlite_errorname", "") not in transient:
            self._store.drop_connection()

    def _pause(self, delay_s: float) -> bool:
        """Wait before the next attempt; closing cuts it short. False once the closing deadline has passed."""
        if not self._backlog.closing.wait(delay_s):
            return True
        left_s = self._deadline - time.monotonic()
        if left_s > 0:
            with self._backlog.changed:
                self._backlog.changed.wait(min(RETRY_FIRST_S, left_s))
        return left_s > 0

    def _save_snapshot(self) -> int:
        """Keep one of all that is durable; returns the number that the kept one is of."""
        try:
            save_snapshot(self._store, Snapshot(self._durable, self._projection.snapshot()))
            self._snapshot_at = self._durable
        except (sqlite3.Error, ValueError, OverflowError) as exc:  # a start only replays more
            self._note_fault("snapshot", exc)
        return self._snapshot_at
