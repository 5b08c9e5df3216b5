"""Reading the log's file from any thread: a pool of read-only connections, which never wait for the writer."""

from __future__ import annotations

import contextlib
import sqlite3
import threading
from collections.abc import Collection, Iterator
from itertools import product
from operator import attrgetter
from pathlib import Path
from typing import NamedTuple

from events import blocks
from events.envelope import Gap
from events.record import Record

IDLE_READERS = 4

COLUMNS = "sequence, type, subject, json"
GAP = f"type = '{Gap.TYPE}'"
_NUMBERED = f"SELECT {COLUMNS} FROM events WHERE sequence > ? AND sequence <= ?"  # noqa: S608
_BEFORE = f"SELECT {COLUMNS} FROM events WHERE sequence < ? ORDER BY sequence DESC LIMIT 1"  # noqa: S608
BLOCKS = f"SELECT {blocks.COLUMNS} FROM calls WHERE first > ? AND first <= ?"  # noqa: S608
_UNITED = 400  # SELECTs in one; SQLite takes 500. For more plugins, all blocks are looked at

_sequence = attrgetter("sequence")


class _Wanted(NamedTuple):
    """Records numbered in (after, until], at most `limit`; of these plugins and types, or of all."""

    after: int
    until: int
    limit: int
    subjects: Collection[str] | None
    types: Collection[str] | None


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
        wanted = _Wanted(after, until, limit, subjects, types)
        found: list[Record] = []
        # Of three snapshots: what comes meanwhile is past `until`; for what goes, who asks looks at the horizon.
        with self._connection() as reader:
            around = [Record(*row) for row in reader.execute(_BEFORE, (after,))]
            if types is None or not blocks.CALLS.isdisjoint(types):
                found = _calls(reader, wanted)
                if found and len(found) == limit:  # of the rows, too, nothing behind these is wanted
                    wanted = wanted._replace(until=found[-1].sequence)
            found += _rows(reader, wanted)
            found.sort(key=_sequence)
        # A gap around `after` itself: its reader has to learn of it.
        return [*(gap for gap in around if after < gap.end), *found][:limit]

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


def _calls(reader: sqlite3.Connection, wanted: _Wanted) -> list[Record]:
    """Of the blocks: the first `limit`, in order."""
    after, until, limit, subjects, types = wanted
    bounds = (blocks.window(after + 1), until)
    query, parameters = BLOCKS, list[str | int](bounds)
    if subjects is not None and not subjects:
        return []
    if subjects is not None and len(subjects) <= _UNITED:
        # One SELECT for each: SQLite merges what the index has in order, and reads no more than is asked for.
        query = " UNION ALL ".join([f"{BLOCKS} AND subject = ?"] * len(subjects))
        parameters = [value for subject in subjects for value in (*bounds, subject)]
    found: list[Record] = []
    end = 0  # of the window
    for row in reader.execute(f"{query} ORDER BY first", parameters):
        block = blocks.Block(*row)
        if block.first > end:  # what belongs before it is complete
            if len(found) >= limit:
                break
            end = blocks.window_end(block.first)
        if subjects is None or block.subject in subjects:
            found += (
                record
                for record in blocks.unpack(block)
                if after < record.sequence <= until and (types is None or record.type in types)
            )
    return sorted(found, key=_sequence)[:limit]


def _rows(reader: sqlite3.Connection, wanted: _Wanted) -> list[Record]:
    """Of the events with rows of their own: the first `limit`, in order."""
    after, until, limit, subjects, types = wanted
    bounds = (after, until)
    kinds = None if types is None else set(types) - {Gap.TYPE}
    filters = [(column, list(of)) for column, of in (("subject", subjects), ("type", kinds)) if of is not None]
    query, parameters = _NUMBERED, list[str | int](bounds)
    if filters:
        # As in `_calls`, by an index each. A gap is of no plugin, and in none of these.
        each: list[tuple[str, ...]] = list(product(*(of for _, of in filters)))
        if len(each) <= _UNITED:
            selects = [_NUMBERED + "".join(f" AND {column} = ?" for column, _ in filters)] * len(each)
            parameters = []
            for values in each:
                parameters += [*bounds, *values]
        else:
            wanted_of = (f" AND {column} IN ({','.join('?' * len(of))})" for column, of in filters)
            selects = [_NUMBERED + "".join(wanted_of)]
            parameters = [*bounds, *(value for _, of in filters for value in of)]
        query = " UNION ALL ".join([*selects, f"{_NUMBERED} AND {GAP}"])
        parameters += bounds
    return [Record(*row) for row in reader.execute(f"{query} ORDER BY sequence LIMIT ?", (*parameters, limit))]
