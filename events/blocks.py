"""Calls as the log's file has them: in blocks, many to a row.

Nearly all events are of calls. A row for each, with its JSON and its entries in the indexes, takes longer than all
else that is done for an event. So what is packed at once of a plugin's calls in a window of numbers is one row:

    first     the number of the first
    subject   the plugin
    marks     a byte for each: how far its number is behind `first` (6 bits), and its type (2 bits)
    json      {"source": …, "times": […], "data": […]}: the engine that wrote them, and in the same order when each
              was (microseconds since the epoch) and its `data`

That is all that is in their CloudEvents lines, in a third of the bytes; the lines are made for who reads them.
`data` goes into them byte by byte, whatever the engine that reads knows of its fields: the same line every time.

Windows are `SPAN` numbers long and begin after its multiples, whatever the batches are; no block reaches from one
into another. So what begins before a window ends there, too.
"""

from __future__ import annotations

import math
import sqlite3
from bisect import bisect_right
from collections.abc import Sequence
from itertools import pairwise
from typing import Annotated, Any, NamedTuple

import msgspec

from events.envelope import CallFinished, CallProgress, CallStarted, Event, encode_line
from events.record import Record

SPAN = 64
_TYPES = (CallStarted, CallFinished)  # by the upper bits of a mark
_MARKS = {kind: index * SPAN for index, kind in enumerate(_TYPES)}
CALLS = frozenset(kind.TYPE for kind in _TYPES)
UNREADABLE = b"null"  # JSON, and no event

_FIRST_US, _END_US = -62_135_596_800_000_000, 253_402_300_800_000_000  # of the years 1 to 9999, which RFC 3339 has


class DamagedBlock(sqlite3.DatabaseError):
    """A block is not as it was written: as if SQLite had said so of its page."""

    sqlite_errorname = "SQLITE_CORRUPT"

    def __init__(self, first: int) -> None:
        super().__init__(f"the calls from {first} on are damaged")
        self.first = first


class _Calls(msgspec.Struct, frozen=True):
    """The JSON of a block. Invariant: `source` stands first, so that it does not begin as a line does."""

    source: str
    times: list[Annotated[int, msgspec.Meta(ge=_FIRST_US, lt=_END_US)]]
    data: list[Any]  # written as it is, read as `msgspec.Raw`


class _Read(_Calls, frozen=True):
    data: list[msgspec.Raw]


_encoder = msgspec.json.Encoder()
_decoder = msgspec.json.Decoder(_Read)


class Block(NamedTuple):
    """A row of the table of calls, its columns in order."""

    first: int
    subject: str
    marks: bytes
    json: bytes

    @property
    def numbers(self) -> list[int]:
        """Of its events, in order. Raises DamagedBlock."""
        marks = self.marks
        if isinstance(marks, bytes) and marks and max(marks) < len(_TYPES) * SPAN:
            numbers = [self.first + mark % SPAN for mark in marks]
            rising = all(before < after for before, after in pairwise(numbers))
            if rising and numbers[0] == self.first and window(numbers[-1]) == window(self.first):
                return numbers
        raise DamagedBlock(self.first)

    @property
    def last(self) -> int:
        """The number of the last. Raises DamagedBlock."""
        return self.numbers[-1]


COLUMNS = ", ".join(Block._fields)


class Packed(NamedTuple):
    """Events as the file has them, or is to have them."""

    rows: list[Record]  # those that get a row each
    calls: list[Block]


def window(number: int) -> int:
    """The last number before the window that `number` is in."""
    return (number - 1) // SPAN * SPAN


def window_end(number: int) -> int:
    """The last number of it."""
    return window(number) + SPAN


def pack(events: Sequence[Event], source: str) -> Packed:
    """Events of the engine `source`, in the order of their numbers, as the file is to have them.

    Raises where one has no JSON form, or none that could be read: NaN and infinity would be written as null.
    """
    rows: list[Record] = []
    calls: dict[tuple[int, str], list[Event]] = {}
    block: list[Event] = []  # that the last call went into
    subject, end = "", 0
    for event in events:
        data = event.data
        if isinstance(data, CallFinished):
            finite = math.isfinite(data.duration_ms)
        elif isinstance(data, CallProgress):
            finite = math.isfinite(data.done) and math.isfinite(data.total)
        else:
            finite = True
        if not finite:
            raise ValueError("not a finite number")
        if event.subject is None or type(data) not in _MARKS:
            rows.append(Record.of(event, source))
            continue
        if event.sequence > end or event.subject != subject:
            subject, end = event.subject, window_end(event.sequence)
            subject.encode()  # a lone surrogate would be SQLite's to refuse, and for the whole batch
            block = calls.setdefault((end, subject), [])
        block.append(event)
    return Packed(rows, [_block(subject, of_it, source) for (_, subject), of_it in calls.items()])


def _block(subject: str, events: Sequence[Event], source: str) -> Block:
    first = events[0].sequence
    marks = bytes([event.sequence - first + _MARKS[type(event.data)] for event in events])
    times = [event.time_ns // 1000 for event in events]
    if min(times) < _FIRST_US or max(times) >= _END_US:
        raise ValueError("no time of the years 1 to 9999")
    return Block(first, subject, marks, _encoder.encode(_Calls(source, times, [event.data for event in events])))


def unpack(block: Block) -> list[Record]:
    """The records of a block; where it is not known which part of the JSON is whose, none of them is an event.

    Raises:
        DamagedBlock: it is not known which numbers it has.
    """
    numbers, subject, parts = block.numbers, block.subject, _parts(block)
    types = [_TYPES[mark // SPAN].TYPE for mark in block.marks]
    if isinstance(parts, _Read):
        each = zip(numbers, types, parts.times, parts.data, strict=True)
        lines = [
            encode_line(n, kind, subject, time_us * 1000, data, parts.source) for n, kind, time_us, data in each
        ]
    else:
        lines = parts or [UNREADABLE] * len(numbers)
    return [Record(number, kind, subject, line) for number, kind, line in zip(numbers, types, lines, strict=True)]


def tail(block: Block, after: int) -> Block | None:
    """What of a block is numbered above `after`; None: nothing. Raises DamagedBlock."""
    numbers, parts = block.numbers, _parts(block)
    start = bisect_right(numbers, after)
    if start == len(numbers):
        return None
    first = numbers[start]
    marks = bytes([mark - (first - block.first) for mark in block.marks[start:]])
    if isinstance(parts, _Read):
        json = _encoder.encode(_Calls(parts.source, parts.times[start:], parts.data[start:]))
    else:
        json = UNREADABLE if parts is None else b"\n".join(parts[start:])
    return Block(first, block.subject, marks, json)


def _parts(block: Block) -> _Read | list[bytes] | None:
    """What a block holds, a part for each of its numbers; None where that cannot be told.

    Whole CloudEvents lines, if it was written by version 2 of the file.
    """
    json, count = block.json, len(block.marks)
    if isinstance(json, bytes) and json.startswith(b'{"specversion"'):
        lines = json.split(b"\n")
        return lines if len(lines) == count else None
    try:
        calls = _decoder.decode(json)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError, TypeError):  # a column may hold a number
        return None
    return calls if len(calls.times) == len(calls.data) == count else None
