"""The log's file: one SQLite database in WAL mode.

    writer thread ──▶ one read-write connection ──▶ events.db ◀── pool of read-only connections ◀── any thread

`synchronous=FULL`: a commit that has returned survives lost power. Readers never wait for the writer (WAL).

What is checked at open: the header, the format marker, the version, the number that it begins with.
`PRAGMA quick_check` reads every page, so it runs where it is cheap (up to `QUICK_CHECK_BYTES`) or where there
is a cause (the last engine did not close the log); only then are all rows counted against the numbering too.
A large log that was closed cleanly opens in the same time as a small one; a page of it that has rotted is
noticed when it is read.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import structlog

from events import blocks
from events.files import SIDE_FILES, identity, move_aside, sync_folder, take_lock
from events.readers import BLOCKS, COLUMNS, GAP, Readers
from events.record import CorruptLog, FileGone, Record, explain

FORMAT = "holdfast-events"
VERSION = "3"
QUICK_CHECK_BYTES = 64 * 1024 * 1024
INSERT_ROWS = 256  # in one statement
_ALL = 2**63 - 1  # SQLite's largest number
REPLAY_ROWS = 4096
BUSY_TIMEOUT_S = 1.0
WAL_KEPT_BYTES = 16 * 1024 * 1024  # a `-wal` that grew past it in a burst is cut back once it is written over
_MAGIC = b"SQLite format 3\x00"

log = structlog.get_logger(__name__)

_CALLS = (  # see `events.blocks`
    "CREATE TABLE calls"
    "(first INTEGER PRIMARY KEY, subject TEXT NOT NULL, marks BLOB NOT NULL, json BLOB NOT NULL)",
    "CREATE INDEX calls_by_subject ON calls(subject)",
)
_UPGRADES = {  # from an older version to this one; what that one kept stays as it is
    "1": _CALLS,  # a row for each event
    "2": ("ALTER TABLE calls RENAME COLUMN lines TO json",),  # blocks of whole lines
}
# All other events; in a log that was begun as version 1, its calls too.
_SCHEMA = (
    "CREATE TABLE events(sequence INTEGER PRIMARY KEY, type TEXT NOT NULL, subject TEXT, json BLOB NOT NULL)",
    # An index row ends with the rowid, which is the sequence: both serve `… ORDER BY sequence`.
    "CREATE INDEX events_by_subject ON events(subject)",
    "CREATE TABLE meta(key TEXT PRIMARY KEY, value) WITHOUT ROWID",
    *_CALLS,
)
# Of any log: one of version 1 may have another one instead.
_INDEX = (
    "DROP INDEX IF EXISTS events_but_calls_by_type",
    "CREATE INDEX IF NOT EXISTS events_by_type ON events(type)",
    "CREATE INDEX IF NOT EXISTS events_by_subject_and_type ON events(subject, type)",
)
_GAPS = f"SELECT {COLUMNS} FROM events WHERE {GAP}"  # noqa: S608


class Numbering(msgspec.Struct, frozen=True):
    """Which numbers are there. Below `complete_from`, retention has let some kinds of events go."""

    kept_from: int = 1  # no event below is there
    complete_from: int = 1  # every event from here on is there
    kept_below: int = 0  # how many events are there below `complete_from`


class Store:
    """The database. `append`, `put_meta`, `recover` and `close` belong to one thread; reads to any."""

    def __init__(self, path: Path) -> None:
        """Open or create the file. Raises CorruptLog, LogUnavailable."""
        self.path = path
        self.numbering = Numbering()
        self._readers = Readers(path)
        self._writer: sqlite3.Connection | None = None
        self._identity: tuple[int, int] | None = None
        self._lock_fd = take_lock(path)
        try:
            self._open()
        except BaseException as exc:
            self.close(clean=False)
            if isinstance(exc, (sqlite3.Error, OSError, msgspec.MsgspecError)):
                raise explain(path, exc) from exc
            raise

    def _open(self) -> None:
        exists = self.path.exists()
        wal = Path(f"{self.path}-wal")
        if not exists and wal.exists() and wal.stat().st_size:
            # SQLite would delete that WAL on creating the database, and with it events that were seen.
            raise CorruptLog(self.path, "the database is gone but its -wal file is there")
        if exists and self.path.stat().st_size:
            with self.path.open("rb") as file:
                if file.read(len(_MAGIC)) != _MAGIC:
                    raise CorruptLog(self.path, "it is not an SQLite database")
        writer = self._writer = sqlite3.connect(
            self.path, timeout=BUSY_TIMEOUT_S, isolation_level=None, check_same_thread=False
        )
        tables = {row[0] for row in self.rows("SELECT name FROM sqlite_master WHERE type = 'table'")}
        if tables:  # before anything is changed: a database of something else stays as it is
            self._check_format(tables)
        if not tables:
            # Pages that retention empties can be given back; the choice has to be made before the first table.
            writer.execute("PRAGMA auto_vacuum = INCREMENTAL")
        writer.execute("PRAGMA journal_mode = WAL")
        writer.execute(f"PRAGMA journal_size_limit = {WAL_KEPT_BYTES}")
        writer.execute("PRAGMA synchronous = FULL")
        if not tables:
            self._create(writer)
            sync_folder(self.path.parent)
        elif (version := self.meta("version")) != VERSION:
            self._upgrade(writer, str(version))
        self.load_numbering()
        self.unclean = self._check()
        if tables:  # a new log has it already
            self._index(writer)
        self.put_meta("clean", "0")
        self._identity = identity(self.path)
        self._readers.forget()

    def _check_format(self, tables: set[str]) -> None:
        if "meta" not in tables or self.meta("format") != FORMAT:
            raise CorruptLog(self.path, "it is a database of something else")
        version = self.meta("version")
        if version not in (*_UPGRADES, VERSION):
            raise CorruptLog(self.path, f"its schema version is {version}, not {VERSION}")
        needed = {"events"} if version == "1" else {"events", "calls"}
        if missing := needed - tables:
            raise CorruptLog(self.path, f"it has no table `{missing.pop()}`")

    def _upgrade(self, writer: sqlite3.Connection, version: str) -> None:
        writer.execute("BEGIN IMMEDIATE")
        for statement in _UPGRADES[version]:
            writer.execute(statement)
        self.put_meta("version", VERSION)
        writer.execute("COMMIT")

    def _index(self, writer: sqlite3.Connection) -> None:
        """Without it some reads take longer, no more; so a full disk does not keep the log shut."""
        try:
            for statement in _INDEX:
                writer.execute(statement)
        except sqlite3.Error as exc:
            log.warning("log_index_not_made", path=str(self.path), error=str(exc))

    @staticmethod
    def _create(writer: sqlite3.Connection) -> None:
        writer.execute("BEGIN IMMEDIATE")
        for statement in (*_SCHEMA, *_INDEX):
            writer.execute(statement)
        meta = {"format": FORMAT, "version": VERSION, "clean": "1", "kept_from": 1}
        writer.executemany("INSERT INTO meta VALUES (?, ?)", meta.items())
        writer.execute("COMMIT")

    def _check(self) -> bool:
        """Raises CorruptLog. Returns whether the last engine left without closing the log."""
        unclean = self.meta("clean") != "1"
        if unclean or self.path.stat().st_size <= QUICK_CHECK_BYTES:
            found = self.rows("PRAGMA quick_check(1)")[0][0]
            if found != "ok":
                raise CorruptLog(self.path, f"damaged: {found}")
            self._check_numbering()
        elif self._lowest(first := self.numbering.complete_from) not in (None, first):
            raise CorruptLog(self.path, f"its numbering does not begin at {first}")
        return unclean

    def load_numbering(self) -> None:
        """Set `numbering` to what the file says. Raises sqlite3.Error."""
        keys = Numbering.__struct_fields__
        rows = self.rows(f"SELECT key, value FROM meta WHERE key IN ({','.join('?' * len(keys))})", *keys)  # noqa: S608
        found = {key: value for key, value in rows if isinstance(value, int)}
        # A log from before retention knows no `complete_from`.
        self.numbering = Numbering(**{"complete_from": found.get("kept_from", 1), **found})

    def _lowest(self, from_: int) -> int | None:
        """The lowest number from `from_` on that is there."""
        [(row,)] = self.rows("SELECT min(sequence) FROM events WHERE sequence >= ?", from_)
        [(call,)] = self.rows("SELECT min(first) FROM calls WHERE first >= ?", from_)
        return min((number for number in (row, call) if number is not None), default=None)

    def _count(self, from_: int, until: int) -> int:
        """How many events numbered in [from_, until) are there."""
        [(rows,)] = self.rows("SELECT count(*) FROM events WHERE sequence >= ? AND sequence < ?", from_, until)
        calls = self.rows("SELECT sum(length(marks)) FROM calls WHERE first >= ? AND first < ?", from_, until)
        return int(rows + (calls[0][0] or 0))

    def _check_numbering(self) -> None:
        numbering, first = self.numbering, self.numbering.complete_from
        below, low = self._count(0, first), self._lowest(0)
        if below != numbering.kept_below or (low is not None and low < numbering.kept_from):
            why = f"{below} events from {low} on are there below {first}, not {numbering.kept_below}"
            raise CorruptLog(self.path, f"{why} from {numbering.kept_from} on")
        low = self._lowest(first)
        if low is None:
            return
        if low != first:
            raise CorruptLog(self.path, f"its numbering begins at {low}, not at {first}")
        gaps = (Record(*row) for row in self.rows(f"{_GAPS} AND sequence >= ?", first))
        dropped = sum(gap.end - gap.sequence for gap in gaps)
        missing = self.last() - low + 1 - self._count(first, _ALL) - dropped
        if missing:
            raise CorruptLog(self.path, f"{missing} numbers are missing and no gap event says why")

    def last(self) -> int:
        """The highest number given, the end of a gap included; 0 in an empty log."""
        rows = self.rows(f"SELECT {COLUMNS} FROM events ORDER BY sequence DESC LIMIT 1")  # noqa: S608
        [(call,)] = self.rows("SELECT max(first) FROM calls")
        ends = [Record(*row).end for row in rows]
        ends += [] if call is None else [block.last for block in self._begun(call)]
        return max([*ends, self.numbering.complete_from - 1])  # retention may have let the very last one go

    def _begun(self, until: int) -> list[blocks.Block]:
        """The blocks of the window that `until` is in which begin up to there."""
        return [blocks.Block(*row) for row in self.rows(BLOCKS, blocks.window(until), until)]

    def meta(self, key: str) -> object:
        """A value kept beside the events, or None."""
        rows = self.rows("SELECT value FROM meta WHERE key = ?", key)
        return rows[0][0] if rows else None

    def put_meta(self, key: str, value: str | int | bytes) -> None:
        """Keep a value beside the events, durably. Raises sqlite3.Error."""
        self._connection().execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (key, value))

    def append(self, packed: blocks.Packed) -> None:
        """Add events in one transaction: all or none, durable on return. Raises sqlite3.Error, OSError."""
        with self.transaction() as writer:
            rows = [(record.sequence, record.type, record.subject, record.json) for record in packed.rows]
            _insert(writer, f"events({COLUMNS})", rows)
            _insert(writer, f"calls({blocks.COLUMNS})", packed.calls)

    @contextlib.contextmanager
    def transaction(self, *, synced: bool = True) -> Iterator[sqlite3.Connection]:
        """All that is executed inside, or nothing; durable on return, or with the next that is `synced`.

        Raises sqlite3.Error, OSError.
        """
        writer = self._connection()
        if identity(self.path) != self._identity:
            raise FileGone(f"{self.path} was removed or replaced")
        writer.execute(f"PRAGMA synchronous = {'FULL' if synced else 'NORMAL'}")
        writer.execute("BEGIN IMMEDIATE")
        try:
            yield writer
            writer.execute("COMMIT")
        except BaseException:
            with contextlib.suppress(sqlite3.Error):
                writer.execute("ROLLBACK")
            raise

    def delete_calls(self, writer: sqlite3.Connection, until: int) -> list[blocks.DamagedBlock]:
        """Delete all calls up to that number, inside a `transaction`; what a block has behind it stays.

        Invariant: no block has numbers on both sides of `complete_from`. One that is damaged may: it is returned,
        and goes once its window does.
        """
        damaged = []
        writer.execute("DELETE FROM calls WHERE first <= ?", (blocks.window(until),))  # not looked at
        for block in self._begun(until):
            try:
                rest = blocks.tail(block, until)
            except blocks.DamagedBlock as exc:
                damaged.append(exc)
                continue
            writer.execute("DELETE FROM calls WHERE first = ?", (block.first,))
            _insert(writer, f"calls({blocks.COLUMNS})", [] if rest is None else [rest])
        return damaged

    def renumber(self, writer: sqlite3.Connection, numbering: Numbering) -> None:
        """Keep a changed numbering, inside a `transaction`."""
        rows = [value for row in msgspec.structs.asdict(numbering).items() for value in row]
        writer.execute("INSERT OR REPLACE INTO meta VALUES (?, ?), (?, ?), (?, ?)", rows)

    def read(
        self,
        after: int,
        until: int,
        limit: int,
        subjects: Collection[str] | None = None,
        types: Collection[str] | None = None,
    ) -> list[Record]:
        """Up to `limit` records numbered in (after, until], in order; see `Readers.read`."""
        return self._readers.read(after, until, limit, subjects, types)

    def replay(self, after: int, until: int) -> Iterator[Record]:
        """Every record in (after, until] that is kept. Raises CorruptLog on a hole, sqlite3.Error."""
        position = after
        while position < until:
            page = self.read(position, until, REPLAY_ROWS)
            for record in page:
                self._expect(position + 1, record.sequence)
                position = max(position, record.end)
                yield record
            if not page:
                self._expect(position + 1, until + 1)
                return

    def _expect(self, number: int, found: int) -> None:
        """`found` may follow `number - 1`: what is between was let go."""
        # Invariant: `complete_from` is past a number before that number is deleted.
        missing = max(number, self.numbering.complete_from)
        if found > missing:
            raise CorruptLog(self.path, f"event {missing} is missing")

    def recover(self) -> None:
        """After a failed `append`: make the connection good again, or raise why it cannot be.

        A file that was removed or replaced under us is written anew from the connection that still holds it.
        Raises sqlite3.Error, OSError, CorruptLog.
        """
        if self._writer is not None and identity(self.path) == self._identity:
            return
        if not self.path.parent.is_dir():
            raise FileGone(f"its folder is gone: {self.path.parent}")
        if self._writer is not None:
            self._rescue(self._writer)
        try:
            self._open()
        except BaseException:
            self._close_writer()
            raise

    def _rescue(self, writer: sqlite3.Connection) -> None:
        copy = self.path.with_name(f"{self.path.name}.rescue")
        copy.unlink(missing_ok=True)
        target = sqlite3.connect(copy, isolation_level=None)
        try:
            writer.backup(target)
            # One file, so that one rename moves all of it.
            target.execute("PRAGMA journal_mode = DELETE")
        finally:
            target.close()
        # Closed before the new file is in place: a closing connection removes `-wal` by name.
        self._close_writer()
        if any(Path(f"{self.path}{end}").exists() for end in ("", *SIDE_FILES)):
            move_aside(self.path, "replaced")
        copy.rename(self.path)
        sync_folder(self.path.parent)

    def drop_connection(self) -> None:
        """Let `recover` open the file again: after an I/O error the connection is not trusted."""
        if identity(self.path) == self._identity:
            self._close_writer()

    def close(self, *, clean: bool) -> None:
        """Let go of everything; `clean` tells the next open that it need not doubt the file."""
        self._readers.close()
        if (writer := self._writer) is not None:
            with contextlib.suppress(sqlite3.Error):
                if clean:
                    writer.execute("INSERT OR REPLACE INTO meta VALUES ('clean', '1')")
                writer.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
            self._close_writer()
        if self._lock_fd >= 0:
            os.close(self._lock_fd)
            self._lock_fd = -1

    def _close_writer(self) -> None:
        writer, self._writer = self._writer, None
        if writer is not None:
            writer.close()

    def _connection(self) -> sqlite3.Connection:
        if self._writer is None:
            raise sqlite3.OperationalError("the log's file is not open")
        return self._writer

    def rows(self, query: str, *parameters: object) -> list[tuple[Any, ...]]:
        """What a query of the writer's own gives. Raises sqlite3.Error."""
        return self._connection().execute(query, parameters).fetchall()

    def run_script(self, statements: str) -> None:
        """Run them to their end; `rows` stops `PRAGMA incremental_vacuum` after one page. Raises sqlite3.Error."""
        self._connection().executescript(statements)


def _insert(writer: sqlite3.Connection, table: str, rows: Sequence[tuple[object, ...]]) -> None:
    """Rows of four columns, which `table` names."""
    for start in range(0, len(rows), INSERT_ROWS):
        part = rows[start : start + INSERT_ROWS]
        # Many in one statement: SQLite lets go of the GIL, and under busy threads each return of it can take 5 ms;
        # row by row a batch would take seconds. Not all: binding them holds it.
        places = ",".join(["(?,?,?,?)"] * len(part))
        writer.execute(f"INSERT INTO {table} VALUES {places}", [value for row in part for value in row])  # noqa: S608
