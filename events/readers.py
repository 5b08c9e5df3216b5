"""Reading the log's file from any thread: a pool of read-only connections, which never wait for the writer."""

from __future__ import annotations

import contextlib
import sqlite3
import threading
from collections.abc import Collection, Iterator
from pathlib import Path

from events.envelope import CallFinished, CallStarted, Gap
from events.record import Record

IDLE_READERS = 4

COLUMNS = "sequence, type, subject, json"
# Nearly all events are of calls: to have those in an index by type would take half as long as to keep them, and
# SQLite would look through it for the calls of one plugin. The others are; it sees that where a query says so in
# these very words.
_CALLS = frozenset(kind.TYPE for kind in (CallStarted, CallFinished))
INDEXED = f"type NOT IN ({', '.join(repr(name) for name in sorted(_CALLS))})"
GAP = f"type = '{Gap.TYPE}' AND {INDEXED}"
_NUMBERED = f"SELECT {COLUMNS} FROM events WHERE sequence > ? AND sequence <= ?"  # noqa: S608
_BEFORE = f"SELECT {COLUMNS} FROM events WHERE sequence < ? ORDER BY sequence DESC LIMIT 1"  # noqa: S608


class Readers:
    """The connections to the file at `path`; `forget` them when another file is put there."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._idle: list[sqlite3.Connection] = []
        self._lock = threading.Lock()
        self._generation = 0  # counts the files opened at `path`; a reader of an earlier one is not reused
        self._closed = False

    def read(
        self,
        after: int,
        until: int,
        limit: int,
        subjects: Collection[str] | None = None,
        types: Collection[str] | None = None,
    ) -> list[Record]:
        """Up to `limit` records numbered in (after, until], in order; gaps pass every filter.

        Raises sqlite3.Error.
        """
        wanted = ""
        values: list[str] = []
        for column, chosen in (("subject", subjects), ("type", types)):
            if chosen is not None:
                wanted += f" AND {column} IN ({','.join('?' * len(chosen))})"
                values += list(chosen)
        if types is not None and _CALLS.isdisjoint(types):
            wanted += f" AND {INDEXED}"
        query = _NUMBERED
        parameters: list[str | int] = [after, until]
        if wanted:
            query = f"{_NUMBERED}{wanted} AND NOT ({GAP}) UNION ALL {_NUMBERED} AND {GAP}"
            parameters = [after, until, *values, after, until]
        with self._connection() as reader:
            around = [Record(*row) for row in reader.execute(_BEFORE, (after,))]
            rows = reader.execute(f"{query} ORDER BY sequence LIMIT ?", (*parameters, limit)).fetchall()
        # A gap around `after` itself: its reader has to learn of it.
        return [*(gap for gap in around if after < gap.end), *(Record(*row) for row in rows)][:limit]

    def forget(self) -> None:
        """Use none of the present connections again."""
        with self._lock:
            self._generation += 1
            idle, self._idle = self._idle, []
        for reader in idle:
            reader.close()

    def close(self) -> None:
        """Keep no connection open any more."""
        self._closed = True
        self.forget()

    @contextlib.contextmanager
    def _connection(self) -> Iterator[sqlite3.Connection]:
        """A connection of the calling thread's own. Read-only ones do not remove `-wal` when they close."""
        with self._lock:
            generation = self._generation
            reader = self._idle.pop() if self._idle else None
        if reader is None:
            uri = f"{self._path.absolute().as_uri()}?mode=ro"
            reader = sqlite3.connect(uri, uri=True, isolation_level=None, check_same_thread=False)
        healthy = False
        try:
            yield reader
            healthy = True
        finally:
            with self._lock:
                current = not self._closed and generation == self._generation
                keep = healthy and current and len(self._idle) < IDLE_READERS
                if keep:
                    self._idle.append(reader)
            if not keep:
                reader.close()
