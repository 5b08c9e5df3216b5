"""The event log: durable, replayable, in trouble, and killed."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

import events.readers
import events.store
import events.writer
from events.backlog import Backlog, weight
from events.blocks import Packed, pack, unpack
from events.bus import EventBus
from events.cursor import Filter
from events.envelope import (
    CallFinished,
    CallProgress,
    CallStarted,
    Event,
    Gap,
    PluginLog,
    Restarted,
    decode,
    encode,
)
from events.log import CorruptLog, Cursor, EventLog, LogClosed, LogUnavailable, Record
from events.projections import HealthProjection, fold_all
from events.store import Store

ROOT = Path(__file__).parents[1]
LONG_S = 20.0  # more than anything here should take


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "data" / "events.db"


def open_log(path: Path, *, backlog: int = 100_000, ring: int = 8192) -> EventLog:
    return EventLog.open(path, source="test", backlog=backlog, ring=ring)


def bus_of(log: EventLog) -> EventBus:
    bus = EventBus(HealthProjection(log.load()[0]), last=log.last)
    bus.subscribe(log)
    return bus


def publish(bus: EventBus, count: int, plugin: str = "ocr") -> list[Event]:
    return [bus.publish(CallStarted("read", f"r{number}"), plugin) for number in range(count)]


def filled(path: Path, count: int) -> list[Event]:
    """A log with `count` events, closed cleanly."""
    with open_log(path) as log:
        return publish_at_once(log, bus_of(log), count)


def publish_at_once(log: EventLog, bus: EventBus, count: int) -> list[Event]:
    """As one batch: the blocks of calls are as large as they can be."""
    with log._changed:
        return publish(bus, count)


def let_go(path: Path, until: int) -> None:
    """As retention did before it kept anything below its horizon."""
    store = Store(path)
    with store.transaction() as writer:
        store.delete_calls(writer, until)
        store.put_meta("kept_from", until + 1)
    store.close(clean=True)


def of_version_1(path: Path, index: str) -> list[Event]:
    """A log as version 1 left it: a row for each event."""
    path.parent.mkdir()
    kept = [Event(number, number * 1000, "ocr", CallStarted("read", f"r{number}")) for number in range(1, 201)]
    kept[99] = Event(100, 100_000, "ocr", Restarted(2))
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as raw:
        raw.execute("PRAGMA auto_vacuum = INCREMENTAL")
        raw.execute("PRAGMA journal_mode = WAL")
        raw.execute(
            "CREATE TABLE events"
            "(sequence INTEGER PRIMARY KEY, type TEXT NOT NULL, subject TEXT, json BLOB NOT NULL)"
        )
        raw.execute("CREATE INDEX events_by_subject ON events(subject)")
        raw.execute(index)
        raw.execute("CREATE TABLE meta(key TEXT PRIMARY KEY, value) WITHOUT ROWID")
        meta = {"format": "holdfast-events", "version": "1", "clean": "1", "kept_from": 1}
        raw.executemany("INSERT INTO meta VALUES (?, ?)", meta.items())
        raw.executemany(
            "INSERT INTO events VALUES (?, ?, ?, ?)",
            [(event.sequence, event.type, event.subject, encode(event, "test")) for event in kept],
        )
    return kept


def of_version_2(path: Path) -> list[Event]:
    """A log as version 2 left it: whole lines in the blocks of calls."""
    published = filled(path, 200)
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as raw:
        raw.execute("ALTER TABLE calls RENAME COLUMN json TO lines")
        raw.execute("UPDATE meta SET value = '2' WHERE key = 'version'")
        for block in pack(published, "test").calls:
            lines = b"\n".join([record.json for record in unpack(block)])
            raw.execute("UPDATE calls SET lines = ? WHERE first = ?", (lines, block.first))
    return published


def numbers(records: Sequence[Event | Record]) -> list[int]:
    return [record.sequence for record in records]


def wait_until(log: EventLog, condition: Callable[[], bool]) -> None:
    """Wait for the log to change until the condition holds."""
    with log._changed:
        assert log._changed.wait_for(condition, LONG_S), log.state


def writer_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "holdfast-log"]


def write_connection(log: EventLog) -> sqlite3.Connection:
    assert log._store._writer is not None
    return log._store._writer


# What is kept


def test_a_reopened_log_holds_every_event_and_goes_on_with_the_next_number(path: Path) -> None:
    with open_log(path) as log:
        first = publish(bus_of(log), 10)
    with open_log(path) as log:
        assert log.last == 10
        second = publish(bus_of(log), 5)
        assert log.flush(LONG_S)
        assert [event.sequence for event in second] == [11, 12, 13, 14, 15]
        assert list(log.replay()) == [*first, *second]


def test_a_record_is_the_event_in_its_cloudevents_form(path: Path) -> None:
    with open_log(path) as log:
        [event] = publish(bus_of(log), 1)
        assert log.flush(LONG_S)
        assert log.page(0, 10) == [Record(1, "plugin.call.started", "ocr", encode(event, "test"))]


def test_the_loaded_views_are_the_live_projection_of_the_last_run(path: Path) -> None:
    with open_log(path) as log:
        bus = bus_of(log)
        publish(bus, 100)
        bus.publish(CallFinished("read", "r", True, 2.5), "yolo")
    with open_log(path) as log:
        assert log.load() == (bus.projection.snapshot(), 101)
        assert fold_all(log.replay()) == bus.projection.snapshot()


def test_a_start_replays_only_what_came_after_the_snapshot(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(events.writer, "SNAPSHOT_EVERY", 50)
    with open_log(path) as log:
        bus = bus_of(log)
        publish_at_once(log, bus, 60)
        assert log.flush(LONG_S)
        publish(bus, 3)
        assert log.flush(LONG_S)  # the writer saves a snapshot before it takes what came later
        kept = log._store.meta("snapshot")
        assert isinstance(kept, bytes)
        covered = msgspec.msgpack.decode(kept)["sequence"]
        assert covered == 60
        live = bus.projection.snapshot()
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as raw:
        raw.execute("UPDATE meta SET value = ? WHERE key = 'snapshot'", (kept,))
        raw.execute("UPDATE calls SET json = x'' WHERE first = 1")
    with open_log(path) as log:
        assert log.faults == {}
        assert log.load() == (live, 63)


@pytest.mark.parametrize(
    "snapshot", [b"", b"\xc1garbage", msgspec.msgpack.encode({"sequence": 99, "views": {}}), 7]
)
def test_a_snapshot_that_cannot_be_used_is_counted_and_everything_replayed(path: Path, snapshot: object) -> None:
    published = filled(path, 10)
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as raw:
        raw.execute("UPDATE meta SET value = ? WHERE key = 'snapshot'", (snapshot,))
    with open_log(path) as log:
        assert log.faults["snapshot"].count == 1
        assert log.load() == (fold_all(published), 10)


@pytest.mark.parametrize(
    "data",
    [
        Event(2, 0, "ocr", CallProgress("t", "r", float("nan"), 1.0)),
        Event(2, 0, "ocr", CallProgress("t", "r", 1.0, float("nan"))),
        Event(2, 0, "ocr", CallFinished("t", "r", True, float("inf"))),
        Event(2, 0, "ocr\udc80", CallStarted("t", "r")),
        Event(2, 0, "ocr\udc80", PluginLog("log", "info", "line")),
        Event(2, -(10**21), "ocr", CallStarted("t", "r")),
        Event(2, 10**21, "ocr", CallStarted("t", "r")),
        Event(2, 10**21, "ocr", Restarted(2)),
    ],
    ids=["nan", "nan in all", "infinity", "subject", "subject of a line", "before 1", "after 9999", "its own row"],
)
def test_an_event_without_a_json_form_leaves_a_gap_in_its_place(path: Path, data: Event) -> None:
    heard: list[Event] = []
    with open_log(path) as log:
        log.add_listener("test", heard.extend)
        with log._changed:  # in one batch
            log.offer(Event(1, 0, "ocr", CallStarted("t", "r")))
            log.offer(data)
            log.offer(Event(3, 0, "ocr", CallStarted("t", "r")))
        assert log.flush(LONG_S)
        replayed = list(log.replay())
        assert [event.sequence for event in replayed] == [1, 2, 3]
        assert [type(event.data) for event in replayed] == [CallStarted, Gap, CallStarted]
        assert isinstance(replayed[1].data, Gap)
        assert "has no JSON form" in replayed[1].data.why
        assert replayed[1].subject is None
        assert [decode(record.json) for record in log.page(0, 9)] == replayed == heard
        assert log.state.dropped == 1
        assert log.faults["encode"].count == 1
        assert log.load()[0] == {}
    with open_log(path) as log:
        assert log.load()[0] == fold_all(replayed)


def test_an_event_that_cannot_be_read_back_is_replayed_as_a_gap_and_counted(path: Path) -> None:
    filled(path, 3)
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as raw:
        [(json,)] = raw.execute("SELECT json FROM calls")
        content = msgspec.json.decode(json)
        content["data"][1] = {}
        raw.execute("UPDATE calls SET json = ?", (msgspec.json.encode(content),))
    with open_log(path) as log:
        assert [type(event.data) for event in log.replay()] == [CallStarted, Gap, CallStarted]
        assert log.faults["decode"].count == 1


# Offering and closing


def test_an_event_out_of_order_is_refused_so_that_no_hole_is_ever_written(path: Path) -> None:
    with open_log(path) as log:
        with pytest.raises(ValueError, match="event 5 does not follow 0"):
            log.offer(Event(5, 0, None, CallStarted("t", "r")))
        publish(bus_of(log), 1)
        assert log.flush(LONG_S)
        assert log.state.ok


def test_closing_writes_the_backlog_and_leaves_no_thread(path: Path) -> None:
    log = open_log(path)
    bus = bus_of(log)
    publish(bus, 20_000)
    state = log.close()
    assert (state.ok, state.durable, state.backlog) == (True, 20_000, 0)
    assert writer_threads() == []
    assert not Path(f"{path}-wal").exists()
    bus.publish(CallStarted("t", "r"), "ocr")
    assert "came after the log was closed" in bus.faults["log"].last
    with pytest.raises(LogClosed):
        log._reading.read_stored(0, 10, Filter())
    assert log.close() == state


def test_flush_says_no_when_the_disk_does_not_take_it_in_time(path: Path) -> None:
    with open_log(path) as log, locked(path):
        publish(bus_of(log), 1)
        assert not log.flush(0.01)


def test_closing_on_a_dead_disk_takes_no_longer_than_asked_and_says_what_is_left(path: Path) -> None:
    log = open_log(path)
    bus = bus_of(log)
    publish(bus, 3)
    assert log.flush(LONG_S)
    path.parent.rename(path.parent.with_name("gone"))
    publish(bus, 4)
    began = time.monotonic()
    state = log.close(timeout_s=0.3)
    assert time.monotonic() - began < 5
    assert (state.ok, state.durable, state.backlog) == (False, 3, 4)
    assert writer_threads() == []


# Listeners


def test_listeners_get_every_batch_once_it_is_durable(path: Path) -> None:
    seen: list[Sequence[Event]] = []
    stored_then: list[int] = []

    def listen(batch: Sequence[Event]) -> None:
        seen.append(batch)
        with contextlib.closing(sqlite3.connect(path)) as raw:
            stored_then.append(raw.execute("SELECT max(first + length(marks) - 1) FROM calls").fetchone()[0])

    with open_log(path) as log:
        log.add_listener("test", listen)
        published = publish(bus_of(log), 9000)
        assert log.flush(LONG_S)
        assert [event for batch in seen for event in batch] == published
        assert stored_then == [batch[-1].sequence for batch in seen]


def test_a_listener_that_raises_is_counted_and_named_and_disturbs_nobody(path: Path) -> None:
    seen: list[int] = []

    def broken(batch: Sequence[Event]) -> None:
        raise RuntimeError("no")

    with open_log(path) as log:
        log.add_listener("broken", broken)
        log.add_listener("sound", lambda batch: seen.extend(event.sequence for event in batch))
        bus = bus_of(log)
        for _ in range(2):
            publish(bus, 1)
            assert log.flush(LONG_S)
        assert seen == [1, 2]
        assert log.faults["broken"].count == 2
        assert log.state.ok


# Reading


@pytest.mark.parametrize("ring", [10_000, 4], ids=["from the ring", "from the database"])
def test_pages_are_in_order_bounded_and_filtered(path: Path, ring: int) -> None:
    with open_log(path, ring=ring) as log:
        bus = bus_of(log)
        for number in range(30):
            bus.publish(CallStarted("t", "r"), f"p{number % 3}")
            if number % 10 == 9:
                bus.publish(CallFinished("t", "r", True, 1.0), "p0")
        assert log.flush(LONG_S)
        assert numbers(log.page(0, 5)) == [1, 2, 3, 4, 5]
        assert numbers(log.page(31, 5)) == [32, 33]
        assert numbers(log.page(33, 5)) == []
        assert numbers(log.page(0, 4, subject="p1")) == [2, 5, 8, 12]
        assert numbers(log.page(0, 9, type="plugin.call.finished")) == [11, 22, 33]
        assert numbers(log.page(11, 9, type="holdfast.plugin.call.finished", subject="p0")) == [22, 33]
        assert log.page(0, 9, subject="nobody") == []


def watched(monkeypatch: pytest.MonkeyPatch) -> list[None]:
    """One for each ten steps that SQLite's machine takes from now on to read."""
    looks: list[None] = []

    def connect(*args: Any, **options: Any) -> sqlite3.Connection:
        connection: sqlite3.Connection = sqlite3.connect(*args, **options)
        connection.set_progress_handler(lambda: looks.append(None), 10)
        return connection

    monkeypatch.setattr(events.readers, "sqlite3", SimpleNamespace(connect=connect, Connection=sqlite3.Connection))
    return looks


@pytest.mark.parametrize(
    ("chosen", "found"),
    [
        (Filter.of(None, ["plugin.restarted"]), [2, 20_003]),
        (Filter.of(None, ["plugin.log"]), [20_004]),
        (Filter.of(["new"], None), [20_005]),
        (Filter.of(["new"], ["plugin.call.started"]), [20_005]),
        (Filter.of(["ocr"], ["plugin.restarted"]), [2, 20_003]),
    ],
    ids=["a kind", "log lines", "a plugin", "its calls", "a kind of a busy plugin"],
)
def test_what_is_rare_is_found_without_a_look_at_each_of_many_calls(
    path: Path, monkeypatch: pytest.MonkeyPatch, chosen: Filter, found: list[int]
) -> None:
    with open_log(path, ring=4) as log:
        bus = bus_of(log)
        publish(bus, 1)
        bus.publish(Restarted(2), "ocr")
        publish(bus, 20_000)
        bus.publish(Restarted(3), "ocr")
        bus.publish(PluginLog("log", "info", "line"), "ocr")
        publish(bus, 1, "new")
        publish(bus, 8)
        assert log.flush(LONG_S)
        looks = watched(monkeypatch)
        assert numbers(log.read(0, 9, chosen).records) == found
        assert len(looks) < 30, "each block of those between takes several steps"
        looks.clear()
        assert len(log.read(0, 30_000, Filter.of(None, ["plugin.call.started"])).records) == 20_010
        assert len(looks) > 200, "that is how many there are to see"


@pytest.mark.parametrize(
    "index",
    [
        "CREATE INDEX events_by_type ON events(type)",
        "CREATE INDEX events_but_calls_by_type ON events(type) WHERE type NOT LIKE '%call%'",
    ],
    ids=["first", "last"],
)
def test_a_log_of_version_1_is_read_and_goes_on(path: Path, index: str) -> None:
    kept = of_version_1(path, index)
    for count in (200, 300):
        with open_log(path, ring=4) as log:
            assert log.last == count
            assert list(log.replay()) == kept
            kept += publish_at_once(log, bus_of(log), 100)
            assert log.flush(LONG_S)
            assert list(log.replay()) == kept
            assert numbers(log.page(90, 20)) == list(range(91, 111))
            assert numbers(log.page(190, 20, subject="ocr")) == list(range(191, 211))
            assert numbers(log.page(95, 9, type="plugin.call.started")) == [96, 97, 98, 99, *range(101, 106)]
            assert numbers(log.page(0, 9, subject="ocr", type="plugin.restarted")) == [100]
    with contextlib.closing(sqlite3.connect(path)) as raw:
        indexes = {name for (name,) in raw.execute("SELECT name FROM sqlite_master WHERE type = 'index'")}
    assert indexes == {"events_by_subject", "events_by_type", "events_by_subject_and_type", "calls_by_subject"}


def test_a_log_of_version_2_is_read_and_goes_on(path: Path) -> None:
    kept = of_version_2(path)
    for count in (200, 300):
        with open_log(path, ring=4) as log:
            assert log.last == count
            kept += publish_at_once(log, bus_of(log), 100)
            assert log.flush(LONG_S)
            assert list(log.replay()) == kept
            assert [record.json for record in log.page(100, 150)] == [
                encode(event, "test") for event in kept[100:250]
            ]
    let_go(path, 100)
    with open_log(path, ring=4) as log:
        assert numbers(log.page(100, 150)) == list(range(101, 251))


@pytest.mark.parametrize("version", ["1", "2"])
def test_an_upgrade_that_is_interrupted_is_made_at_the_next_start(
    path: Path, monkeypatch: pytest.MonkeyPatch, version: str
) -> None:
    kept = (
        of_version_1(path, "CREATE INDEX events_by_type ON events(type)") if version == "1" else of_version_2(path)
    )
    with monkeypatch.context() as broken:
        statements = (*events.store._UPGRADES[version], "CREATE TABLE meta(key)")
        broken.setitem(events.store._UPGRADES, version, statements)
        with pytest.raises(LogUnavailable):
            open_log(path)
    with open_log(path) as log:
        assert list(log.replay()) == kept


@pytest.mark.parametrize(
    ("kinds", "found"),
    [
        (["plugin.call.started"], [1, 5, 9]),
        (["plugin.call.started", "plugin.call.finished"], [1, 4, 5]),
        (["plugin.restarted"], [20_001]),
        (["plugin.restarted", "worker.exited", "gap"], [20_001]),
        (["worker.exited"], []),
    ],
)
def test_what_a_plugin_writes_between_its_calls_is_not_looked_at(
    path: Path, monkeypatch: pytest.MonkeyPatch, kinds: list[str], found: list[int]
) -> None:
    with open_log(path, ring=4) as log:
        bus = bus_of(log)
        line = PluginLog("log", "info", "line")
        for number in range(5000):
            for data in CallStarted("t", f"r{number}"), line, line, CallFinished("t", f"r{number}", True, 1.0):
                bus.publish(data, "ocr")
        bus.publish(Restarted(2), "ocr")
        publish(bus, 10, "yolo")
        assert log.flush(LONG_S)
        looks = watched(monkeypatch)
        assert numbers(log.read(0, 3, Filter.of(["ocr"], kinds)).records) == found
        assert len(looks) < 30
        assert len(log.read(0, 30_000, Filter.of(["ocr"], ["plugin.log"])).records) == 10_000
        assert len(looks) > 1000, "that is how many there are to see"


def test_events_gather_no_longer_than_there_is_room_for_them() -> None:
    backlog = Backlog(100, 0)

    def offer() -> None:
        for number in range(1, 51):
            backlog.offer(Event(number, 0, "ocr", CallStarted("t", "r")))

    offering = threading.Thread(target=offer)
    began_s = time.monotonic()
    offering.start()
    backlog.gather(4096, LONG_S)  # returns as soon as half of what may wait is there
    assert time.monotonic() - began_s < LONG_S
    assert len(backlog) == 50
    offering.join()
    backlog.close()
    backlog.gather(4096, LONG_S)
    assert time.monotonic() - began_s < LONG_S


def test_a_log_opens_and_is_read_though_its_index_cannot_be_made(
    path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    kept = filled(path, 5)
    changed("DROP INDEX events_by_type")(path)
    monkeypatch.setattr(events.store, "_INDEX", ("CREATE INDEX on_nothing ON nothing(at_all)",))
    with open_log(path) as log:
        assert list(log.replay()) == kept
        assert log.page(0, 9, type="plugin.restarted") == []
        assert log.state.ok
    assert "log_index_not_made" in "".join(capfd.readouterr())


def test_a_batch_of_any_size_is_written_whole_and_in_order(path: Path) -> None:
    store, last = Store(path), 0
    try:
        for count in (1, 3, 4, 15, 16, 63, 64, 255, 256, 257, 600, 1023):
            records = [Record(last + 1 + n, "plugin.log", None, b"%d" % n) for n in range(count)]
            store.append(Packed(records, []))
            assert store.read(last, last + count, count) == records
            last += count
        store.append(Packed([], []))
        assert store.last() == last
    finally:
        store.close(clean=True)


def test_pages_can_be_read_from_many_threads_while_events_are_written(path: Path) -> None:
    with open_log(path, ring=16) as log:
        bus, faults = bus_of(log), []

        def read() -> None:
            after = 0
            while after < 5000:
                page = log.page(after, 100)
                if numbers(page) != list(range(after + 1, after + 1 + len(page))):
                    faults.append((after, numbers(page)))
                after += len(page)

        threads = [threading.Thread(target=read) for _ in range(8)]
        for thread in threads:
            thread.start()
        publish(bus, 5000)
        for thread in threads:
            thread.join(LONG_S)
        assert not any(thread.is_alive() for thread in threads)
        assert faults == []


async def taken(cursor: Cursor, until: int) -> list[Record]:
    """All records up to number `until`."""
    found: list[Record] = []
    async with asyncio.timeout(LONG_S):
        async for batch in cursor:
            found += batch
            if found[-1].sequence >= until:
                break
    return found


@pytest.mark.parametrize("ring", [100_000, 2])
async def test_a_subscriber_gets_what_was_and_what_comes_without_loss_or_repeat(path: Path, ring: int) -> None:
    log = await asyncio.to_thread(open_log, path, ring=ring)
    bus = bus_of(log)
    await asyncio.to_thread(publish, bus, 3000)
    reading = asyncio.create_task(taken(log.subscribe(1000), until=9000))
    await asyncio.to_thread(publish, bus, 6000)
    assert numbers(await reading) == list(range(1001, 9001))
    await asyncio.to_thread(log.close)


async def test_a_subscriber_from_now_on_gets_only_what_comes(path: Path) -> None:
    log = await asyncio.to_thread(open_log, path)
    bus = bus_of(log)
    publish(bus, 3)
    assert await asyncio.to_thread(log.flush, LONG_S)
    cursor = log.subscribe()
    publish(bus, 2)
    assert numbers(await taken(cursor, until=5)) == [4, 5]
    await asyncio.to_thread(log.close)


@pytest.mark.parametrize("ring", [10_000, 2])
async def test_a_filtered_subscriber_gets_what_it_wants_and_never_waits_for_what_it_does_not(
    path: Path, ring: int
) -> None:
    log = await asyncio.to_thread(open_log, path, ring=ring)
    bus = bus_of(log)
    for _ in range(100):
        publish(bus, 50, "noise")
        publish(bus, 1, "ocr")
    cursor = log.subscribe(0, subjects={"ocr", "yolo"}, types={"holdfast.plugin.call.started"})
    assert numbers(await taken(cursor, until=5100)) == list(range(51, 5101, 51))
    await asyncio.to_thread(log.close)


def test_subscribers_on_several_event_loops_each_get_everything(path: Path) -> None:
    found: list[list[int]] = []
    with open_log(path, ring=64) as log:
        bus = bus_of(log)

        async def read_many() -> None:
            read = await asyncio.gather(*(taken(log.subscribe(0), until=4000) for _ in range(5)))
            found.extend(numbers(records) for records in read)

        threads = [threading.Thread(target=lambda: asyncio.run(read_many())) for _ in range(4)]
        for thread in threads:
            thread.start()
        publish(bus, 4000)
        for thread in threads:
            thread.join(LONG_S)
        assert found == [list(range(1, 4001))] * 20
        assert log._wakeups._loops == {}


async def test_a_thousand_waiting_subscribers_cost_one_wakeup_per_batch(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = await asyncio.to_thread(open_log, path)
    bus, loop = bus_of(log), asyncio.get_running_loop()
    reading = [asyncio.create_task(taken(log.subscribe(0), until=1)) for _ in range(1000)]
    await asyncio.sleep(0)  # each task runs until it waits
    assert log._wakeups._loops[loop].waiting == 1000
    calls: list[str] = []
    real = loop.call_soon_threadsafe

    def counting(callback: Callable[..., object], *args: object) -> asyncio.Handle:
        if threading.current_thread().name == "holdfast-log":
            calls.append(repr(callback))
        return real(callback, *args)

    monkeypatch.setattr(loop, "call_soon_threadsafe", counting)
    publish(bus, 1)
    assert {tuple(numbers(records)) for records in await asyncio.gather(*reading)} == {(1,)}
    assert len(calls) == 1
    await asyncio.to_thread(log.close)


async def test_cancelling_a_waiting_subscriber_loses_nothing_and_leaves_nothing(path: Path) -> None:
    log = await asyncio.to_thread(open_log, path)
    bus, cursor = bus_of(log), log.subscribe(0)
    waiting = asyncio.ensure_future(anext(cursor))
    await asyncio.sleep(0)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert log._wakeups._loops == {}
    publish(bus, 2)
    assert numbers(await taken(cursor, until=2)) == [1, 2]
    await asyncio.to_thread(log.close)


async def test_iteration_ends_after_the_last_event_when_the_log_is_closed(path: Path) -> None:
    log = await asyncio.to_thread(open_log, path)
    bus = bus_of(log)

    async def read_all() -> list[int]:
        return [record.sequence async for batch in log.subscribe(0) for record in batch]

    reading = [asyncio.create_task(read_all()) for _ in range(3)]
    await asyncio.sleep(0)
    publish(bus, 10)
    await asyncio.to_thread(log.close)
    assert await asyncio.gather(*reading) == [list(range(1, 11))] * 3
    assert [batch async for batch in log.subscribe(10)] == []


async def test_a_closed_event_loop_with_waiting_subscribers_does_not_stop_the_writer(path: Path) -> None:
    log = await asyncio.to_thread(open_log, path)

    def abandon() -> None:
        loop = asyncio.new_event_loop()
        waiting = loop.create_task(asyncio.wait_for(anext(log.subscribe(0)), None))
        loop.run_until_complete(asyncio.sleep(0))
        loop.run_until_complete(asyncio.sleep(0))
        waiting._log_destroy_pending = False  # type: ignore[attr-defined]
        abandoned.append(waiting)
        loop.close()

    abandoned: list[asyncio.Task[list[Record]]] = []
    await asyncio.to_thread(abandon)
    assert len(log._wakeups._loops) == 1
    publish(bus_of(log), 1)
    assert await asyncio.to_thread(log.flush, LONG_S)
    assert log._wakeups._loops == {}
    await asyncio.to_thread(log.close)


async def test_a_reader_of_another_log_is_told_so_and_then_goes_on_live(path: Path) -> None:
    log = await asyncio.to_thread(open_log, path)
    bus = bus_of(log)
    publish(bus, 3)
    assert await asyncio.to_thread(log.flush, LONG_S)
    cursor = log.subscribe(500)
    [told] = await anext(cursor)
    assert (told.sequence, told.type) == (3, "gap")
    gap = decode(told.json).data
    assert gap == Gap(4, 500, "this log ends at 3; you have read a different one")
    publish(bus, 1)
    assert numbers(await anext(cursor)) == [4]
    assert [record.type for record in log.page(500, 10)] == ["gap"]
    assert len(await asyncio.to_thread(lambda: list(log.replay()))) == 4
    await asyncio.to_thread(log.close)


async def test_a_number_that_is_published_but_not_yet_durable_is_waited_for(path: Path) -> None:
    log = await asyncio.to_thread(open_log, path)
    bus = bus_of(log)
    with locked(path):
        publish(bus, 3)
        cursor = log.subscribe(3)
        reading = asyncio.ensure_future(anext(cursor))
        publish(bus, 1)
    assert numbers(await reading) == [4]
    await asyncio.to_thread(log.close)


async def test_a_reader_from_before_what_is_kept_is_told_so(path: Path) -> None:
    await asyncio.to_thread(filled, path, 10)
    await asyncio.to_thread(let_go, path, 5)
    log = await asyncio.to_thread(open_log, path)
    cursor = log.subscribe(2)
    [told] = await anext(cursor)
    assert told.sequence == 5
    gap = decode(told.json).data
    assert isinstance(gap, Gap)
    assert (gap.first, gap.last) == (3, 5)
    assert numbers(await anext(cursor)) == [6, 7, 8, 9, 10]
    await asyncio.to_thread(log.close)


# Trouble with the disk


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Somebody else holds the database's write lock."""
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        yield
        other.execute("ROLLBACK")


def test_calls_go_on_while_the_disk_is_full_and_nothing_is_lost_once_it_is_not(path: Path) -> None:
    with open_log(path) as log:
        bus = bus_of(log)
        publish(bus, 10)
        assert log.flush(LONG_S)
        write_connection(log).execute("PRAGMA max_page_count = 1")
        publish(bus, 2000)
        wait_until(log, lambda: not log.state.ok)
        assert log.state.error is not None
        assert "full; free space on that disk" in log.state.error
        assert log.state.durable < 2010
        publish(bus, 2000)
        write_connection(log).execute("PRAGMA max_page_count = 1000000")
        assert log.flush(LONG_S)
        assert log.state.ok
        assert log.state.dropped == 0
        assert [event.sequence for event in log.replay()] == list(range(1, 4011))


def test_what_does_not_fit_the_backlog_becomes_one_counted_gap_in_its_place(path: Path) -> None:
    with open_log(path, backlog=100) as log:
        bus = bus_of(log)
        publish(bus, 10)
        assert log.flush(LONG_S)
        with locked(path):
            publish(bus, 5)
            wait_until(log, lambda: not log.state.ok)
            held = len(log._backlog)  # what the writer took before the trouble stays
            publish(bus, 500)
            assert log.state.backlog == 100
        assert log.flush(LONG_S)
        assert log.state.dropped == held + 500 - 100
        replayed = list(log.replay())
        [gap] = [event for event in replayed if isinstance(event.data, Gap)]
        assert isinstance(gap.data, Gap)
        assert gap.sequence == gap.data.first
        assert gap.data.last - gap.data.first + 1 == log.state.dropped
        assert "locked" in gap.data.why
        after_gap = [event.sequence for event in replayed if event.sequence > gap.sequence]
        assert after_gap == list(range(gap.data.last + 1, 516))
        assert [event.sequence for event in replayed if event.sequence < gap.sequence] == list(
            range(1, gap.sequence)
        )
    with open_log(path) as log:
        assert log.last == 515
        assert list(log.replay()) == replayed


@pytest.mark.parametrize("ring", [10_000, 2])
async def test_a_gap_passes_every_filter_and_reaches_a_reader_whose_number_it_covers(
    path: Path, ring: int
) -> None:
    log = await asyncio.to_thread(open_log, path, backlog=10, ring=ring)
    bus = bus_of(log)
    with locked(path):
        publish(bus, 1)
        await asyncio.to_thread(wait_until, log, lambda: not log.state.ok)
        publish(bus, 50)
    assert await asyncio.to_thread(log.flush, LONG_S)
    publish(bus, 8)
    assert await asyncio.to_thread(log.flush, LONG_S)
    [gap] = await asyncio.to_thread(log.page, 0, 9, subject="nobody", type="plugin.log")
    assert gap.type == "gap"
    inside = gap.sequence + 3
    assert (await anext(log.subscribe(inside, subjects={"nobody"}))) == [gap]
    assert numbers(await asyncio.to_thread(log.page, inside, 2)) == [gap.sequence, gap.end + 1]
    assert await asyncio.to_thread(log.page, inside, 1) == [gap]
    cursor = log.subscribe(inside)
    assert numbers(await taken(cursor, until=59)) == [gap.sequence, *range(gap.end + 1, 60)]
    await asyncio.to_thread(log.close)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of one MiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)],
        capture_output=True,
        text=True,
        check=False,
    )
    if mounted.returncode:
        pytest.skip(f"no tmpfs can be mounted here: {mounted.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_a_real_full_disk_degrades_the_log_and_space_heals_it(small_disk: Path) -> None:
    filler = small_disk / "filler"
    log = open_log(small_disk / "events.db", backlog=20_000)
    bus = bus_of(log)
    publish(bus, 10)
    assert log.flush(LONG_S)
    with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
        while True:
            file.write(b"x" * 4096)
    publish(bus, 100)
    wait_until(log, lambda: not log.state.ok)
    assert len(log.page(0, 1000)) == log.state.durable  # reading goes on
    filler.unlink()
    assert log.flush(LONG_S)
    assert [event.sequence for event in log.replay()] == list(range(1, 111))
    assert log.close().ok


def test_a_full_disk_at_close_loses_only_what_nobody_has_seen(small_disk: Path) -> None:
    log = open_log(small_disk / "events.db")
    bus = bus_of(log)
    publish(bus, 20_000)
    wait_until(log, lambda: not log.state.ok)
    state = log.close(timeout_s=0.2)
    assert state.durable + state.backlog == 20_000
    assert state.backlog > 0
    subprocess.run(["mount", "-o", "remount,size=64m", str(small_disk)], check=True)
    with open_log(small_disk / "events.db") as log:
        assert log.last == state.durable
        assert [event.sequence for event in log.replay()] == list(range(1, state.durable + 1))


@pytest.mark.parametrize("what", ["database", "database and -wal", "replaced by another file"])
def test_a_database_removed_while_it_is_open_is_written_anew_with_all_that_was_seen(path: Path, what: str) -> None:
    with open_log(path, ring=2) as log:
        bus = bus_of(log)
        publish(bus, 100)
        assert log.flush(LONG_S)
        path.unlink()
        if what == "database and -wal":
            Path(f"{path}-wal").unlink()
        elif what == "replaced by another file":
            path.write_bytes(b"something else")
        publish(bus, 100)
        assert log.flush(LONG_S)
        assert numbers(log.page(0, 1000)) == list(range(1, 201))
        assert log.state.dropped == 0
    with open_log(path) as log:
        assert [event.sequence for event in log.replay()] == list(range(1, 201))
    asides = [found.read_bytes() for found in path.parent.glob("events.db.replaced-*Z")]
    assert asides == ([b"something else"] if what == "replaced by another file" else [])


def test_a_folder_that_goes_away_degrades_the_log_until_it_is_back(path: Path) -> None:
    with open_log(path) as log:
        bus = bus_of(log)
        publish(bus, 10)
        assert log.flush(LONG_S)
        path.parent.rename(path.parent.with_name("elsewhere"))
        publish(bus, 10)
        wait_until(log, lambda: "its folder is gone" in (log.state.error or ""))
        assert log.state.backlog == 10
        path.parent.mkdir()
        assert log.flush(LONG_S)
        assert [event.sequence for event in log.replay()] == list(range(1, 21))


def test_a_file_lost_with_its_connection_leaves_a_gap_where_its_events_were(path: Path) -> None:
    with open_log(path) as log:
        bus = bus_of(log)
        publish(bus, 10)
        assert log.flush(LONG_S)
        log._store._close_writer()
        path.unlink()
        for side in ("-wal", "-shm"):
            Path(f"{path}{side}").unlink(missing_ok=True)
        publish(bus, 5)
        assert log.flush(LONG_S)
        replayed = list(log.replay())
        assert replayed[0].data == Gap(1, 10, "the log's file was lost while it was open")
        assert [event.sequence for event in replayed] == [1, *range(11, 16)]


def test_a_commit_that_came_through_though_it_said_no_is_not_made_again(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_log(path) as log:
        real, failures = log._store.append, iter([sqlite3.OperationalError("disk I/O error")])

        def append(packed: Packed) -> None:
            real(packed)
            if (failure := next(failures, None)) is not None:
                raise failure

        monkeypatch.setattr(log._store, "append", append)
        published = publish_at_once(log, bus_of(log), 3)
        assert log.flush(LONG_S)
        assert next(failures, None) is None
        assert log.state.ok
        assert list(log.replay()) == published


def test_a_lost_file_leaves_one_gap_however_often_the_next_write_fails(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_log(path) as log:
        bus = bus_of(log)
        publish(bus, 10)
        assert log.flush(LONG_S)
        real, failures = log._store.append, iter([sqlite3.OperationalError("no"), sqlite3.OperationalError("no")])

        def append(packed: Packed) -> None:
            if log._store.last() == 0 and (failure := next(failures, None)) is not None:
                raise failure
            real(packed)

        monkeypatch.setattr(log._store, "append", append)
        log._store._close_writer()
        for end in ("", "-wal", "-shm"):
            Path(f"{path}{end}").unlink(missing_ok=True)
        publish(bus, 5)
        assert log.flush(LONG_S)
        assert next(failures, None) is None
        assert [event.sequence for event in log.replay()] == [1, *range(11, 16)]
        publish(bus, 1)
        assert log.flush(LONG_S)  # the writer saves a snapshot before it takes what came later
        assert log._store.meta("snapshot") is not None, "it was in the file"


@contextlib.contextmanager
def stuck(log: EventLog, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The writer's thread stands still inside a write, as on a dead disk or under SIGSTOP."""
    writing, go_on = threading.Event(), threading.Event()
    real = log._store.append

    def append(packed: Packed) -> None:
        writing.set()
        assert go_on.wait(LONG_S)
        real(packed)

    monkeypatch.setattr(log._store, "append", append)
    publish(bus_at(log), 1)
    assert writing.wait(LONG_S)
    try:
        yield
    finally:
        monkeypatch.setattr(log._store, "append", real)
        go_on.set()


def bus_at(log: EventLog) -> EventBus:
    """A bus that goes on after what the log was offered last."""
    bus = EventBus(HealthProjection(), last=log._backlog.offered)
    bus.subscribe(log)
    return bus


@pytest.mark.contract(9)
def test_a_writer_that_stands_still_stops_nobody_and_the_state_says_so(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_log(path) as log:
        with stuck(log, monkeypatch):
            publish(bus_at(log), 2000)
            assert (log.state.ok, log.state.backlog) == (True, 2001)
            monkeypatch.setattr("events.log.STALLED_S", 0.0)
            assert not log.state.ok
            assert "a write has not come back for 0 s; check the disk" in (log.state.error or "")
            assert log.page(0, 10) == []
        assert log.flush(LONG_S)
        assert log.state.error is None
        assert [event.sequence for event in log.replay()] == list(range(1, 2002))


def test_what_is_too_much_for_a_writer_that_stands_still_is_one_gap(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_log(path, backlog=100) as log:
        with stuck(log, monkeypatch):
            publish(bus_at(log), 1000)
            assert (log.state.backlog, log.state.dropped) == (100, 901)
        assert log.flush(LONG_S)
        first, gap, *rest = log.replay()
        assert first.sequence == 1
        assert gap.data == Gap(2, 902, "could not be written: the disk is too slow")
        assert [event.sequence for event in rest] == list(range(903, 1002))


def test_closing_while_a_write_stands_still_takes_no_longer_than_asked(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = open_log(path)
    with stuck(log, monkeypatch):
        began = time.monotonic()
        state = log.close(timeout_s=0.05)
        assert time.monotonic() - began < 5
        assert (state.durable, state.backlog) == (0, 1)
    log._writer._thread.join(LONG_S)
    with open_log(path) as log:
        assert log.last == 1


def test_a_few_huge_events_fill_the_backlog_as_many_small_ones_do(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_log(path, backlog=100) as log:
        with stuck(log, monkeypatch):
            bus = bus_at(log)
            for _ in range(100):
                bus.publish(PluginLog("output", "info", "x" * 8000), "ocr")
            assert log.state.backlog < 20
            assert log._backlog._waiting_bytes < 100 * 1024
            publish(bus, 100)
        assert log.flush(LONG_S)
        replayed = list(log.replay())
        assert [type(event.data) for event in replayed[:2]] == [CallStarted, Gap]
        assert replayed[-1].sequence == 201
        assert log._backlog._waiting_bytes == log._backlog._taken_bytes == 0


@pytest.mark.parametrize("long", ["x" * 8000, "\x01" * 8000], ids=["plain", "escaped"])
def test_the_ring_is_bounded_in_bytes_and_never_has_a_hole(path: Path, long: str) -> None:
    with open_log(path, ring=64) as log:
        bus = bus_of(log)
        for number in range(300):
            bus.publish(PluginLog("output", "info", long if number % 7 else "x"), "ocr")
            bus.publish(CallFinished("\x01" * 256, "\x02" * 256, False, 1.0, "\x03" * 256), "ocr")
            if number % 10 == 0:
                assert log.flush(LONG_S)
                kept = log._ring._kept  # which a reader does not make heavier
                log._ring.read(kept.floor, log.durable, 1000, Filter())
                sizes = [len(each.json) if isinstance(each, Record) else weight(each) for each in kept.entries]
                assert sum(sizes) < 2 * 64 * 1024 + 20 * 50_000
                assert log._ring._bytes == sum(sizes)
        assert log.flush(LONG_S)
        kept = log._ring._kept
        assert numbers(kept.entries) == list(range(kept.floor + 1, 601))
        assert numbers(log.page(0, 1000)) == list(range(1, 601))


def test_a_line_is_made_once_for_all_its_readers(path: Path) -> None:
    with open_log(path) as log:
        publish(bus_of(log), 3)
        assert log.flush(LONG_S)
        assert [type(entry) for entry in log._ring._kept.entries] == [Event] * 3
        first, again = log.page(0, 9), log.page(0, 9)
        assert [one is other for one, other in zip(first, again, strict=True)] == [True] * 3


def test_a_data_folder_that_becomes_read_only_degrades_the_log_until_it_is_writable(small_disk: Path) -> None:
    def remount(how: str) -> None:
        subprocess.run(["mount", "-o", f"remount,{how}", str(small_disk)], check=True)

    path = small_disk / "events.db"
    bind = ["mount", "--bind", str(small_disk), str(small_disk)]
    with open_log(path) as log:
        bus = bus_of(log)
        publish(bus, 10)
        assert log.flush(LONG_S)
        # A file system with a file open for writing cannot be made read-only; a bind mount of it can.
        subprocess.run(bind, check=True)
        remount("bind,ro")
        try:
            log._store.drop_connection()  # as after an I/O error: the file has to be opened again
            publish(bus, 10)
            wait_until(log, lambda: not log.state.ok)
            assert (log.state.durable, log.state.backlog) == (10, 10)
        finally:
            subprocess.run(["umount", "--lazy", str(small_disk)], check=True)
        assert log.flush(LONG_S)
        assert [event.sequence for event in log.replay()] == list(range(1, 21))


def test_a_read_only_data_folder_is_refused_at_the_start_with_what_to_do(small_disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(LogUnavailable, match=r"cannot be written \(Read-only file system\); choose a data folder"):
        open_log(small_disk / "events.db")


def test_a_writer_that_fails_unforeseen_says_so_and_ends(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = open_log(path)
    bus = bus_of(log)

    def broken(_event: Event) -> None:
        raise ZeroDivisionError("a fault of ours")

    monkeypatch.setattr(log._writer._projection, "apply", broken)
    publish(bus, 1)
    wait_until(log, lambda: "a fault of ours" in (log.state.error or ""))
    assert not log.close().ok
    assert not log._writer._thread.is_alive()
    assert log.faults["writer"].count == 1


# Opening


def test_a_second_engine_on_the_same_log_is_refused_with_what_to_do(path: Path) -> None:
    with open_log(path), pytest.raises(LogUnavailable, match="another engine has it open; stop it, or choose"):
        open_log(path)
    with open_log(path) as log:
        assert log.state.ok


def test_a_folder_that_cannot_be_made_is_refused_with_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(LogUnavailable, match="choose a data folder that this user can write"):
        open_log(tmp_path / "file" / "events.db")


def test_a_database_locked_by_somebody_is_refused_with_what_to_do(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    filled(path, 1)
    monkeypatch.setattr("events.store.BUSY_TIMEOUT_S", 0.01)
    with locked(path), pytest.raises(LogUnavailable, match="locked; end the other process that uses it"):
        open_log(path)
    with open_log(path) as log:
        assert log.last == 1


def not_sqlite(path: Path) -> None:
    path.write_bytes(b"hello " * 1000)


def damaged_page(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(4096 * 3)
        file.write(b"\xff" * 4096)


def truncated(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def changed(*statements: str) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as raw:
            for statement in statements:
                raw.execute(statement)

    return change


def of_something_else(path: Path) -> None:
    path.unlink()
    changed("CREATE TABLE meta(key, value)", "CREATE TABLE photos(id)")(path)


def wal_without_database(path: Path) -> None:
    path.rename(f"{path}-wal")


@pytest.mark.parametrize(
    ("damage", "why"),
    [
        (not_sqlite, "not an SQLite database"),
        (damaged_page, "damaged|malformed"),
        (truncated, "damaged|malformed"),
        (of_something_else, "a database of something else"),
        (changed("UPDATE meta SET value = '7' WHERE key = 'version'"), "schema version is 7, not 3"),
        (changed("DROP TABLE calls"), "it has no table `calls`"),
        (changed("DELETE FROM calls WHERE first = 257"), "64 numbers are missing and no gap event says why"),
        (changed("DELETE FROM calls WHERE first < 65"), "numbering begins at 65, not at 1"),
        (wal_without_database, "the database is gone but its -wal file is there"),
    ],
    ids=["not sqlite", "page", "truncated", "something else", "version", "table", "hole", "beginning", "wal only"],
)
def test_an_unsound_log_is_named_moved_aside_whole_and_replaced_by_a_new_one(
    path: Path, damage: Callable[[Path], None], why: str
) -> None:
    filled(path, 500)
    damage(path)
    before = {found.name[len(path.name) :]: found.read_bytes() for found in path.parent.glob("events.db*")}
    with pytest.raises(CorruptLog, match=why):
        open_log(path)
    aside = EventLog.repair(path)
    assert aside.name.startswith("events.db.corrupt-")
    for end, content in before.items():
        if end != ".lock":
            assert Path(f"{aside}{end}").read_bytes() == content
    with open_log(path) as log:
        assert log.last == 0


def test_repairs_never_overwrite_one_another(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path.parent.mkdir()
    asides = set()
    for content in (b"one", b"two", b"three"):
        path.write_bytes(content)
        asides.add(EventLog.repair(path))
    assert sorted(aside.read_bytes() for aside in asides) == [b"one", b"three", b"two"]


def test_a_large_log_is_checked_in_full_only_after_an_unclean_end(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    filled(path, 10)
    full_checks: list[Path] = []
    monkeypatch.setattr(Store, "_check_numbering", lambda store: full_checks.append(store.path))
    monkeypatch.setattr("events.store.QUICK_CHECK_BYTES", 0)
    with open_log(path):
        pass
    assert full_checks == []
    changed("UPDATE meta SET value = '0' WHERE key = 'clean'")(path)
    with open_log(path):
        pass
    assert full_checks == [path]


# Killed

CHILD = """
import os, sys, threading
from pathlib import Path
from events.audit import AuditLog
from events.bus import EventBus
from events.envelope import CallStarted, encode
from events.log import EventLog
from events.projections import HealthProjection

folder = Path(sys.argv[1])
log = EventLog.open(folder / "events.db", source="child")
audit = AuditLog.open(folder / "audit.jsonl")
audit.attach(log)
bus = EventBus(HealthProjection(log.load()[0]), last=log.last)
bus.subscribe(log)
def tell(batch):
    os.write(1, b"".join(encode(event, "child") + b"\\n" for event in batch))

log.add_listener("tell", tell)
paced = threading.Semaphore(2000)
log.add_listener("pace", lambda batch: paced.release(len(batch)))

def publish(name):
    number = 0
    while True:
        paced.acquire()
        bus.publish(CallStarted("read", f"{name}-{number}"), name)
        number += 1

for number in range(4):
    threading.Thread(target=publish, args=(f"plugin{number}",)).start()
"""


@pytest.mark.contract(9)
def test_after_kill_9_at_any_moment_all_that_was_seen_is_there_unchanged_and_without_holes(tmp_path: Path) -> None:
    from events.audit import AuditLog, verify

    seen: list[bytes] = []
    chance = random.Random(20260)
    for _ in range(6):
        enough = len(seen) + chance.randrange(1, 4000)
        with subprocess.Popen(
            [sys.executable, "-c", CHILD, str(tmp_path)], stdout=subprocess.PIPE, cwd=ROOT, start_new_session=True
        ) as child:
            assert child.stdout is not None
            for line in child.stdout:
                if line.endswith(b"\n"):  # the pipe's own last line may be torn
                    seen.append(line[:-1])
                if len(seen) == enough:
                    child.send_signal(signal.SIGKILL)
        with EventLog.open(tmp_path / "events.db", source="parent") as log:
            stored = [record.json for record in log._store.replay(0, log.last)]
            by_number = {decode(json).sequence: json for json in stored}
            assert list(by_number) == list(range(1, log.last + 1))
            assert all(by_number[decode(line).sequence] == line for line in seen)
            assert fold_all(log.replay()) == log.load()[0]
            audit = AuditLog.open(tmp_path / "audit.jsonl")
            audit.attach(log)
            audit.close()
            assert verify(tmp_path / "audit.jsonl", last=log.last).ok
        assert len(seen) >= enough
