"""Health is a pure fold: live, replayed, snapshotted and resumed, it is the same."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

import msgspec
from hypothesis import given, settings
from hypothesis import strategies as st

from events.bus import EventBus
from events.envelope import (
    CallFinished,
    CallProgress,
    CallStarted,
    EngineStarted,
    EngineStopping,
    Event,
    EventData,
    Gap,
    PluginFacts,
    PluginLog,
    Restarted,
    Transition,
    WorkerExited,
    WorkerStarted,
    decode,
    encode,
)
from events.projections import HealthProjection, PluginView, fold, fold_all, health
from events.snapshot import Snapshot

PLUGINS = ("ocr", "motion_tracker", "yolo")
LEGAL = {
    None: ("LOADED",),
    "LOADED": ("INITIALIZED", "FAILED", "UNAVAILABLE"),
    "INITIALIZED": ("RUNNING", "FAILED"),
    "RUNNING": ("FAILED",),
    "FAILED": (),
    "UNAVAILABLE": (),
}
texts = st.text(st.characters(codec="utf-8"), max_size=20)
milliseconds = st.floats(0, 1e7, allow_nan=False)


class History:
    """Draws a legal sequence of events: transitions by the table, finished calls that had started, …"""

    def __init__(self, draw: st.DrawFn) -> None:
        self.draw = draw
        self.state: dict[str, str | None] = dict.fromkeys(PLUGINS)
        self.incarnation = dict.fromkeys(PLUGINS, 0)
        self.running = dict.fromkeys(PLUGINS, 0)
        self.pids: dict[str, list[int]] = {name: [] for name in PLUGINS}

    def step(self) -> tuple[str | None, EventData]:
        """The next event's subject and data."""
        plugin = self.draw(st.sampled_from(PLUGINS))
        choices: list[Callable[[str], tuple[str | None, EventData]]] = [
            self.transition,
            self.log,
            self.engine,
            self.worker,
        ]
        if self.state[plugin] in ("INITIALIZED", "RUNNING"):
            choices += [self.call_started, self.call_started]
        if self.running[plugin]:
            choices += [self.call_finished, self.progress]
        return self.draw(st.sampled_from(choices))(plugin)

    def transition(self, plugin: str) -> tuple[str | None, EventData]:
        current = self.state[plugin]
        to = self.draw(st.sampled_from((*LEGAL[current], "LOADED")))
        if to == "LOADED":
            self.incarnation[plugin] += 1
            self.running[plugin], self.pids[plugin] = 0, []
            self.state[plugin] = to
            facts = PluginFacts(self.draw(texts), self.draw(texts), self.draw(st.booleans()), ("track", "detect"))
            return plugin, Transition(None, to, None, self.incarnation[plugin], plugin=facts)
        self.state[plugin] = to
        why = self.draw(texts) if to in ("FAILED", "UNAVAILABLE") else None
        return plugin, Transition(current, to, "trigger", self.incarnation[plugin], why and "code", why)

    def call_started(self, plugin: str) -> tuple[str | None, EventData]:
        self.running[plugin] += 1
        return plugin, CallStarted("track", self.draw(texts))

    def call_finished(self, plugin: str) -> tuple[str | None, EventData]:
        self.running[plugin] -= 1
        ok = self.draw(st.booleans())
        return plugin, CallFinished(
            "track", "r", ok, self.draw(milliseconds), broke=not ok and self.draw(st.booleans())
        )

    def progress(self, plugin: str) -> tuple[str | None, EventData]:
        return plugin, CallProgress("track", "r", self.draw(milliseconds), 1e7)

    def worker(self, plugin: str) -> tuple[str | None, EventData]:
        pids = self.pids[plugin]
        if self.draw(st.booleans()) and pids:
            return plugin, WorkerExited(pids.pop(), self.incarnation[plugin], "stopped", exit_code=0)
        pids.append(self.draw(st.integers(2, 1 << 22)))
        return plugin, WorkerStarted(pids[-1], self.incarnation[plugin])

    def log(self, plugin: str) -> tuple[str | None, EventData]:
        if self.draw(st.booleans()):
            return plugin, PluginLog("output", "info", self.draw(texts), 3)
        return plugin, Restarted(self.incarnation[plugin] + 1)

    def engine(self, _plugin: str) -> tuple[str | None, EventData]:
        kind = self.draw(st.sampled_from(["started", "stopping", "gap"]))
        if kind == "started":
            self.running = dict.fromkeys(PLUGINS, 0)
            self.pids = {name: [] for name in PLUGINS}
            self.state = dict.fromkeys(PLUGINS)
            return None, EngineStarted("0.1.0", 17)
        return None, EngineStopping() if kind == "stopping" else Gap(5, 9, "disk full")


@st.composite
def histories(draw: st.DrawFn) -> list[Event]:
    """Numbered events with times that only grow, in whole microseconds as the bus gives them."""
    history, time_ns, events = History(draw), 1_700_000_000_000_000_000, []
    for sequence in range(1, draw(st.integers(0, 40)) + 1):
        time_ns += draw(st.integers(0, 10_000_000)) * 1000
        subject, data = history.step()
        events.append(Event(sequence, time_ns, subject, data))
    return events


def live(events: Sequence[Event]) -> dict[str, PluginView]:
    """The projection after each event was applied one by one."""
    projection = HealthProjection()
    for event in events:
        projection.apply(event)
    return projection.snapshot()


@given(histories())
@settings(deadline=None)
def test_folding_one_by_one_all_at_once_and_from_json_gives_the_live_projection(events: list[Event]) -> None:
    expected = live(events)
    one_by_one = fold_all([])
    for event in events:
        one_by_one = fold(one_by_one, event)
    assert one_by_one == expected
    assert fold_all(events) == expected
    assert fold_all(decode(encode(event, "test")) for event in events) == expected
    assert list(fold_all(events)) == list(expected)  # the order in which plugins were first seen


@given(histories(), st.data())
@settings(deadline=None)
def test_a_snapshot_and_the_rest_give_what_a_full_replay_gives(events: list[Event], data: st.DataObject) -> None:
    cut = data.draw(st.integers(0, len(events)))
    stored = msgspec.msgpack.encode(Snapshot(cut, live(events[:cut])))
    snapshot = msgspec.msgpack.decode(stored, type=Snapshot)
    assert fold_all(events[cut:], snapshot.views) == live(events)


@given(histories())
@settings(deadline=None)
def test_every_view_of_a_legal_history_makes_a_health_object_that_json_can_carry(events: list[Event]) -> None:
    for view in live(events).values():
        made = health(view, now_ns=2_000_000_000_000_000_000, memory_bytes=1)
        assert msgspec.json.decode(msgspec.json.encode(made), type=type(made)) == made
        assert view.in_flight >= 0


def test_fold_leaves_the_views_it_was_given_untouched() -> None:
    before = live([Event(1, 1000, "ocr", CallStarted("t", "r"))])
    copy = dict(before)
    fold(before, Event(2, 2000, "ocr", CallStarted("t", "r")))
    assert before == copy


def test_readers_in_sixteen_threads_never_see_half_of_a_state() -> None:
    """Every event moves several fields of a view together; a reader must find them in step."""
    bus = EventBus(HealthProjection())
    bus.publish(Transition(None, "LOADED", None, 1), "ocr")
    torn: list[PluginView] = []
    stop, reading = threading.Event(), threading.Barrier(17)

    def read() -> None:
        reading.wait()
        while not stop.is_set():
            for view in [bus.projection.view("ocr"), *bus.projection.views()]:
                assert view is not None
                finished = view.success_count
                in_step = (
                    view.total_execution_time_ms == finished and view.as_of == 1 + 2 * finished + view.in_flight
                )
                if not in_step:
                    torn.append(view)

    threads = [threading.Thread(target=read) for _ in range(16)]
    for thread in threads:
        thread.start()
    reading.wait()
    for _ in range(3000):
        bus.publish(CallStarted("t", "r"), "ocr")
        bus.publish(CallFinished("t", "r", True, 1.0), "ocr")
    stop.set()
    for thread in threads:
        thread.join()
    assert torn == []
