"""The audit file: one structlog JSON line per durable event, each with the SHA-256 of the line before.

    log's writer thread ──batch──▶ structlog: level · redact · chain · JSON ──▶ one write ──▶ audit.jsonl

The log is the truth and the audit is made from it, so nothing here can disturb the log: a write that fails is
counted and named, and the next batch first catches up from the log. For the same reason lines are not fsynced
one batch at a time (only at `close`): `kill -9` cannot lose a line that was written, and what lost power takes
is written again from the log at the next start.

A line torn by a kill is moved to `audit.jsonl.torn-<UTC time>`, never deleted, and a note in the chain says so;
the event itself is written anew. A file that is gone is written anew from the log; after one that was moved away
(rotated) a new one goes on, its first line naming the last line of the other by digest.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterable, Iterator, Sequence
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from typing import Any

import msgspec
import structlog

from events import pace
from events.audit_lines import Chain, Emitter
from events.audit_verify import NOTHING, AuditReport, digest, parse, verify
from events.bus import Fault
from events.envelope import Event
from events.log import CorruptLog, EventLog, LogClosed, LogUnavailable

__all__ = ["AuditLog", "AuditReport", "AuditState", "verify"]

# At most, while a batch of the log waits: under half a second. More than a batch brings, to catch up at all.
CATCH_UP_EVENTS = 20_000
WRITE_EVENTS = 1000
TAIL_BYTES = 1 << 20

log = structlog.get_logger(__name__)


class AuditState(msgspec.Struct, frozen=True):
    """How the audit is."""

    ok: bool
    error: str | None
    last: int  # the number of the last event audited
    faults: int


class AuditLog:
    """Writes `audit.jsonl`. Attach it to the log; its state says how it is."""

    def __init__(self, path: Path, *, redact: Sequence[str] = ()) -> None:
        """Use `AuditLog.open`."""
        self.path = path
        self.fault: Fault | None = None
        self._error: str | None = None
        self._last = 0
        self._size = 0
        self._fd = -1
        self._closed = False
        self._lock = threading.Lock()  # of the writer thread and of whoever calls `catch_up`
        self._source: EventLog | None = None
        self._chain = Chain(redact)
        self._emitter = Emitter.into(self._chain)

    @classmethod
    def open(cls, path: Path, *, redact: Sequence[str] = ()) -> AuditLog:
        """Open or create the file, its folder included. Never raises for the disk's sake: see `state`.

        Args:
            path: the file.
            redact: values that must never appear in it, such as the API token.
        """
        audit = cls(path, redact=redact)
        with audit._lock, audit._noting_faults():
            audit._open()
        return audit

    @property
    def state(self) -> AuditState:
        """How the audit is; from any thread."""
        return AuditState(
            self._error is None, self._error, self._last, 0 if self.fault is None else self.fault.count
        )

    def attach(self, source: EventLog) -> None:
        """Catch up with the log, then write every batch as it becomes durable. Blocking."""
        self._source = source
        self.catch_up()
        source.add_listener("audit", self._on_batch)
        self.catch_up()  # what became durable between the two

    def catch_up(self, limit: int | None = None) -> int:
        """Write what is durable in the log and not in the audit, at most `limit` events; returns how many."""
        written = 0
        with self._lock, self._noting_faults():
            self._ready()
            for part in self._missing(limit):
                self._write([part])
                written += len(part)
        return written

    def close(self) -> None:
        """Flush to the disk, let go of the file. Call it after the log's `close`, which writes its last batch."""
        with self._lock:
            self._closed = True
            if self._fd < 0:
                return
            try:
                os.fsync(self._fd)
            except OSError as exc:  # what the disk did not take is written again from the log at the next start
                self._note(f"{self.path}: {exc}")
            finally:
                self._release()

    def _on_batch(self, batch: Sequence[Event]) -> None:
        if self._closed:
            return
        with self._lock, self._noting_faults():
            self._ready()
            if self._last + 1 == batch[0].sequence:
                self._write(batch[part] for part in pace.parts(len(batch)))
                return
            for missing in self._missing(CATCH_UP_EVENTS):
                self._write([missing])

    @contextlib.contextmanager
    def _noting_faults(self) -> Iterator[None]:
        try:
            yield
            self._error = None
        except (OSError, CorruptLog, LogUnavailable, LogClosed) as exc:
            self._note(f"{self.path}: {exc}")

    def _note(self, why: str) -> None:
        if why != self._error:
            log.error("audit_failed", path=str(self.path), error=why)
        self._error = why
        self.fault = Fault.after(self.fault, why)

    # From events to lines

    def _missing(self, limit: int | None) -> Iterator[list[Event]]:
        """What the log has and the file has not, in parts; a note before each hole that retention left."""
        source = self._source
        if source is None:
            return
        if source.durable < self._last:
            self._write_note("audit.log_replaced", after=0, had=self._last)
        part: list[Event] = []
        end = self._last
        for event in islice(source.replay(self._last), limit):
            if event.sequence > end + 1:
                if part:
                    yield part
                self._write_note("audit.events_not_kept", after=event.sequence - 1, had=end)
                part = []
            part.append(event)
            end = event.end
            if len(part) == WRITE_EVENTS:
                yield part
                part = []
        if part:
            yield part

    def _write(self, parts: Iterable[Sequence[Event]]) -> None:
        """Lines of events, in one write: each lets go of the interpreter, and waits for it."""
        last = self._last
        try:
            for events in parts:
                self._emitter.emit_events(events)
                last = events[-1].end
        except BaseException:
            self._release()  # the chain in memory is ahead of the file; opening it again sets that right
            raise
        self._append(last)

    def _write_note(self, name: str, *, after: int, **fields: Any) -> None:
        """A line about the audit itself; `after` is the event it follows."""
        self._emitter.emit_note(name, after=after, **fields)
        self._append(after)

    def _append(self, last: int) -> None:
        """Write the lines rendered so far; the file then covers events up to `last`."""
        try:
            lines = self._chain.take()
            left = memoryview(lines)
            while left:
                left = left[os.write(self._fd, left) :]
        except BaseException:
            # What is in memory no longer fits the file; the next attempt opens it again and reads its end.
            with contextlib.suppress(OSError):
                os.ftruncate(self._fd, self._size)
            self._release()
            raise
        self._size += len(lines)
        self._last = last

    # The file

    def _ready(self) -> None:
        """The file at `path` is the one that is open here. Raises OSError."""
        if self._fd >= 0:
            ours = os.fstat(self._fd)
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(self.path.stat(), ours):
                    return
            moved = ours.st_nlink > 0
            self._note(f"{self.path} was {'moved away' if moved else 'deleted'}; going on in a new file")
            head, last = self._chain.head, self._last
            self._release()
            self._open()
            if moved and self._size == 0:
                self._write_note("audit.continued", after=last, continues=head)
        else:
            self._open()

    def _release(self) -> None:
        fd, self._fd = self._fd, -1
        os.close(fd)

    def _open(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        try:
            torn = self._read_end()
        except OSError:
            self._release()
            raise
        if torn is not None:
            self._write_note("audit.torn_line_moved", after=self._last, moved_to=torn.name)

    def _read_end(self) -> Path | None:
        """Set the chain to the file's last whole line; what follows it is moved to a file of its own."""
        self._chain.take()  # what an earlier attempt rendered and could not write
        size, window = os.fstat(self._fd).st_size, TAIL_BYTES
        while True:
            start = max(0, size - window)
            tail = _read(self._fd, start, size)
            lines = tail.splitlines(keepends=True)
            end = size
            for raw in reversed(lines if start == 0 else lines[1:]):
                if (line := parse(raw)) is not None:
                    self._chain.head, self._last, self._size = digest(raw), line.end, end
                    return self._move_torn(end, size)
                end -= len(raw)
            if start == 0:
                self._chain.head, self._last, self._size = NOTHING, 0, 0
                return self._move_torn(0, size)
            window *= 8

    def _move_torn(self, end: int, size: int) -> Path | None:
        if end == size:
            return None
        stamp = datetime.now(UTC).strftime("%Y%m%dT%H%M%S.%fZ")
        aside = self.path.with_name(f"{self.path.name}.torn-{stamp}")
        with aside.open("xb") as file:
            file.write(_read(self._fd, end, size))
            file.flush()
            os.fsync(file.fileno())
        os.ftruncate(self._fd, end)
        return aside


def _read(fd: int, start: int, end: int) -> bytes:
    parts = []
    while start < end and (part := os.pread(fd, end - start, start)):
        parts.append(part)
        start += len(part)
    return b"".join(parts)
