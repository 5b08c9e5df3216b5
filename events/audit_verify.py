"""Checking an audit file: is every line there, unaltered, in order?

Line format: one JSON object per line, made by `events.audit`. `prev` is the SHA-256, in hex, of all bytes of the
line before, its newline included (`sed -n 41p audit.jsonl | sha256sum` is the `prev` of line 42); in the first
line it is 64 zeros. A line with `sequence` is that event; one with `after` is a note of the audit itself, and
says after which event it stands.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Literal

import msgspec

from events.envelope import Gap

NOTHING = "0" * 64  # `prev` of the first line

Trouble = Literal["altered", "missing", "inserted", "reordered", "torn", "not_json"]


class AuditReport(msgspec.Struct, frozen=True):
    """What `verify` found. Line numbers count from 1."""

    ok: bool
    lines: int
    last: int  # the number of the last event found before the first trouble
    bad_line: int | None = None  # where the first trouble is
    trouble: Trouble | None = None
    detail: str | None = None


class _Bounds(msgspec.Struct):
    last: int | None = None


class Line(msgspec.Struct):
    """What the chain needs to know of a line."""

    prev: str
    event: str
    sequence: int | None = None
    after: int | None = None
    data: _Bounds | None = None

    @property
    def end(self) -> int:
        """The last event number that the file covers with this line."""
        if self.sequence is None:
            return self.after or 0
        if self.event == Gap.TYPE and self.data is not None and self.data.last is not None:
            return max(self.sequence, self.data.last)
        return self.sequence

    def follows(self, last: int) -> bool:
        """Whether it may stand after event `last`; a note may start the numbers anew."""
        if self.sequence is None:
            return True
        return self.sequence == last + 1 or self.sequence <= last < self.end


_decoder = msgspec.json.Decoder(Line)


def digest(raw: bytes) -> str:
    """What the next line's `prev` must be; `raw` ends with its newline."""
    return hashlib.sha256(raw).hexdigest()


def parse(raw: bytes) -> Line | None:
    """The line, or None if it is not one of ours."""
    try:
        return _decoder.decode(raw) if raw.endswith(b"\n") else None
    except (msgspec.MsgspecError, UnicodeDecodeError):
        return None


def verify(path: Path, *, last: int | None = None) -> AuditReport:
    """Find the first altered, missing, inserted, reordered or torn line of an audit file.

    What it cannot find: lines cut off at the end leave a sound, shorter chain; only the log knows that there was
    more, so pass its last number as `last`. A change to the very last line shows once another follows. And the
    chain has no key: who can rewrite every line after the change can make it sound again, so keep the last
    line's digest elsewhere if that matters.

    Args:
        path: the file; read line by line, its size does not matter.
        last: the number of the last event that must be there.

    Raises:
        OSError: it cannot be read.
    """
    head, end, count, before = NOTHING, 0, 0, None
    with path.open("rb") as file:
        for count, raw in enumerate(file, 1):
            line = parse(raw)
            if line is None or line.prev != head or not line.follows(end):
                total = count + sum(1 for _ in file)
                return _diagnose(path, total, count, raw, line, end, before, head)
            head, end, before = digest(raw), line.end, line
    if last is not None and end < last:
        detail = f"the file ends with event {end}, the log with {last}: the end was cut off, or is not written yet"
        return AuditReport(False, count, end, count + 1, "missing", detail)
    return AuditReport(True, count, end)


def _diagnose(
    path: Path,
    total: int,
    number: int,
    raw: bytes,
    line: Line | None,
    end: int,
    before: Line | None,
    head: str,
) -> AuditReport:
    def report(bad_line: int, trouble: Trouble, detail: str) -> AuditReport:
        return AuditReport(False, total, end, bad_line, trouble, detail)

    if line is None:
        if not raw.endswith(b"\n"):
            return report(number, "torn", "the last line has no end: the writer was killed while writing it")
        return report(number, "not_json", "not a line of an audit file")
    rest = _lines(path, number)
    after = next(rest, None)
    intact = after is None or after.prev == digest(raw)  # the next line remembers this one as it is
    sequence, expected = line.sequence, end + 1
    if sequence is not None and sequence > expected:
        if line.prev == head:
            return report(number, "altered", f"event {expected} was expected, {sequence} stands there")
        if any(other.sequence == expected for other in (after, *rest) if other is not None):
            return report(number, "reordered", f"event {sequence} stands before event {expected}")
        return report(number, "missing", f"event {expected} and what follows up to {sequence - 1}")
    if sequence is not None and sequence < expected:
        copied = digest(raw) == head
        if before is not None and before.sequence == sequence and intact and not copied:
            return report(number - 1, "inserted", f"event {sequence} is there twice")
        return report(number, "inserted", f"event {sequence} after event {end}")
    if sequence is not None and after is not None and after.sequence == sequence:
        return report(number, "inserted", f"event {sequence} is there twice")
    if not intact:
        return report(number, "altered", "the next line remembers it differently")
    if number == 1:
        return report(1, "missing", "the file does not begin here")
    return report(number - 1, "altered", f"line {number} remembers it differently")


def _lines(path: Path, skip: int) -> Iterator[Line]:
    with path.open("rb") as file:
        for raw in islice(file, skip, None):
            if (line := parse(raw)) is not None:
                yield line
