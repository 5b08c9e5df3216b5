"""Health as JSON: the very object, kept in parts that one event makes stale."""

from __future__ import annotations

import time
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import next_event, settings_for, write_honest, write_plugin

from engine import Engine
from engine.health_json import HealthJson, Measured
from events.envelope import PluginFacts
from events.projections import Health, PluginView, health

SECOND_NS = 1_000_000_000


class Worker:
    """A worker as the watch knows it."""

    def __init__(self, memory_bytes: int) -> None:
        self.memory_bytes = memory_bytes


def view_of(name: str, as_of: int = 1, *, text: str = "", since_ns: int | None = SECOND_NS) -> PluginView:
    """A view; as many events make others of it."""
    facts = PluginFacts("1.0", text, False, ("run", text))
    return PluginView(name, reason=text, facts=facts, in_service_since_ns=since_ns, as_of=as_of)


texts = st.text() | st.sampled_from(
    ['"uptime_seconds":', '","memory_bytes":null,', '\\"memory_bytes":1,"', "{}[],:"]
)


@given(
    plugins=st.lists(
        st.tuples(texts, st.none() | st.integers(0, 10**19), st.lists(st.integers(0, 2**50), max_size=3)),
        max_size=4,
    ),
    now_ns=st.integers(0, 10**19),
)
def test_the_json_is_that_of_the_health_object(
    plugins: list[tuple[str, int | None, list[int]]], now_ns: int
) -> None:
    views = [view_of(f"p{i}", text=text, since_ns=since) for i, (text, since, _) in enumerate(plugins)]
    workers = {f"p{i}": [Worker(size) for size in sizes] for i, (_, _, sizes) in enumerate(plugins)}
    made = HealthJson(workers.__getitem__)
    wanted = [
        health(view, now_ns, sum(each.memory_bytes for each in workers[view.name]) or None) for view in views
    ]
    assert made.all(views, now_ns) == msgspec.json.encode(wanted)
    assert [made.one(view, now_ns) for view in views] == [msgspec.json.encode(each) for each in wanted]


def test_what_no_event_brings_is_of_the_moment() -> None:
    worker = Worker(0)
    made = HealthJson(lambda _name: [worker])
    view = view_of("lab")
    assert (decoded(made.one(view, 2 * SECOND_NS)).uptime_seconds, only(made, view, 2).memory_bytes) == (1.0, None)
    worker.memory_bytes = 4096
    assert decoded(made.one(view, 3 * SECOND_NS)).uptime_seconds == 2.0
    assert (only(made, view, 4).uptime_seconds, only(made, view, 4).memory_bytes) == (3.0, 4096)


def test_an_event_is_seen_at_once_and_asks_anew_who_works() -> None:
    working: dict[str, list[Measured]] = {"a": [Worker(1)], "b": [Worker(2)]}
    made = HealthJson(lambda name: list(working[name]))
    before = [view_of("a"), view_of("b")]
    assert [each.memory_bytes for each in listed(made, before)] == [1, 2]
    working["b"] = []
    after = [before[0], view_of("b", as_of=2)]
    assert [(each.as_of, each.memory_bytes) for each in listed(made, after)] == [(1, 1), (2, None)]
    assert [each.name for each in listed(made, after[1:])] == ["b"]
    assert listed(made, []) == []


@pytest.mark.contract(4)
async def test_a_worker_that_died_holds_no_memory(plugins: Path, data_dir: Path) -> None:
    write_honest(plugins)
    code = "import os\nclass Plugin:\n    def __init__(self, context): pass\n    def validate(self): pass\n"
    write_plugin(plugins, "leaver", code + "    def leave(self) -> None: os._exit(3)\n", ["leave"])
    async with Engine(settings_for(plugins, data_dir)) as engine:
        before = decoded(engine.health_json("leaver"))
        after = engine.bus.last
        await engine.run("leaver", "leave")
        await next_event(engine, "worker.exited", "leaver", after)
        left = decoded(engine.health_json("leaver"))
        assert (before.state, before.pid is None) == ("INITIALIZED", False)
        assert (left.state, left.pid, left.memory_bytes) == ("FAILED", None, None)
        again = await engine.restart("leaver")
        assert decoded(engine.health_json("leaver")).pid == again.pid
        told = msgspec.json.decode(engine.plugins_json(), type=list[Health])
        assert [each.name for each in told] == [each.name for each in engine.plugins()]
        assert all(each.uptime_seconds < time.time() for each in told)


def decoded(json: bytes) -> Health:
    """The health object that was encoded."""
    return msgspec.json.decode(json, type=Health)


def listed(made: HealthJson, views: list[PluginView]) -> list[Health]:
    """The same, of a list."""
    return msgspec.json.decode(made.all(views, SECOND_NS), type=list[Health])


def only(made: HealthJson, view: PluginView, now_s: int) -> Health:
    """The only one of a list."""
    (found,) = msgspec.json.decode(made.all([view], now_s * SECOND_NS), type=list[Health])
    return found
