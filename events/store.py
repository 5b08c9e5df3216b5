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
import fcntl
import os
import sqlite3
import threading
from collections.abc import Collection, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec

from events.envelope import Gap
from events.record import CorruptLog, FileGone, LogUnavailable, Record, explain

FORMAT = "holdfast-events"
VERSION = "1"
QUICK_CHECK_BYTES = 64 * 1024 * 1024
INSERT_ROWS = 4096  # 4 variables a row; SQLite allows 32 766 in a statement
REPLAY_ROWS = 4096
IDLE_READERS = 4
BUSY_TIMEOUT_S = 1.0
_SIDE_FILES = ("-wal", "-shm")
_MAGIC = b"SQLite format 3\x00"

_SCHEMA = (
    "CREATE TABLE events(sequence INTEGER PRIMARY KEY, type TEXT NOT NULL, subject TEXT, json BLOB NOT NULL)",
    # An index row ends with the rowid, which is the sequence: both serve `… ORDER BY sequence`.
    "CREATE INDEX events_by_subject ON events(subject)",
    "CREATE INDEX events_by_type ON events(type)",
    "CREATE TABLE meta(key TEXT PRIMARY KEY, value) WITHOUT ROWID",
)
_COLUMNS = "sequence, type, subject, json"
_GAPS = f"SELECT {_COLUMNS} FROM events WHERE type = '{Gap.TYPE}'"  # noqa: S608


def move_aside(path: Path, label: str) -> Path:
    """Rename the database and its side files to `<name>.<label>-<UTC time>…`, over nothing that exists.

    Returns the database's new path. Raises OSError.
    """
    stamp = datetime.now(UTC).strftime("%Y%m%dT%H%M%S.%fZ")
    target, attempt = path.with_name(f"{path.name}.{label}-{stamp}"), 0
    while any(Path(f"{target}{end}").exists() for end in ("", *_SIDE_FILES)):
        attempt += 1
        target = path.with_name(f"{path.name}.{label}-{stamp}.{attempt}")
    for end in ("", *_SIDE_FILES):
        with contextlib.suppress(FileNotFoundError):
            Path(f"{path}{end}").rename(f"{target}{end}")
    return target


class Store:
    """The database. `append`, `put_meta`, `recover` and `close` belong to one thread; reads to any."""

    def __init__(self, path: Path) -> None:
        """Open or create the file. Raises CorruptLog, LogUnavailable."""
        self.path = path
        self._readers: list[sqlite3.Connection] = []
        self._readers_lock = threading.Lock()
        self._generation = 0  # counts the files opened at `path`; a reader of an earlier one is not reused
        self._closed = False
        self._writer: sqlite3.Connection | None = None
        self._identity: tuple[int, int] | None = None
        self._lock_fd = self._take_lock()
        try:
            self._open()
        except BaseException as exc:
            self.close(clean=False)
            if isinstance(exc, (sqlite3.Error, OSError, msgspec.MsgspecError)):
                raise explain(path, exc) from exc
            raise

    def _take_lock(self) -> int:
        """One engine per log; the kernel drops the lock with the process, `kill -9` included."""
        name = self.path.with_name(self.path.name + ".lock")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            fd = os.open(name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as exc:
            step = "choose a data folder that this user can write"
            raise LogUnavailable(self.path, f"its folder cannot be written ({exc.strerror})", step) from exc
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as exc:
            os.close(fd)
            step = "stop it, or choose another data folder"
            raise LogUnavailable(self.path, "another engine has it open", step) from exc
        return fd

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
        tables = {row[0] for row in self._rows("SELECT name FROM sqlite_master WHERE type = 'table'")}
        if tables:  # before anything is changed: a database of something else stays as it is
            self._check_format(tables)
        writer.execute("PRAGMA journal_mode = WAL")
        writer.execute("PRAGMA synchronous = FULL")
        if not tables:
            self._create(writer)
            _sync_folder(self.path.parent)
        self.unclean = self._check()
        self.put_meta("clean", "0")
        self._identity = self._identity_at_path()
        self._forget_readers()

    def _check_format(self, tables: set[str]) -> None:
        if "meta" not in tables or self.meta("format") != FORMAT:
            raise CorruptLog(self.path, "it is a database of something else")
        if self.meta("version") != VERSION or "events" not in tables:
            raise CorruptLog(self.path, f"its schema version is {self.meta('version')}, not {VERSION}")

    @staticmethod
    def _create(writer: sqlite3.Connection) -> None:
        writer.execute("BEGIN IMMEDIATE")
        for statement in _SCHEMA:
            writer.execute(statement)
        meta = {"format": FORMAT, "version": VERSION, "clean": "1", "kept_from": 1}
        writer.executemany("INSERT INTO meta VALUES (?, ?)", meta.items())
        writer.execute("COMMIT")

    def _check(self) -> bool:
        """Raises CorruptLog. Returns whether the last engine left without closing the log."""
        unclean = self.meta("clean") != "1"
        if unclean or self.path.stat().st_size <= QUICK_CHECK_BYTES:
            found = self._rows("PRAGMA quick_check(1)")[0][0]
            if found != "ok":
                raise CorruptLog(self.path, f"damaged: {found}")
            self._check_numbering()
        elif self.last() and self._rows("SELECT min(sequence) FROM events")[0][0] != self.first:
            raise CorruptLog(self.path, f"its numbering does not begin at {self.first}")
        return unclean

    def _check_numbering(self) -> None:
        count, low = self._rows("SELECT count(*), min(sequence) FROM events")[0]
        if not count:
            return
        if low != self.first:
            raise CorruptLog(self.path, f"its numbering begins at {low}, not at {self.first}")
        explained = sum(gap.end - gap.sequence for gap in (Record(*row) for row in self._rows(_GAPS)))
        missing = self.last() - low + 1 - count - explained
        if missing:
            raise CorruptLog(self.path, f"{missing} numbers are missing and no gap event says why")

    @property
    def first(self) -> int:
        """The lowest number kept; above 1 once older events have been let go."""
        value = self.meta("kept_from")
        return value if isinstance(value, int) else 1

    def last(self) -> int:
        """The highest number stored, the end of a gap included; 0 in an empty log."""
        rows = self._rows(f"SELECT {_COLUMNS} FROM events ORDER BY sequence DESC LIMIT 1")  # noqa: S608
        return Record(*rows[0]).end if rows else 0

    def meta(self, key: str) -> object:
        """A value kept beside the events, or None."""
        rows = self._rows("SELECT value FROM meta WHERE key = ?", key)
        return rows[0][0] if rows else None

    def put_meta(self, key: str, value: str | int | bytes) -> None:
        """Keep a value beside the events, durably. Raises sqlite3.Error."""
        self._connection().execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (key, value))

    def append(self, records: Sequence[Record]) -> None:
        """Add records in one transaction: all or none, durable on return. Raises sqlite3.Error, OSError."""
        writer = self._connection()
        if self._identity_at_path() != self._identity:
            raise FileGone(f"{self.path} was removed or replaced")
        writer.execute("BEGIN IMMEDIATE")
        try:
            for start in range(0, len(records), INSERT_ROWS):
                part = records[start : start + INSERT_ROWS]
                # One statement: every step of SQLite lets go of the GIL, and under busy threads each
                # return of it can take 5 ms; row by row a batch would take seconds.
                values = [value for r in part for value in (r.sequence, r.type, r.subject, r.json)]
                places = ",".join(["(?,?,?,?)"] * len(part))
                writer.execute(f"INSERT INTO events VALUES {places}", values)  # noqa: S608
            writer.execute("COMMIT")
        except BaseException:
            with contextlib.suppress(sqlite3.Error):
                writer.execute("ROLLBACK")
            raise

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
        numbered = f"SELECT {_COLUMNS} FROM events WHERE sequence > ? AND sequence <= ?"  # noqa: S608
        query = numbered
        parameters: list[str | int] = [after, until]
        if wanted:
            gap = f"type = '{Gap.TYPE}'"
            query = f"{numbered}{wanted} AND NOT {gap} UNION ALL {numbered} AND {gap}"
            parameters = [after, until, *values, after, until]
        before = f"SELECT {_COLUMNS} FROM events WHERE sequence < ? ORDER BY sequence DESC LIMIT 1"  # noqa: S608
        with self._reader() as reader:
            around = [Record(*row) for row in reader.execute(before, (after,))]
            rows = reader.execute(f"{query} ORDER BY sequence LIMIT ?", (*parameters, limit)).fetchall()
        # A gap around `after` itself: its reader has to learn of it.
        return [*(gap for gap in around if after < gap.end), *(Record(*row) for row in rows)][:limit]

    def replay(self, after: int, until: int) -> Iterator[Record]:
        """Every record in (after, until]. Raises CorruptLog on a hole, sqlite3.Error."""
        expected = max(after + 1, self.first)
        while expected <= until:
            page = self.read(expected - 1, until, REPLAY_ROWS)
            for record in page:
                around = record.sequence <= after < record.end  # a gap that `after` lies in
                if record.sequence != expected and not around:
                    raise CorruptLog(self.path, f"event {expected} is missing")
                expected = record.end + 1
                yield record
            if not page:
                raise CorruptLog(self.path, f"event {expected} is missing")

    def recover(self) -> None:
        """After a failed `append`: make the connection good again, or raise why it cannot be.

        A file that was removed or replaced under us is written anew from the connection that still holds it.
        Raises sqlite3.Error, OSError, CorruptLog.
        """
        if self._writer is not None and self._identity_at_path() == self._identity:
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
        if any(Path(f"{self.path}{end}").exists() for end in ("", *_SIDE_FILES)):
            move_aside(self.path, "replaced")
        copy.rename(self.path)
        _sync_folder(self.path.parent)

    def drop_connection(self) -> None:
        """Let `recover` open the file again: after an I/O error the connection is not trusted."""
        if self._identity_at_path() == self._identity:
            self._close_writer()

    def close(self, *, clean: bool) -> None:
        """Let go of everything; `clean` tells the next open that it need not doubt the file."""
        self._closed = True
        self._forget_readers()
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

    def _identity_at_path(self) -> tuple[int, int] | None:
        try:
            found = self.path.stat()
        except OSError:
            return None
        return found.st_dev, found.st_ino

    def _forget_readers(self) -> None:
        with self._readers_lock:
            self._generation += 1
            readers, self._readers = self._readers, []
        for reader in readers:
            reader.close()

    def _rows(self, query: str, *parameters: object) -> list[tuple[Any, ...]]:
        return self._connection().execute(query, parameters).fetchall()

    @contextlib.contextmanager
    def _reader(self) -> Iterator[sqlite3.Connection]:
        """A connection of the calling thread's own. Read-only ones do not remove `-wal` when they close."""
        with self._readers_lock:
            generation = self._generation
            reader = self._readers.pop() if self._readers else None
        if reader is None:
            uri = f"{self.path.absolute().as_uri()}?mode=ro"
            reader = sqlite3.connect(uri, uri=True, isolation_level=None, check_same_thread=False)
        healthy = False
        try:
            yield reader
            healthy = True
        finally:
            with self._readers_lock:
                current = not self._closed and generation == self._generation
                keep = healthy and current and len(self._readers) < IDLE_READERS
                if keep:
                    self._readers.append(reader)
            if not keep:
                reader.close()


def _sync_folder(folder: Path) -> None:
    """Make a created or renamed entry survive lost power."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
