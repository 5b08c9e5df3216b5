"""The event bus: numbers, order, subscribers that misbehave, clocks, texts; and the page about events."""

from __future__ import annotations

import re
import threading
from pathlib import Path
from typing import Any, get_type_hints

import msgspec
import pytest

from events.backlog import Backlog
from events.bounds import NAME_CHARS, TEXT_CHARS
from events.bus import EventBus
from events.envelope import (
    DATA_TYPES,
    EVENT_TYPES,
    CallFinished,
    CallStarted,
    CloudEvent,
    EngineStopping,
    Event,
    EventData,
    PluginFacts,
    PluginLog,
    Transition,
    decode,
    encode,
)
from events.projections import HealthProjection, health
from events.retention import LET_GO


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


def test_a_subscriber_that_fails_on_every_event_does_not_fill_the_log_of_the_server(
    capfd: pytest.CaptureFixture[str],
) -> None:
    bus = EventBus(HealthProjection())
    bus.subscribe(Broken())
    for _ in range(1000):
        bus.publish(EngineStopping())
    assert bus.faults["broken"].count == 1000
    told = re.findall(r"subscriber_failed.*cannot take (\d+)", "".join(capfd.readouterr()))
    assert [int(number) for number in told] == [1, 2, 4, 8, 16, 32, 64, 128, 256, 512]


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


# Clocks


def test_a_clock_that_is_set_back_changes_times_and_nothing_else() -> None:
    clock = iter([2_000_000_000_000_000_000, 5_000, -1_500_000_000, 2_000_000_000_000_001_000])
    bus, collector = EventBus(HealthProjection(), clock=lambda: next(clock)), Collector()
    bus.subscribe(collector)
    bus.publish(Transition("LOADED", "INITIALIZED", "initialize", 1), "ocr")
    for _ in range(3):
        bus.publish(CallStarted("t", "r"), "ocr")
    assert [event.sequence for event in collector.events] == [1, 2, 3, 4]
    assert [event.time for event in collector.events] == [
        "2033-05-18T03:33:20.000000Z",
        "1970-01-01T00:00:00.000005Z",
        "1969-12-31T23:59:58.500000Z",
        "2033-05-18T03:33:20.000001Z",
    ]
    assert [decode(encode(event, "test")) for event in collector.events] == collector.events
    [view] = bus.projection.views()
    assert view.as_of == 4
    assert health(view, now_ns=0).uptime_seconds == 0


# Texts


def test_a_text_that_is_too_long_is_cut_before_anything_sees_it_and_says_how_long_it_was() -> None:
    bus, collector = EventBus(HealthProjection()), Collector()
    bus.subscribe(collector)
    bus.publish(Transition("RUNNING", "FAILED", "fail", 1, "tool_exception", "x" * 10_000_000), "ocr")
    [event] = collector.events
    assert isinstance(event.data, Transition)
    assert event.data.reason is not None
    assert len(event.data.reason) == TEXT_CHARS
    assert event.data.reason.endswith("x… (10000000 characters)")
    assert bus.projection.snapshot()["ocr"].reason == event.data.reason


@pytest.mark.parametrize("chars", [NAME_CHARS + 1, 10_000])
@pytest.mark.parametrize("kind", DATA_TYPES.values())
def test_only_what_is_told_may_be_long_so_that_many_events_fit_into_memory(
    kind: type[EventData], chars: int
) -> None:
    fields, text = get_type_hints(kind), "x" * chars
    texts: dict[str, Any] = {name: text for name, hint in fields.items() if hint in (str, str | None)}
    others: dict[str, Any] = {name: 1 for name, hint in fields.items() if hint in (int, float, bool)}
    if kind is Transition:
        others["plugin"] = PluginFacts(text, text, tools=(text,))
    data = EventBus(HealthProjection()).publish(kind(**texts, **others), "ocr").data
    found = {name: getattr(data, name) for name in texts}
    if isinstance(data, Transition):
        assert isinstance(data.plugin, PluginFacts)
        found |= {
            "description": data.plugin.description,
            "version": data.plugin.version,
            "tool": data.plugin.tools[0],
        }
    for name, kept in found.items():
        room = TEXT_CHARS if name in ("message", "reason", "why", "description") else NAME_CHARS
        assert len(kept) == min(chars, room), name
        assert kept.endswith(f"x… ({chars} characters)") == (chars > room), name


def test_what_utf_8_does_not_have_is_written_out_wherever_it_stands() -> None:
    bus = EventBus(HealthProjection())
    facts = PluginFacts("1\ud800", "zwölf\udc80", tools=("read\udfff", "größe"))
    for data in (
        PluginLog("output", "info", "bad \ud800 and größer"),
        Transition(None, "LOADED", None, 1, plugin=facts),
        CallFinished("t", "r", False, 1.0, "Erro\udcffr"),
    ):
        event = bus.publish(data, "ocr")
        assert decode(encode(event, "test")) == event
    assert bus.projection.snapshot()["ocr"].facts == PluginFacts(
        "1\\ud800", "zwölf\\udc80", tools=("read\\udfff", "größe")
    )


def test_texts_that_fit_are_passed_on_as_they_are() -> None:
    data = CallFinished("t", "r", False, 1.0, "ValueError", "rejected")
    assert EventBus(HealthProjection()).publish(data, "ocr").data is data


# The page


def test_every_type_and_field_of_events_is_on_the_page() -> None:
    page = (Path(__file__).parents[1] / "docs" / "events.md").read_text()
    sections = {part.split("`")[1]: part for part in page.split("\n### ")[1:]}
    assert sorted(sections) == sorted(EVENT_TYPES)
    for name, kind in DATA_TYPES.items():
        fields = [field.encode_name for field in msgspec.structs.fields(kind)]
        assert re.findall(r"^\| `(\w+)` \|", sections[name].split("\n## ")[0], re.MULTILINE) == fields, name
    envelope = page.split("\n## ")[1]
    assert re.findall(r"^\| `(\w+)` \|", envelope, re.MULTILINE) == list(CloudEvent.__struct_fields__)
    assert f"at most {TEXT_CHARS} characters long, any other text {NAME_CHARS};" in page
    for field in PluginFacts.__struct_fields__:
        assert f"`{field}`" in sections["plugin.transition"]
    retention = page.split("\n## Retention")[1]
    assert all(f"`{name}`" in retention for name in LET_GO)


def test_a_quiet_time_before_an_event_is_no_stall_of_the_writer() -> None:
    backlog = Backlog(10, 0)
    assert backlog.take(10, 0) is None
    backlog._moved -= 3600
    backlog.offer(Event(1, 0, None, EngineStopping()))
    assert backlog.stalled_s < 60
