"""Calls are kept in blocks, and nobody who reads can tell."""

from __future__ import annotations

import contextlib
import itertools
import sqlite3
import tempfile
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from events.blocks import CALLS, COLUMNS, SPAN, UNREADABLE, Block, DamagedBlock, pack, tail, unpack, window
from events.bus import EventBus
from events.envelope import (
    CallFinished,
    CallStarted,
    Event,
    EventData,
    Gap,
    PluginLog,
    Restarted,
    decode,
    encode,
    rfc3339,
    rfc3339_all,
)
from events.log import CorruptLog, EventLog
from events.projections import HealthProjection
from events.record import Record
from events.snapshot import Snapshot
from events.store import Numbering, Store

STARTED, FINISHED = "plugin.call.started", "plugin.call.finished"
SOURCE = "holdfast/5f0c"
MEMORY = Path("/dev/shm")  # each batch is synced, which a disk takes its time for


def data_of(kind: type[EventData], text: str) -> EventData:
    if kind is CallStarted:
        return CallStarted("read", text)
    if kind is CallFinished:
        return CallFinished("read", text, True, len(text) / 3)
    return PluginLog("log", "info", text) if kind is PluginLog else Restarted(len(text))


def given_events(kinds: Sequence[tuple[type[EventData], str | None]], first: int = 1) -> list[Event]:
    """Of these types and plugins, in a row."""
    return [
        Event(number, number * 1_234_567_000, plugin, data_of(kind, "é" * (number % 5)))
        for number, (kind, plugin) in enumerate(kinds, first)
    ]


def records(events: Sequence[Event]) -> list[Record]:
    """What a reader gets."""
    return [Record(event.sequence, event.type, event.subject, encode(event, SOURCE)) for event in events]


def older(block: Block) -> Block:
    """As version 2 of the file had it: whole lines."""
    return block._replace(json=b"\n".join([record.json for record in unpack(block)]))


@contextlib.contextmanager
def opened(path: Path) -> Iterator[Store]:
    """The next one that opens it looks closely."""
    store = Store(path)
    try:
        yield store
    finally:
        store.close(clean=False)


kinds = st.lists(
    st.tuples(
        st.sampled_from([CallStarted, CallFinished, CallFinished, PluginLog, Restarted]),
        st.sampled_from(["a", "b", "c", None]),
    ),
    max_size=400,
)


def cut(drawn: list[Event], at: Collection[int]) -> list[list[Event]]:
    """Batches."""
    edges = [0, *sorted(edge for edge in at if edge < len(drawn)), len(drawn)]
    return [drawn[start:end] for start, end in itertools.pairwise(edges) if start < end]


@given(kinds, st.integers(1, 1000))
@settings(deadline=None)
def test_a_block_has_what_was_put_into_it_and_keeps_to_its_window(
    drawn: list[tuple[type[EventData], str | None]], first: int
) -> None:
    published = given_events(drawn, first)
    rows, blocks = pack(published, SOURCE)
    unpacked = [record for block in blocks for record in unpack(block)]
    assert sorted([*rows, *unpacked], key=lambda record: record.sequence) == records(published)
    assert all(record.type in CALLS and record.subject is not None for record in unpacked)
    assert not any(record.type in CALLS and record.subject is not None for record in rows)
    assert len(blocks) == len({(window(record.sequence), record.subject) for record in unpacked})
    for block in blocks:
        assert window(block.first) == window(block.last) < block.first <= block.last
        assert block.last - block.first < SPAN
        assert block.last == unpack(block)[-1].sequence
        assert unpack(older(block)) == unpack(block)


@given(kinds, st.integers(1, 1000), st.integers(0, 1500), st.booleans())
@settings(deadline=None)
def test_the_tail_of_a_block_is_what_comes_after_a_number(
    drawn: list[tuple[type[EventData], str | None]], first: int, after: int, old: bool
) -> None:
    for block in pack(given_events(drawn, first), SOURCE).calls:
        rest = tail(older(block) if old else block, after)
        assert (unpack(rest) if rest else []) == [record for record in unpack(block) if record.sequence > after]


@given(st.lists(st.integers(-62_135_596_800_000_000, 253_402_300_799_999_999)))
def test_times_of_many_are_those_of_each_also_where_the_clock_went_back(times_us: list[int]) -> None:
    times_ns = [time_us * 1000 for time_us in (*times_us, 0, 999_999, 1_000_000, 999_999, -1, 0)]
    assert rfc3339_all(times_ns) == [rfc3339(time_ns) for time_ns in times_ns]


def test_a_line_has_the_data_as_it_was_written_whatever_is_known_of_its_fields() -> None:
    [block] = pack(given_events([(CallStarted, "a")]), SOURCE).calls
    later = block._replace(json=block.json.replace(b'"tool":"read"', b'"mood":["good"],"tool":"read"'))
    [record] = unpack(later)
    assert b'"data":{"mood":["good"],"tool":"read"' in record.json
    assert decode(record.json).data == CallStarted("read", "é")


@given(
    kinds,
    st.sets(st.integers(1, 400), max_size=5),
    st.integers(-5, 410),
    st.integers(0, 410),
    st.integers(0, 500),
    st.none() | st.sets(st.sampled_from(["a", "b", "c", "none"])),
    st.none() | st.sets(st.sampled_from([STARTED, FINISHED, "plugin.log", "plugin.progress"])),
)
@settings(deadline=None, max_examples=200)
def test_a_read_gives_what_a_list_of_all_would_give(
    drawn: list[tuple[type[EventData], str | None]],
    edges: set[int],
    after: int,
    until: int,
    limit: int,
    subjects: set[str] | None,
    types: set[str] | None,
) -> None:
    published = given_events(drawn)
    given_records = records(published)
    with (
        tempfile.TemporaryDirectory(dir=MEMORY if MEMORY.is_dir() else None) as folder,
        opened(Path(folder) / "events.db") as store,
    ):
        for batch in cut(published, edges):
            store.append(pack(batch, SOURCE))
        wanted = [
            record
            for record in given_records
            if after < record.sequence <= until
            and (subjects is None or record.subject in subjects)
            and (types is None or record.type in types)
        ]
        assert store.read(after, until, limit, subjects, types) == wanted[:limit]
        assert store.last() == len(given_records)


@given(kinds, st.sets(st.integers(1, 400), max_size=5), st.integers(1, 400))
@settings(deadline=None, max_examples=100)
def test_calls_can_be_let_go_up_to_any_number(
    drawn: list[tuple[type[EventData], str | None]], edges: set[int], until: int
) -> None:
    published = given_events(drawn)
    given_records = records(published)
    with tempfile.TemporaryDirectory(dir=MEMORY if MEMORY.is_dir() else None) as folder:
        path = Path(folder) / "events.db"
        with opened(path) as store:
            for batch in cut(published, edges):
                store.append(pack(batch, SOURCE))
            let_go = pack(published[:until], SOURCE).rows
            with store.transaction() as writer:
                store.delete_calls(writer, until)
                store.renumber(writer, Numbering(1, until + 1, len(let_go)))
            kept = [*let_go, *given_records[until:]]
            assert store.read(0, len(given_records), 1000) == kept
        with opened(path) as store:  # which counts them, for it was not closed cleanly
            assert store.unclean
            assert store.read(0, len(given_records), 1000) == kept


def test_calls_of_many_plugins_are_found_whether_few_are_asked_for_or_many(tmp_path: Path) -> None:
    with opened(tmp_path / "events.db") as store:
        store.append(pack(given_events([(CallStarted, f"plugin{number}") for number in range(1000)]), SOURCE))
        for count in (0, 1, 399, 400, 401, 600):
            chosen = [f"plugin{number}" for number in range(count)]
            found = store.read(0, 1000, 1000, chosen, [STARTED])
            assert [record.subject for record in found] == chosen


def damaged(tmp_path: Path) -> Path:
    """A log with 5 calls in one block, closed cleanly, to be damaged."""
    path = tmp_path / "events.db"
    with EventLog.open(path, source="test") as log:
        bus = EventBus(HealthProjection())
        bus.subscribe(log)
        with log._changed:  # in one batch
            for number in range(5):
                bus.publish(CallStarted("read", str(number)), "ocr")
    return path


MARKS: dict[str, tuple[int, Any]] = {
    "none": (1, b""),
    "no such type": (1, b"\x00\xff"),
    "twice": (1, b"\x00\x41\x01"),
    "falling": (1, b"\x00\x02\x01"),
    "not at the first": (1, b"\x01\x02"),
    "beyond the window": (3, b"\x00\x3e"),
    "a number": (1, 12345),
    "a text": (1, "abcde"),
}


@pytest.mark.parametrize(("first", "marks"), MARKS.values(), ids=MARKS)
def test_a_block_of_unknown_numbers_is_a_corrupt_log(tmp_path: Path, first: int, marks: Any) -> None:
    with pytest.raises(DamagedBlock, match=f"the calls from {first} on are damaged"):
        assert Block(first, "ocr", marks, b"").numbers
    path = damaged(tmp_path)
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as raw:
        raw.execute("UPDATE calls SET first = ?, marks = ?", (first, marks))
    with pytest.raises(CorruptLog, match=r"the calls from . on are damaged|numbers are missing|numbering begins"):
        EventLog.open(path, source="test").close()


def parts(json: bytes, **changes: Any) -> bytes:
    """The JSON of a block, changed."""
    return msgspec.json.encode(msgspec.json.decode(json) | changes)


UNREAD: dict[str, Callable[[bytes], Any]] = {
    "empty": lambda _: b"{}",
    "nothing": lambda _: b"",
    "a number": lambda _: 5,
    "torn": lambda json: json[:40],
    "no data": lambda json: json.replace(b'"data"', b'"gone"'),
    "a time too many": lambda json: parts(json, times=[0] * 6),
    "one too few": lambda json: parts(json, times=[0] * 4, data=[{"tool": "read", "request_id": "0"}] * 4),
    "no such time": lambda json: parts(json, times=[10**18] * 5),
    "no UTF-8": lambda json: json.replace(b'"test"', b'"te\xffst"'),
    "deep": lambda json: parts(json, data=[]).replace(
        b'"data":[]', b'"data":[' + b"[" * 200_000 + b"]" * 200_000 + b"]"
    ),
    "a line of version 2": lambda _: b'{"specversion"',
}


@pytest.mark.parametrize("change", UNREAD.values(), ids=UNREAD)
def test_what_cannot_be_read_of_a_block_is_replayed_as_gaps_and_counted(
    tmp_path: Path, change: Callable[[bytes], Any]
) -> None:
    path = damaged(tmp_path)
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as raw:
        [row] = raw.execute(f"SELECT {COLUMNS} FROM calls").fetchall()
        block = Block(*row)
        block = block._replace(json=change(block.json))
        raw.execute("UPDATE calls SET json = ?", (block.json,))
    rest = tail(block, 2)  # nor what is left of it when the others were let go
    assert rest is not None
    assert [(record.sequence, record.json) for record in unpack(rest)] == [(n, UNREADABLE) for n in (3, 4, 5)]
    with EventLog.open(path, source="test", ring=1) as log:
        told = [decode(record.json).data for record in log.page(0, 9)]
        assert [data.first for data in told if isinstance(data, Gap)] == [1, 2, 3, 4, 5]
        assert log.page(0, 0) == []
        found = list(log.replay())
        assert [(event.sequence, type(event.data)) for event in found] == [(number, Gap) for number in range(1, 6)]
        assert log.faults["decode"].count == 5


@pytest.mark.parametrize(("column", "value"), [("json", b""), ("json", b'{"specversion"'), ("marks", b"z" * SPAN)])
@pytest.mark.parametrize("bounds", [{"retain_days": 1e-9}, {"retain_events": 100}], ids=["days", "events"])
def test_retention_goes_past_what_cannot_be_read(
    tmp_path: Path, column: str, value: bytes, bounds: dict[str, Any]
) -> None:
    path = tmp_path / "events.db"
    with opened(path) as store:
        store.append(pack(given_events([(CallStarted, "a")] * 1000), SOURCE))
        store.put_meta("snapshot", msgspec.msgpack.encode(Snapshot(1000, {})))
        store.put_meta("clean", "1")
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as raw:
        raw.execute(f"UPDATE calls SET {column} = ? WHERE first = 449", (value,))  # in which a turn of 500 ends
    with EventLog.open(path, source="test", **bounds) as log:
        bus = EventBus(HealthProjection(), last=1000)
        bus.subscribe(log)
        for number in range(200):
            bus.publish(CallStarted("read", str(number)), "a")
            assert log.flush(20.0)
            if log.first > 512:
                break
        assert log.first > 512
        assert "retention" not in log.faults
