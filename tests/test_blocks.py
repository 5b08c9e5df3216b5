"""Calls are kept in blocks, and nobody who reads can tell."""

from __future__ import annotations

import contextlib
import itertools
import sqlite3
import tempfile
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from events.blocks import CALLS, SPAN, Block, pack, unpack, window
from events.log import CorruptLog, EventLog
from events.record import Record
from events.store import Numbering, Store

STARTED, FINISHED = "plugin.call.started", "plugin.call.finished"
MEMORY = Path("/dev/shm")  # each batch is synced, which a disk takes its time for


def records(kinds: Sequence[tuple[str, str | None]], first: int = 1) -> list[Record]:
    """Of these types and plugins, in a row."""
    return [
        Record(number, kind, plugin, b'{"sequence":%d}' % number)
        for number, (kind, plugin) in enumerate(kinds, first)
    ]


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
        st.sampled_from([STARTED, FINISHED, FINISHED, "plugin.log", "plugin.restarted"]),
        st.sampled_from(["a", "b", "c", None]),
    ),
    max_size=400,
)


def cut(drawn: list[Record], at: Collection[int]) -> list[list[Record]]:
    """Batches."""
    edges = [0, *sorted(edge for edge in at if edge < len(drawn)), len(drawn)]
    return [drawn[start:end] for start, end in itertools.pairwise(edges) if start < end]


@given(kinds, st.integers(1, 1000))
@settings(deadline=None)
def test_a_block_has_what_was_put_into_it_and_keeps_to_its_window(
    drawn: list[tuple[str, str | None]], first: int
) -> None:
    given_records = records(drawn, first)
    rows, blocks = pack(given_records)
    unpacked = [record for block in blocks for record in unpack(block)]
    assert sorted([*rows, *unpacked], key=lambda record: record.sequence) == given_records
    assert all(record.type in CALLS and record.subject is not None for record in unpacked)
    assert not any(record.type in CALLS and record.subject is not None for record in rows)
    for block in blocks:
        assert window(block.first) == window(block.last) < block.first <= block.last
        assert block.last - block.first < SPAN
        assert block.last == unpack(block)[-1].sequence


@given(
    kinds,
    st.sets(st.integers(1, 400), max_size=5),
    st.integers(-5, 410),
    st.integers(0, 410),
    st.integers(1, 500),
    st.none() | st.sets(st.sampled_from(["a", "b", "c", "none"])),
    st.none() | st.sets(st.sampled_from([STARTED, FINISHED, "plugin.log", "plugin.progress"])),
)
@settings(deadline=None, max_examples=200)
def test_a_read_gives_what_a_list_of_all_would_give(
    drawn: list[tuple[str, str | None]],
    edges: set[int],
    after: int,
    until: int,
    limit: int,
    subjects: set[str] | None,
    types: set[str] | None,
) -> None:
    given_records = records(drawn)
    with (
        tempfile.TemporaryDirectory(dir=MEMORY if MEMORY.is_dir() else None) as folder,
        opened(Path(folder) / "events.db") as store,
    ):
        for batch in cut(given_records, edges):
            store.append(batch)
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
    drawn: list[tuple[str, str | None]], edges: set[int], until: int
) -> None:
    given_records = records(drawn)
    with tempfile.TemporaryDirectory(dir=MEMORY if MEMORY.is_dir() else None) as folder:
        path = Path(folder) / "events.db"
        with opened(path) as store:
            for batch in cut(given_records, edges):
                store.append(batch)
            let_go = pack(given_records[:until])[0]
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
        store.append(records([(STARTED, f"plugin{number}") for number in range(1000)]))
        for count in (0, 1, 99, 100, 101, 600):
            chosen = [f"plugin{number}" for number in range(count)]
            found = store.read(0, 1000, 1000, chosen, [STARTED])
            assert [record.subject for record in found] == chosen


@pytest.mark.parametrize(
    "damage",
    [
        "UPDATE calls SET lines = x'7b7d'",
        "UPDATE calls SET marks = x''",
        "UPDATE calls SET marks = x'FFFFFFFFFF'",
    ],
    ids=["a line is missing", "no marks", "no such type"],
)
def test_a_damaged_block_is_named(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "events.db"
    with opened(path) as store:
        store.append(records([(STARTED, "a")] * 5))
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as raw:
        raw.execute(damage)
    with pytest.raises(CorruptLog, match=r"the calls from 1 on are damaged|numbers are missing"):
        EventLog.open(path, source="test").close()


def test_a_block_cannot_hold_what_is_not_there() -> None:
    with pytest.raises(ValueError, match="the calls from 7 on are damaged"):
        unpack(Block(7, "a", b"\x00", b"{}\n{}"))
