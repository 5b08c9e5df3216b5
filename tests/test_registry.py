"""Contract 5: any thread may read or act, and sees whole states."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import hosting, until, write_plugin

from engine.errors import Cause, IllegalTransition, ReasonCode, UnknownPlugin
from engine.lifecycle.machine import Status
from engine.lifecycle.states import EXPLAINED, State, Trigger
from engine.loader.discovery import Candidate
from engine.registry import PluginRegistry
from events.bus import EventBus
from events.envelope import Event
from events.projections import HealthProjection, fold_all

pytestmark = pytest.mark.contract(5)

CAUSE = Cause(ReasonCode.TOOL_EXCEPTION, "it broke; mend it")
THREADS = 16

FICKLE = """
import os
class Plugin:
    def __init__(self, context): pass
    def validate(self): pass
    def work(self, how: str) -> str:
        if how == "die": os._exit(3)
        if how == "raise": raise RuntimeError("no")
        return how
"""


def registry_with(names: list[str]) -> tuple[PluginRegistry, EventBus, list[Event]]:
    events: list[Event] = []

    class Keep:
        name = "keep"

        def offer(self, event: Event) -> None:
            events.append(event)

    bus = EventBus(HealthProjection())
    bus.subscribe(Keep())
    registry = PluginRegistry(bus)
    for name in names:
        registry.begin(Candidate(name=name, folder=Path("/nowhere"), manifest=None, problem=CAUSE))
    return registry, bus, events


def impossible(status: Status) -> str | None:
    """Why no plugin can be in this status, or None."""
    if (status.cause is not None) != (status.state in EXPLAINED):
        return f"{status.state} with cause {status.cause}"
    return None if status.incarnation >= 1 else f"incarnation {status.incarnation}"


def test_an_unknown_name_is_answered_with_the_nearest() -> None:
    registry, _, _ = registry_with(["motion_tracker"])
    with pytest.raises(UnknownPlugin, match="did you mean `motion_tracker`"):
        registry.get("motion_traker")


def test_a_plugin_that_was_never_seen_before_begins_at_incarnation_one() -> None:
    registry, bus, _ = registry_with(["one"])
    assert registry.get("one").status == Status(State.LOADED, 1)
    again = registry.begin(registry.get("one").candidate)
    assert again.status == Status(State.LOADED, 2)
    view = bus.projection.view("one")
    assert view is not None
    assert view.incarnation == 2


@given(st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from([*Trigger, "restart"])), max_size=40))
def test_registry_projection_and_log_tell_the_same_story(steps: list[tuple[str, Trigger | str]]) -> None:
    registry, bus, events = registry_with(["a", "b", "c"])
    for name, step in steps:
        incarnation = registry.get(name)
        if not isinstance(step, Trigger):
            registry.begin(incarnation.candidate)
            continue
        cause = CAUSE if step in (Trigger.FAIL, Trigger.BECOME_UNAVAILABLE) else None
        incarnation.lifecycle.fire_if(step, cause)
    assert fold_all(events) == bus.projection.snapshot()
    for incarnation in registry.all():
        status, view = incarnation.status, bus.projection.view(incarnation.name)
        assert view is not None
        assert (view.state, view.incarnation) == (status.state.value, status.incarnation)
        assert view.reason == (status.cause.reason if status.cause else None)


def test_threads_that_fire_the_same_trigger_change_the_state_once() -> None:
    registry, _, events = registry_with(["one"])
    lifecycle = registry.get("one").lifecycle
    barrier = threading.Barrier(THREADS)
    won: list[bool] = []

    def fire() -> None:
        barrier.wait()
        try:
            lifecycle.fire(Trigger.FAIL, CAUSE)
            won.append(True)
        except IllegalTransition:
            won.append(False)

    in_threads(fire)
    assert won.count(True) == 1
    assert [event.sequence for event in events] == list(range(1, len(events) + 1))
    assert len(events) == 2


@pytest.fixture
def eager_threads() -> Iterator[None]:
    """Threads take turns fifty times as often: more interleavings, and the event loop gets its turn."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(0.0001)
    yield
    sys.setswitchinterval(before)


@pytest.mark.usefixtures("eager_threads")
async def test_sixteen_readers_never_see_an_impossible_state(plugins: Path, data_dir: Path) -> None:
    for name in ("one", "two"):
        write_plugin(plugins, name, FICKLE, ["work"])
    wrong: list[str] = []
    done = threading.Event()
    reads = [0] * THREADS
    async with hosting(plugins, data_dir) as engine:
        last_number: dict[str, int] = {}

        def look(reader: int) -> None:
            while not done.is_set():
                statuses = [incarnation.status for incarnation in engine.registry.all()]
                wrong.extend(problem for status in statuses if (problem := impossible(status)))
                for health in engine.plugins():
                    explained = health.state in ("FAILED", "UNAVAILABLE")
                    if (health.reason is not None) != explained or health.in_flight not in (0, 1):
                        wrong.append(f"{health}")
                    if health.as_of < last_number.get(f"{reader} {health.name}", 0):
                        wrong.append(f"{health.name} went back to {health.as_of}")
                    last_number[f"{reader} {health.name}"] = health.as_of
                reads[reader] += 1

        threads = [threading.Thread(target=look, args=(n,)) for n in range(THREADS)]
        for thread in threads:
            thread.start()
        try:
            for how in ("ok", "die", "ok", "raise"):
                for name in ("one", "two"):
                    await engine.run(name, "work", {"how": "ok"})
                    await engine.run(name, "work", {"how": how})
                    if engine.health(name).state == "FAILED":
                        assert (await engine.restart(name)).state == "INITIALIZED"
            await until(lambda: min(reads) > 3)
        finally:
            done.set()
            for thread in threads:
                thread.join()
    assert not wrong, wrong[:5]


def in_threads(work: Callable[[], None]) -> None:
    threads = [threading.Thread(target=work) for _ in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
