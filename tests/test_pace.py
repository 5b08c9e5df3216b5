"""How the log's thread shares the interpreter with the event loop."""

from __future__ import annotations

import inspect
import threading
import time
from pathlib import Path

import pytest

import events.pace
from events.audit import CATCH_UP_EVENTS, AuditLog, verify
from events.backlog import Backlog
from events.bus import EventBus
from events.envelope import CallStarted, Event
from events.log import EventLog
from events.pace import GATHER_MAX_S, GATHER_S, PART_EVENTS, PAUSE_S, QUIET_GATHER_S, gather_s, parts
from events.projections import HealthProjection
from events.writer import BATCH_EVENTS, ENOUGH_EVENTS

LONG_S = 20.0


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Each pause that was made, in seconds."""
    made: list[float] = []
    real = time.sleep

    def sleep(seconds: float) -> None:
        made.append(seconds)
        real(seconds)

    monkeypatch.setattr(events.pace, "sleep", sleep)
    return made


@pytest.mark.parametrize("count", [0, 1, PART_EVENTS, PART_EVENTS + 1, 10 * PART_EVENTS + 7])
def test_parts_are_all_of_a_batch_in_order_with_a_pause_between(count: int, pauses: list[float]) -> None:
    numbers = list(range(count))
    cut = [numbers[part] for part in parts(count)]
    assert [number for part in cut for number in part] == numbers
    assert all(0 < len(part) <= PART_EVENTS for part in cut)
    assert pauses == [PAUSE_S] * max(0, len(cut) - 1)


def test_the_more_events_come_the_longer_others_are_waited_for() -> None:
    waits = [gather_s(count) for count in (0, 1, 100, 250, 1500, BATCH_EVENTS)]
    assert waits == sorted(waits)
    assert (waits[0], waits[1], waits[-1]) == (GATHER_S, GATHER_S, GATHER_MAX_S)
    assert GATHER_S < gather_s(300) < GATHER_MAX_S


class _Waited(Backlog):
    """Says when it is waited for."""

    def __init__(self) -> None:
        super().__init__(1000, 0)
        self.waits = threading.Event()
        self.gathered: list[tuple[int, float]] = []

    def _has_work(self) -> bool:
        found = super()._has_work()
        if not found:
            self.waits.set()
        return found


class _Gathering(_Waited):
    """While it lets events gather, one more comes."""

    def gather(self, limit: int, wait_s: float) -> None:
        self.gathered.append((limit, wait_s))
        self.offer(_started(self.offered + 1))


def _started(number: int) -> Event:
    return Event(number, 0, "ocr", CallStarted("read", str(number)))


def test_an_event_after_a_quiet_moment_waits_for_those_that_come_with_it() -> None:
    backlog = _Gathering()
    taken: list[list[Event] | None] = []
    writer = threading.Thread(target=lambda: taken.append(backlog.take(100, LONG_S, QUIET_GATHER_S)))
    writer.start()
    assert backlog.waits.wait(LONG_S)
    backlog.offer(_started(1))
    writer.join(LONG_S)
    assert taken == [[_started(1), _started(2)]]
    assert backlog.gathered == [(100, QUIET_GATHER_S)]


def test_events_that_are_there_already_are_not_held_back() -> None:
    backlog = _Gathering()
    backlog.offer(_started(1))
    assert backlog.take(100, None, QUIET_GATHER_S) == [_started(1)]
    assert not backlog.gathered


def test_closing_does_not_wait_for_what_could_come() -> None:
    backlog = _Waited()
    taken: list[list[Event] | None] = []
    writer = threading.Thread(target=lambda: taken.append(backlog.take(100, None, 10 * LONG_S)))
    writer.start()
    assert backlog.waits.wait(LONG_S)
    backlog.offer(_started(1))
    backlog.close()
    writer.join(LONG_S)
    assert taken == [[_started(1)]]


def test_a_large_batch_is_gathered_at_more_than_10_000_events_a_second() -> None:
    for rate, ends_s in ((9_000, GATHER_S), (11_000, GATHER_MAX_S)):
        wait_s = GATHER_S
        for _ in range(200):
            wait_s = gather_s(round(wait_s * rate))
        assert wait_s == pytest.approx(ends_s)


def test_what_is_written_at_once_fits_where_it_has_to() -> None:
    ring = inspect.signature(EventLog.open).parameters["ring"].default
    assert ENOUGH_EVENTS < BATCH_EVENTS <= min(ring, CATCH_UP_EVENTS - 1)


def test_a_batch_is_written_and_audited_in_parts_and_nothing_is_lost(tmp_path: Path, pauses: list[float]) -> None:
    """The writer and the audit each pause between their parts of it."""
    with EventLog.open(tmp_path / "events.db", source="test") as log:
        audit = AuditLog.open(tmp_path / "audit.jsonl")
        audit.attach(log)
        bus = EventBus(HealthProjection())
        bus.subscribe(log)
        with log._changed:  # the writer takes them at once
            for number in range(BATCH_EVENTS):
                bus.publish(CallStarted("read", str(number)), "ocr")
        assert log.flush(LONG_S)
        assert len(pauses) == 2 * (BATCH_EVENTS // PART_EVENTS - 1) > 0
        assert verify(audit.path, last=BATCH_EVENTS).ok
    audit.close()
