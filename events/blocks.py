"""Calls as the log's file has them: in blocks, many to a row.

Nearly all events are of calls. A row for each, with its entries in the indexes, takes SQLite nearly as long as all
else that is done for an event. So what a batch brings of one plugin's calls within a window of numbers is one row:

    first     the number of the first
    subject   the plugin
    marks     a byte for each: how far its number is behind `first` (6 bits), and its type (2 bits)
    lines     their JSON, in the same order

Windows are `SPAN` numbers long and begin after its multiples, whatever the batches are; no block reaches from one
into another. So what begins before a window ends there, too.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import NamedTuple

from events.envelope import CallFinished, CallStarted
from events.record import Record

SPAN = 64
_TYPES = (CallStarted.TYPE, CallFinished.TYPE)  # by the upper bits of a mark
_MARKS = {name: index * SPAN for index, name in enumerate(_TYPES)}
CALLS = frozenset(_TYPES)
UNREADABLE = b"null"  # JSON, and no event


class DamagedBlock(sqlite3.DatabaseError):
    """A block is not as it was written: as if SQLite had said so of its page."""

    sqlite_errorname = "SQLITE_CORRUPT"

    def __init__(self, first: int) -> None:
        super().__init__(f"the calls from {first} on are damaged")
        self.first = first


class Block(NamedTuple):
    """A row of the table of calls, its columns in order."""

    first: int
    subject: str
    marks: bytes
    lines: bytes

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


def window(number: int) -> int:
    """The last number before the window that `number` is in."""
    return (number - 1) // SPAN * SPAN


def pack(records: Iterable[Record]) -> tuple[list[Record], list[Block]]:
    """What gets a row of its own, and the calls in blocks; `records` are in the order of their numbers."""
    rows: list[Record] = []
    calls: dict[tuple[int, str], list[Record]] = {}
    for record in records:
        if record.type in CALLS and record.subject is not None:
            calls.setdefault((window(record.sequence), record.subject), []).append(record)
        else:
            rows.append(record)
    return rows, [_block(subject, of_it) for (_, subject), of_it in calls.items()]


def _block(subject: str, records: Sequence[Record]) -> Block:
    first = records[0].sequence
    marks = bytes([record.sequence - first + _MARKS[record.type] for record in records])
    return Block(first, subject, marks, b"\n".join([record.json for record in records]))


def unpack(block: Block) -> list[Record]:
    """The records of a block; where it is not known which line is whose, none of them is an event.

    Raises:
        DamagedBlock: it is not known which numbers it has.
    """
    numbers = block.numbers
    lines = block.lines.split(b"\n") if isinstance(block.lines, bytes) else []
    if len(lines) != len(numbers):
        lines = [UNREADABLE] * len(numbers)
    return [
        Record(number, _TYPES[mark // SPAN], block.subject, line)
        for number, mark, line in zip(numbers, block.marks, lines, strict=True)
    ]
