"""The event bus: numbers, order, and subscribers that misbehave."""

from __future__ import annotations

import threading

import pytest

from events.bus import EventBus
from events.envelope import CallStarted, EngineStopping, Event, decode, encode
from events.projections import HealthProjection


class Collector:
    """Keeps what it is offered."""

    name = "collector"

    def __init__(self) -> None:
        self.events: list[Event] = []

    def offer(self, event: Event) -> None:
        self.events.append(event)


class Broken:
    """Raises on everything."""

    name = "broken"

    def offer(self, event: Event) -> None:
        raise RuntimeError(f"cannot take {event.sequence}")


def test_numbers_are_consecutive_and_in_order_for_every_subscriber_under_threads() -> None:
    bus, first, second = EventBus(HealthProjection(), last=41), Collector(), Collector()
    bus.subscribe(first)
    bus.subscribe(second)
    threads = [
        threading.Thread(target=lambda: [bus.publish(CallStarted("t", "r"), "p") for _ in range(500)])
        for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [event.sequence for event in first.events] == list(range(42, 42 + 4000))
    assert second.events == first.events
    assert bus.last == 41 + 4000


def test_a_subscriber_that_raises_is_counted_and_named_and_disturbs_nobody() -> None:
    bus, after = EventBus(HealthProjection()), Collector()
    bus.subscribe(Broken())
    bus.subscribe(after)
    events = [bus.publish(EngineStopping()) for _ in range(3)]
    assert after.events == events
    assert bus.faults["broken"].count == 3
    assert bus.faults["broken"].last == "RuntimeError: cannot take 3"


def test_an_event_is_folded_before_subscribers_are_offered_it() -> None:
    bus = EventBus(HealthProjection())
    seen: list[int] = []

    class Reader:
        name = "reader"

        def offer(self, event: Event) -> None:
            seen.append(bus.projection.snapshot()["p"].as_of)

    bus.subscribe(Reader())
    bus.publish(CallStarted("t", "r"), "p")
    assert seen == [1]


def test_after_unsubscribing_nothing_more_is_offered() -> None:
    bus, collector = EventBus(HealthProjection()), Collector()
    bus.subscribe(collector)
    bus.publish(EngineStopping())
    bus.unsubscribe(collector)
    bus.publish(EngineStopping())
    assert [event.sequence for event in collector.events] == [1]


@pytest.mark.parametrize("time_ns", [1_700_000_000_123_456_789, 1_700_000_000_999_999_999, 0])
def test_an_event_read_back_is_the_event_that_was_published_to_the_last_digit_of_its_time(time_ns: int) -> None:
    bus = EventBus(HealthProjection(), clock=lambda: time_ns)
    event = bus.publish(EngineStopping())
    assert decode(encode(event, "test")) == event
