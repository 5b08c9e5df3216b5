"""Calls as the log's file has them: in blocks, many to a row.

Nearly all events are of calls. A row for each, with its entries in the indexes, takes SQLite longer than all that
is done for an event before. So what a batch brings of one plugin's calls within a window of numbers is one row:

    first     the number of the first
    subject   the plugin
    marks     a byte for each: how far its number is behind `first` (6 bits), and its type (2 bits)
    lines     their JSON, in the same order

Windows are `SPAN` numbers long and begin after its multiples, whatever the batches are; no block reaches from one
into another. So what begins before a window ends there, too.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from events.envelope import CallFinished, CallStarted
from events.record import Record

SPAN = 64
_TYPES = (CallStarted.TYPE, CallFinished.TYPE)  # by the upper bits of a mark
_MARKS = {name: index * SPAN for index, name in enumerate(_TYPES)}
CALLS = frozenset(_TYPES)


class Block(NamedTuple):
    """A row of the table of calls, its columns in order."""

    first: int
    subject: str
    marks: bytes
    lines: bytes

    @property
    def last(self) -> int:
        """The number of the last."""
        return self.first + max((mark % SPAN for mark in self.marks), default=0)


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
            calls.setdefault(((record.sequence - 1) // SPAN, record.subject), []).append(record)
        else:
            rows.append(record)
    return rows, [_block(subject, of_it) for (_, subject), of_it in calls.items()]


def _block(subject: str, records: Sequence[Record]) -> Block:
    first = records[0].sequence
    marks = bytes([record.sequence - first + _MARKS[record.type] for record in records])
    return Block(first, subject, marks, b"\n".join([record.json for record in records]))


def unpack(block: Block) -> list[Record]:
    """The records of a block. Raises ValueError: it is damaged."""
    first, subject = block.first, block.subject
    try:
        return [
            Record(first + mark % SPAN, _TYPES[mark // SPAN], subject, line)
            for mark, line in zip(block.marks, block.lines.split(b"\n"), strict=True)
        ]
    except (IndexError, ValueError) as exc:
        raise ValueError(f"the calls from {first} on are damaged") from exc
