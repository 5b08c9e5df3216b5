"""The audit file: one structlog JSON line per durable event, each with the SHA-256 of the line before.

    log's writer thread ──batch──▶ structlog: level · redact · chain · JSON ──▶ one write per batch ──▶ audit.jsonl

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
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from typing import Any, Literal, TypeAlias

import msgspec
import structlog

from events.audit_verify import NOTHING, AuditReport, digest, parse, verify
from events.bus import Fault
from events.envelope import CallFinished, Event, Gap, Transition
from events.log import Batch, CorruptLog, EventLog, LogClosed, LogUnavailable
from events.redact import Fields, redactor

__all__ = ["AuditLog", "AuditReport", "AuditState", "verify"]

CATCH_UP_EVENTS = 20_000  # at most, while a batch of the log waits: under half a second
WRITE_EVENTS = 1000
TAIL_BYTES = 1 << 20

log = structlog.get_logger(__name__)

Level: TypeAlias = Literal["info", "warning", "error"]

_encoder = msgspec.json.Encoder()


class AuditState(msgspec.Struct, frozen=True):
    """How the audit is."""

    ok: bool
    error: str | None
    last: int  # the number of the last event audited
    faults: int


def level_of(event: Event) -> Level:
    """`error` where a plugin broke or events were lost, `warning` where one cannot work here, else `info`."""
    data = event.data
    if isinstance(data, Transition):
        return "error" if data.to == "FAILED" else "warning" if data.to == "UNAVAILABLE" else "info"
    if isinstance(data, Gap) or (isinstance(data, CallFinished) and data.broke):
        return "error"
    return "info"


class _Chain:
    """The last processor: links each line to the one before and renders it."""

    def __init__(self) -> None:
        self.head = NOTHING
        self.lines: list[bytes] = []

    def __call__(self, _logger: Any, _level: str, fields: Fields) -> bytes:
        fields["prev"] = self.head
        raw = _encoder.encode(fields) + b"\n"
        self.head = digest(raw)
        return raw

    def take(self, raw: bytes) -> None:
        """The sink that structlog calls with the rendered line."""
        self.lines.append(raw)

    info = warning = error = take


class _Emitter(structlog.BoundLoggerBase):
    def emit(self, level: Level, event: str, fields: dict[str, Any]) -> None:
        self._proxy_to_logger(level, event, **fields)


def _event_first(_logger: Any, level: str, fields: Fields) -> Fields:
    """The order a person reads in: number, time, level, what, whose, the rest."""
    head = {key: fields.pop(key) for key in ("sequence", "time") if key in fields}
    return {**head, "level": level, "event": fields.pop("event"), **fields}


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
        self._chain = _Chain()
        processors: list[Any] = [_event_first, redactor(redact), self._chain]
        self._emitter: _Emitter = structlog.wrap_logger(
            self._chain, processors=processors, wrapper_class=_Emitter, context_class=dict
        ).bind()

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
                self._write(part)
                written += len(part)
        return written

    def close(self) -> None:
        """Flush to the disk, let go of the file. Call it after the log's `close`, which writes its last batch."""
        with self._lock, contextlib.suppress(OSError):
            self._closed = True
            if self._fd >= 0:
                os.fsync(self._fd)
                self._release()

    def _on_batch(self, batch: Batch) -> None:
        if self._closed:
            return
        with self._lock, self._noting_faults():
            self._ready()
            if self._last + 1 == batch.events[0].sequence:
                self._write(batch.events)
                return
            for part in self._missing(CATCH_UP_EVENTS):
                self._write(part)

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
        self.fault = Fault(1 if self.fault is None else self.fault.count + 1, why)

    # From events to lines

    def _missing(self, limit: int | None) -> Iterator[list[Event]]:
        source = self._source
        if source is None:
            return
        if source.durable < self._last:
            self._write_note("audit.log_replaced", after=source.first - 1, had=self._last)
        elif self._last + 1 < source.first:
            self._write_note("audit.events_not_kept", after=source.first - 1, had=self._last)
        events = islice(source.replay(self._last), limit)
        while part := list(islice(events, WRITE_EVENTS)):
            yield part

    def _write(self, events: Sequence[Event]) -> None:
        try:
            for event in events:
                fields: dict[str, Any] = {"sequence": event.sequence, "time": event.time}
                if event.subject is not None:
                    fields["plugin"] = event.subject
                fields["data"] = msgspec.to_builtins(event.data)
                self._emitter.emit(level_of(event), event.type, fields)
        except BaseException:
            self._release()  # the chain in memory is ahead of the file; opening it again sets that right
            raise
        last = events[-1]
        self._append(last.data.last if isinstance(last.data, Gap) else last.sequence)

    def _write_note(self, name: str, *, after: int, **fields: Any) -> None:
        """A line about the audit itself; `after` is the event it follows."""
        time = datetime.now(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")
        self._emitter.emit("warning", name, {"time": time, "after": after, **fields})
        self._append(after)

    def _append(self, last: int) -> None:
        """Write the lines rendered so far; the file then covers events up to `last`."""
        lines, self._chain.lines = b"".join(self._chain.lines), []
        try:
            left = memoryview(lines)
            while left:
                left = left[os.write(self._fd, left) :]
        except OSError:
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
        size, window, self._chain.lines = os.fstat(self._fd).st_size, TAIL_BYTES, []
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
