"""What the log keeps, and the ways in which it can fail."""

from __future__ import annotations

import errno
from pathlib import Path

import msgspec

from events.envelope import Event, Gap, encode

_NEXT_STEP = {
    "SQLITE_FULL": "free space on that disk",
    "SQLITE_READONLY": "make it writable",
    "SQLITE_BUSY": "end the other process that uses it",
    "SQLITE_LOCKED": "end the other process that uses it",
    "SQLITE_CANTOPEN": "check that its folder exists and is writable",
}
_NEXT_STEP_OF_ERRNO = {
    errno.ENOSPC: "free space on that disk",
    errno.EDQUOT: "free space on that disk",
    errno.EACCES: "make it writable",
    errno.EROFS: "make it writable",
}


class Record(msgspec.Struct, frozen=True, gc=False):
    """An event as it is read: `json` is its CloudEvents form, the same bytes for every reader."""

    sequence: int
    type: str
    subject: str | None
    json: bytes

    @classmethod
    def of(cls, event: Event, source: str) -> Record:
        """The record of an event of the engine `source`. Raises where it has no JSON form."""
        return cls(event.sequence, event.type, event.subject, encode(event, source))

    @property
    def end(self) -> int:
        """The last number this record stands for: its own, or for a gap the last that is missing."""
        return self.sequence if self.type != Gap.TYPE else max(self.sequence, _gap_end(self.json))


class _GapBounds(msgspec.Struct):
    last: int


class _GapEnvelope(msgspec.Struct):
    data: _GapBounds


_gap_decoder = msgspec.json.Decoder(_GapEnvelope)


def _gap_end(json: bytes) -> int:
    return _gap_decoder.decode(json).data.last


class CorruptLog(Exception):
    """The file is not a sound log. `EventLog.repair(path)` moves it aside."""

    def __init__(self, path: Path, why: str) -> None:
        super().__init__(f"{path}: {why}; `EventLog.repair` moves it aside and keeps it")
        self.path = path
        self.why = why


class LogUnavailable(Exception):
    """The file cannot be used now; the message says what to do."""

    def __init__(self, path: Path, why: str, next_step: str) -> None:
        super().__init__(f"{path}: {why}; {next_step}")
        self.path = path
        self.why = why


class FileGone(OSError):
    """The file that is open here no longer stands at its path."""


def explain(path: Path, exc: Exception) -> Exception:
    """A `CorruptLog` or `LogUnavailable` for what SQLite, the operating system or a decoder said."""
    code = getattr(exc, "sqlite_errorname", None) or ""
    if code.startswith(("SQLITE_CORRUPT", "SQLITE_NOTADB")) or isinstance(exc, msgspec.MsgspecError):
        return CorruptLog(path, str(exc))
    step = next((step for name, step in _NEXT_STEP.items() if code.startswith(name)), "check the disk")
    if isinstance(exc, OSError):
        step = _NEXT_STEP_OF_ERRNO.get(exc.errno or 0, step)
    return LogUnavailable(path, str(exc), step)
