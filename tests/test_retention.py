"""Retention: the log stays bounded, and neither a number, a counter nor a reader is misled by it."""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_event_log import CHILD
from test_projection import histories

import events.retention
from events.blocks import pack
from events.bus import EventBus
from events.cursor import Filter
from events.envelope import (
    EVENT_TYPES,
    CallFinished,
    CallStarted,
    Event,
    EventData,
    Gap,
    PluginLog,
    Restarted,
    Transition,
    WorkerExited,
    WorkerStarted,
    decode,
)
from events.log import CorruptLog, EventLog
from events.projections import HealthProjection, fold_all
from events.record import Record
from events.retention import DAY_NS, LET_GO, ROWS, Retention
from events.store import Store

LONG_S = 20.0
CALL = CallStarted("read", "r")
RESTART = Restarted(2)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "events.db"


def open_log(path: Path, *, ring: int = 4, events: int | None = None, days: float | None = None) -> EventLog:
    return EventLog.open(path, source="test", ring=ring, retain_events=events, retain_days=days)


def bus_of(log: EventLog, clock: Callable[[], int] = time.time_ns) -> EventBus:
    bus = EventBus(HealthProjection(log.load()[0]), last=log.last, clock=clock)
    bus.subscribe(log)
    return bus


def publish(log: EventLog, bus: EventBus, *data: EventData, plugin: str = "ocr") -> list[Event]:
    published = [bus.publish(item, plugin) for item in data]
    assert log.flush(LONG_S)
    return published


def publish_until(log: EventLog, bus: EventBus, condition: Callable[[], bool]) -> None:
    """One event after another: the turn after one is over when the next is durable."""
    for _ in range(1000):
        if condition():
            return
        publish(log, bus, RESTART)
    pytest.fail(f"{log.state}")


def numbers(records: Sequence[Record | Event]) -> list[int]:
    return [record.sequence for record in records]


@contextlib.contextmanager
def stored(path: Path, data: Sequence[EventData], times: Sequence[int] | None = None) -> Iterator[Store]:
    """A store that holds these events, numbered from 1."""
    store = Store(path)
    numbered = []
    sequence = 1
    for index, item in enumerate(data):
        event = Event(sequence, times[index] if times else time.time_ns(), "ocr", item)
        numbered.append(event)
        sequence = event.end + 1
    store.append(pack(numbered, "test"))
    yield store
    store.close(clean=False)  # the next open looks closely


class Turns:
    """Retention on a store, turn by turn; the snapshot is always up to date."""

    def __init__(self, store: Store, *, events: int | None = None, days: float | None = None) -> None:
        self.store = store
        self.faults: list[Exception] = []
        self.retention = Retention(
            store,
            events=events,
            days=days,
            save_snapshot=store.last,
            note_fault=lambda _name, exc: self.faults.append(exc),
        )

    def one(self, *, batch: int = 0) -> None:
        self.retention.turn(self.store.last(), 0, batch)

    def all(self) -> list[int]:
        """Turns until there is nothing more to do; the numbers that are left."""
        self.one()
        while self.retention.pause_s == 0.0:
            self.one()
        return self.left()

    def left(self) -> list[int]:
        return numbers(self.store.read(0, self.store.last(), 100_000))


# What goes and what stays


def test_calls_and_log_lines_go_and_what_tells_of_the_lifecycle_stays(path: Path) -> None:
    story: list[EventData] = [
        Transition(None, "LOADED", None, 1),
        WorkerStarted(7, 1),
        CALL,
        PluginLog("output", "info", "hello"),
        CallFinished("read", "r", True, 1.0),
        WorkerExited(7, 1, "worker_signal"),
        Transition("RUNNING", "FAILED", "fail", 1, "worker_signal", "why"),
        RESTART,
    ]
    with stored(path, story * 3) as store:
        assert Turns(store, events=8).all() == [1, 2, 6, 7, 8, 9, 10, 14, 15, 16, *range(17, 25)]
        assert store.numbering.complete_from == 17
    with open_log(path) as log:
        assert log.first == 17
        assert numbers(list(log.replay(6))) == [7, 8, 9, 10, 14, 15, 16, *range(17, 25)]


def test_every_type_of_event_is_either_let_go_or_lasting_and_gaps_last() -> None:
    assert sorted(LET_GO) == ["plugin.call.finished", "plugin.call.progress", "plugin.call.started", "plugin.log"]
    assert set(EVENT_TYPES) > LET_GO


def test_without_bounds_nothing_goes(path: Path) -> None:
    with stored(path, [CALL] * 50) as store:
        assert len(Turns(store).all()) == 50


def test_a_turn_takes_a_bounded_part_in_step_with_what_comes(path: Path) -> None:
    with stored(path, [CALL] * 9000) as store:
        turns = Turns(store, events=10)
        turns.one()
        assert len(turns.left()) == 9000 - ROWS
        turns.one(batch=2000)
        assert len(turns.left()) == 9000 - ROWS - 4000


def test_of_the_lifecycle_only_so_much_is_kept_below_the_horizon(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(events.retention, "LIFECYCLE_EVENTS", 5)
    with stored(path, [RESTART, CALL] * 20) as store:
        assert Turns(store, events=10).all() == [21, 23, 25, 27, 29, *range(31, 41)]
        assert store.numbering.kept_from == 20
    with open_log(path, events=1000) as log:
        first, *rest = log.page(0, 100, type="plugin.restarted")
        assert decode(first.json).data == Gap(1, 19, "events up to 19 are no longer kept")
        first, *rest = log.page(19, 100, type="plugin.restarted")
        assert numbers([first, *rest]) == list(range(21, 41, 2))


def test_a_gap_is_kept_whole_and_no_number_in_it_is_missed(path: Path) -> None:
    with stored(path, [CALL, CALL, Gap(3, 90, "disk full"), CALL, CALL]) as store:
        assert Turns(store, events=40).all() == [3, 91, 92]
        assert store.numbering.complete_from == 91
    with open_log(path) as log:
        assert numbers(list(log.replay())) == [3, 91, 92]


# Numbers


def test_numbers_go_on_though_every_event_was_let_go(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with stored(path, [CALL] * 5, [time.time_ns() - 3 * DAY_NS] * 5) as store:
        assert Turns(store, days=1).all() == []
        store.put_meta("snapshot", b"\x92\x05\x80")  # unusable, but there
    with open_log(path) as log:
        assert (log.last, log.first) == (5, 6)
        assert numbers(publish(log, bus_of(log), CALL)) == [6]
    with open_log(path) as log:
        assert log.last == 6


@pytest.mark.parametrize(
    ("damage", "why"),
    [
        ("DELETE FROM events WHERE sequence = 3", "4 events from 1 on are there below 9, not 4|3 events"),
        ("DELETE FROM calls WHERE first = 10", "1 numbers are missing and no gap event says why"),
        ("DELETE FROM events WHERE sequence = 9", "its numbering begins at 10, not at 9"),
        (
            "INSERT INTO events VALUES (2, 'plugin.restarted', NULL, x'7b7d')",
            "5 events from 1 on are there below 9",
        ),
    ],
    ids=["lifecycle event below", "hole above", "first of the complete part", "one too many"],
)
def test_the_check_for_holes_knows_the_horizon(path: Path, damage: str, why: str) -> None:
    with stored(path, [RESTART, CALL] * 6) as store:
        assert Turns(store, events=4).all() == [1, 3, 5, 7, 9, 10, 11, 12]
    Store(path).close(clean=False)
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as raw:
        raw.execute(damage)
    with pytest.raises(CorruptLog, match=why):
        open_log(path)


# Counters


@given(histories(), st.integers(1, 30), st.lists(st.integers(1, 12), min_size=1))
@settings(deadline=None, max_examples=40)
def test_the_snapshot_and_the_rest_give_the_live_views_whatever_was_let_go(
    drawn: list[Event], retain: int, steps: list[int]
) -> None:
    drawn = [event for event in drawn if not isinstance(event.data, Gap)]  # those drawn are about other numbers
    step = iter(steps * len(drawn))
    memory = Path("/dev/shm")  # each batch is synced, which a disk takes its time for
    with (
        tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as folder,
        open_log(path := Path(folder) / "events.db", events=retain) as log,
    ):
        clock = iter(drawn)
        bus = bus_of(log, lambda: next(clock).time_ns)
        waiting = 0
        for event in drawn:
            bus.publish(event.data, event.subject)
            if waiting == 0:
                assert log.flush(LONG_S)
                waiting = next(step)
            waiting -= 1
        log.close()
        with open_log(path, events=retain) as log:
            assert log.faults == {}
            assert log.load() == (bus.projection.snapshot(), len(drawn))


def test_at_no_moment_would_a_crash_lose_a_counter(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(events.retention, "ROWS", 7)
    published: list[Event] = []
    calls: list[EventData] = [CALL, CallFinished("read", "r", True, 1.0)]
    copies = 0
    with open_log(path, events=20) as log:
        bus = bus_of(log)
        for round_ in range(25):
            published += publish(log, bus, RESTART, *calls * round_)
            copy = path.with_name(f"copy{round_}.db")
            with (
                contextlib.closing(sqlite3.connect(path)) as source,
                contextlib.closing(sqlite3.connect(copy)) as target,
            ):
                source.backup(target)
            with open_log(copy) as crashed:
                assert crashed.faults == {}
                assert crashed.load() == (fold_all(published[: crashed.last]), crashed.last)
                copies += crashed.first > 1
    assert copies > 10


@pytest.mark.contract(9)
def test_after_kill_9_at_any_moment_no_counter_is_lost_and_what_is_kept_is_unchanged(tmp_path: Path) -> None:
    program = CHILD.replace('source="child"', 'source="child", retain_events=300')
    assert program != CHILD
    seen: dict[int, bytes] = {}
    for _ in range(3):
        enough = len(seen) + 3000
        with subprocess.Popen(
            [sys.executable, "-c", program, str(tmp_path)],
            stdout=subprocess.PIPE,
            cwd=Path(__file__).parents[1],
            start_new_session=True,
        ) as child:
            assert child.stdout is not None
            for line in child.stdout:
                if line.endswith(b"\n"):
                    seen[decode(line).sequence] = line[:-1]
                if len(seen) == enough:
                    child.kill()
        with open_log(tmp_path / "events.db") as log:
            views, last = log.load()
            assert log.faults == {}
            assert last >= max(seen)
            assert sum(view.in_flight for view in views.values()) == last  # the child only ever starts calls
            assert log.first > 1000
            kept = log.page(log.first - 1, 100_000)
            assert numbers(kept) == list(range(log.first, last + 1))
            assert all(seen.get(record.sequence, record.json) == record.json for record in kept)


def test_nothing_goes_while_the_snapshot_cannot_be_saved(path: Path) -> None:
    with stored(path, [CALL] * 50) as store:
        turns = Turns(store, events=10)
        turns.retention._save_snapshot = lambda: 12
        assert len(turns.all()) == 50
        turns.retention._save_snapshot = lambda: 50
        assert turns.all() == list(range(41, 51))


def test_a_snapshot_that_cannot_be_used_is_counted_and_states_are_still_right(path: Path) -> None:
    with stored(path, [Transition(None, "LOADED", None, 1), *[CALL] * 20]) as store:
        Turns(store, events=5).all()
    with open_log(path) as log:
        assert log.faults["snapshot"].count == 1
        view = log.load()[0]["ocr"]
        assert (view.state, view.as_of) == ("LOADED", 21)


# Readers


@pytest.fixture
def pruned(path: Path) -> Iterator[EventLog]:
    """20 events, all of the last 10, and of the first 10 every other."""
    with stored(path, [RESTART, CALL] * 10) as store:
        assert Turns(store, events=10).all() == [1, 3, 5, 7, 9, *range(11, 21)]
    log = open_log(path)
    yield log
    log.close()


WHY = (
    "events up to 10 are no longer kept in full: calls and log lines were let go; "
    "ask for lifecycle types to read the others"
)


@pytest.mark.contract(9)
async def test_a_resume_from_before_the_horizon_gets_one_gap_and_then_all_that_follows(pruned: EventLog) -> None:
    cursor = pruned.subscribe(4)
    [told] = await anext(cursor)
    assert decode(told.json).data == Gap(5, 10, WHY)
    assert told.sequence == 10
    assert numbers(await anext(cursor)) == list(range(11, 21))
    await asyncio.to_thread(publish, pruned, bus_of(pruned), CALL)
    assert numbers(await anext(cursor)) == [21]


def test_pages_from_before_the_horizon_begin_with_the_gap_and_go_on_after_it(pruned: EventLog) -> None:
    page = pruned.read(0, 3, Filter())
    assert [decode(record.json).data for record in page.records] == [Gap(1, 10, WHY)]
    assert numbers(pruned.page(page.position, 100)) == list(range(11, 21))
    assert numbers(pruned.page(10, 3)) == [11, 12, 13]
    assert [record.type for record in pruned.page(9, 3)] == ["gap"]


@pytest.mark.parametrize("name", ["plugin.restarted", "holdfast.plugin.restarted"])
def test_who_asks_for_lifecycle_events_only_gets_them_from_the_beginning_and_no_gap(
    pruned: EventLog, name: str
) -> None:
    assert numbers(pruned.page(0, 100, type=name)) == list(range(1, 21, 2))
    assert numbers(pruned.page(4, 2, type=name)) == [5, 7]


@pytest.mark.parametrize("chosen", [Filter.of(["ocr"], None), Filter.of(None, ["plugin.restarted", "plugin.log"])])
def test_who_asks_for_anything_that_goes_is_told(pruned: EventLog, chosen: Filter) -> None:
    assert [record.type for record in pruned.read(0, 9, chosen).records] == ["gap"]


def test_a_reader_that_the_horizon_overtakes_while_it_reads_is_told_and_not_given_half(pruned: EventLog) -> None:
    assert numbers(pruned._reading.read_stored(10, 100, Filter()).records) == list(range(11, 21))
    assert [record.type for record in pruned._reading.read_stored(9, 100, Filter()).records] == ["gap"]


def test_the_horizon_moves_before_anything_below_it_goes(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, int]] = []
    with stored(path, [CALL] * 20) as store:
        real = store.renumber

        def renumber(*args: object) -> None:
            seen.append((store.numbering.complete_from, len(store.read(0, 20, 100))))
            real(*args)  # type: ignore[arg-type]

        monkeypatch.setattr(store, "renumber", renumber)
        Turns(store, events=5).all()
    assert seen == [(16, 20)]


async def test_a_subscriber_that_keeps_up_gets_everything_however_little_is_retained(path: Path) -> None:
    log = await asyncio.to_thread(open_log, path, ring=10_000, events=1)
    cursor, bus = log.subscribe(), bus_of(log)
    await asyncio.to_thread(publish_many, log, bus, 3000)
    assert log.first > 1
    found: list[int] = []
    async with asyncio.timeout(LONG_S):
        while len(found) < 3000:
            found += numbers(await anext(cursor))
    assert found == list(range(1, 3001))
    await asyncio.to_thread(log.close)


def publish_many(log: EventLog, bus: EventBus, count: int) -> None:
    for _ in range(count // 100):
        publish(log, bus, *[CALL] * 100)


def test_readers_in_threads_see_every_number_or_a_gap_for_it_while_events_go(path: Path) -> None:
    wrong: list[str] = []
    with open_log(path, events=300) as log:
        bus = bus_of(log)

        def read() -> None:
            after = 0
            while after < 3000:
                for record in log.page(after, 50):
                    event = decode(record.json).data
                    first = event.first if isinstance(event, Gap) else record.sequence
                    if first != after + 1:
                        wrong.append(f"{first} after {after}")
                    after = record.sequence

        threads = [threading.Thread(target=read) for _ in range(2)]
        for thread in threads:
            thread.start()
        publish_many(log, bus, 3000)
        for thread in threads:
            thread.join(LONG_S)
        assert not any(thread.is_alive() for thread in threads)
        assert log.first > 2000
    assert wrong == []


# Age, and the clock


def days_ago(*days: float) -> list[int]:
    return [time.time_ns() - int(day * DAY_NS) for day in days]


def test_what_is_older_than_the_days_goes(path: Path) -> None:
    with stored(path, [CALL] * 6, days_ago(9, 8, 7.1, 6.9, 1, 0)) as store:
        assert Turns(store, days=7).all() == [4, 5, 6]


def test_both_bounds_hold_together(path: Path) -> None:
    with stored(path, [CALL] * 6, days_ago(9, 8, 7, 1, 1, 0)) as store:
        assert Turns(store, days=7.5, events=100).all() == [3, 4, 5, 6]
        assert Turns(store, days=100, events=2).all() == [5, 6]


def test_a_clock_set_back_keeps_some_events_longer_and_lets_none_go_early(path: Path) -> None:
    with stored(path, [CALL] * 5, days_ago(9, 0, 4000, 4000, 0)) as store:
        assert Turns(store, days=7).all() == [2, 3, 4, 5]


def test_a_clock_that_was_ahead_holds_events_no_longer_than_their_number_allows(path: Path) -> None:
    with stored(path, [CALL] * 5, days_ago(-4000, 9, 9, 9, 0)) as store:
        assert Turns(store, days=7).all() == [1, 2, 3, 4, 5]
        assert Turns(store, days=7, events=4).all() == [5]


def test_an_event_that_is_not_json_does_not_stop_it(path: Path) -> None:
    with stored(path, [CALL] * 3, days_ago(9, 9, 0)) as store:
        store.rows("UPDATE events SET json = x'00' WHERE sequence = 2")
        assert Turns(store, days=7).all() == [3]


def test_an_idle_log_lets_go_of_what_comes_of_age(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(events.retention, "LOOK_EVERY_S", 0.01)
    looked = threading.Event()
    with open_log(path, days=1) as log:
        real = log._writer._retention._let_go

        def let_go(*args: object) -> None:
            real(*args)  # type: ignore[arg-type]
            looked.set()

        monkeypatch.setattr(log._writer._retention, "_let_go", let_go)
        publish(log, bus_of(log, lambda: time.time_ns() - 2 * DAY_NS), *[CALL] * 5)
        assert looked.wait(LONG_S)
        assert log.first == 6


# The file


def pages(path: Path) -> int:
    """Of the database, whether they are in the file yet or still in `-wal`."""
    with contextlib.closing(sqlite3.connect(path)) as raw:
        count: int = raw.execute("PRAGMA page_count").fetchone()[0]
    return count


def test_the_file_stays_within_twice_what_it_may_hold(path: Path) -> None:
    with open_log(path, events=2000) as log:
        bus = bus_of(log)
        publish_many(log, bus, 2000)
        once = pages(path)
        for _ in range(9):
            publish_many(log, bus, 2000)
            assert pages(path) < 2 * once
        assert log.first > 17_000
        assert Path(f"{path}-wal").stat().st_size < 8_000_000  # 1000 pages, and what a batch adds
    assert path.stat().st_size < 2 * once * 4096


def test_lowering_the_bound_gives_the_disk_its_space_back(path: Path) -> None:
    with stored(path, [CALL] * 100_000) as store:
        before = store.rows("PRAGMA page_count")[0][0]
        Turns(store, events=500).all()
        assert store.rows("PRAGMA page_count")[0][0] < before / 4
    store = Store(path)
    assert len(Turns(store).left()) == 500
    store.close(clean=True)


def test_a_failing_retention_is_counted_and_the_log_goes_on(path: Path) -> None:
    with stored(path, []) as store:
        store.rows("CREATE TRIGGER no BEFORE DELETE ON calls BEGIN SELECT RAISE(ABORT, 'not today'); END")
    with open_log(path, events=10) as log:
        bus = bus_of(log)
        publish(log, bus, *[CALL] * 100)
        publish(log, bus, *[CALL] * 100)
        assert log.faults["retention"].count == 1  # it is tried again later, not with every batch
        assert "not today" in log.faults["retention"].last
        assert (log.state.ok, log.durable, log.first) == (True, 200, 1)


def test_the_horizon_is_part_of_the_logs_state(path: Path) -> None:
    with open_log(path, events=10) as log:
        bus = bus_of(log)
        publish(log, bus, *[CALL] * 50)
        publish_until(log, bus, lambda: log.state.first > 40)
        assert log.state.first == log.first
