"""The event stream over HTTP: replay, live, resuming, filters, pages, and readers that do not read."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from pathlib import Path

import psutil
import pytest
from client_support import Address, connect, hang_up
from http_support import (
    Lab,
    ServerSent,
    blocks,
    client_of,
    connections,
    raw_request,
    rest_of,
    sent_events,
    serving,
    write_lab,
)
from support import settings_for, until, write_honest

from engine import Engine
from engine.api.keys import KEEP_ALIVE_S, STALL_S, STREAMS, Streams
from events.cursor import BATCH_LIMIT
from events.envelope import PluginLog

JSON = {"Accept": "application/json"}


async def read(lab: Lab, path: str, count: int, headers: dict[str, str] | None = None) -> list[ServerSent]:
    """The first events of a stream."""
    seen: list[ServerSent] = []
    async with lab.http.get(path, headers=headers) as response:
        assert (response.status, response.content_type) == (200, "text/event-stream")
        async for event in sent_events(response):
            seen.append(event)
            if len(seen) == count:
                break
    return seen


@pytest.mark.contract(9)
async def test_replay_goes_over_into_live_without_a_hole(plugins: Path, data_dir: Path) -> None:
    write_lab(plugins)
    async with serving(plugins, data_dir) as lab:
        await lab.run("echo", text="before")
        before = lab.engine.bus.last
        seen: list[ServerSent] = []
        async with lab.http.get("/v1/events?after=0") as response:
            async for event in sent_events(response):
                seen.append(event)
                if event.id == before:
                    await lab.run("echo", text="after")
                if event.id > before and event.event == "holdfast.plugin.call.finished":
                    break
        assert [event.id for event in seen] == list(range(1, len(seen) + 1))
        assert seen[0].event == "holdfast.engine.started"
        for event in seen:
            assert event.data["id"] == str(event.id)
            assert event.data["type"] == event.event
        stored = lab.engine.log.page(0, 1000)
        assert [record.json.decode() for record in stored[: len(seen)]] == [event.raw for event in seen]


@pytest.mark.contract(9)
async def test_the_last_event_id_wins_over_after(plugins: Path, data_dir: Path) -> None:
    write_lab(plugins)
    async with serving(plugins, data_dir) as lab:
        first = await read(lab, "/v1/events?after=0", 3)
        again = await read(lab, "/v1/events?after=0", 1, {"Last-Event-ID": str(first[1].id)})
        assert again[0] == first[2]
        assert (await read(lab, "/v1/events?after=1", 1, {"Last-Event-ID": ""}))[0] == first[1]


async def test_a_stream_without_a_number_begins_now(plugins: Path, data_dir: Path) -> None:
    write_lab(plugins)
    async with serving(plugins, data_dir) as lab:
        assert await asyncio.to_thread(lab.engine.log.flush, 10)
        now = lab.engine.log.durable
        async with lab.http.get("/v1/events") as response:
            await lab.run("echo", text="x")
            async for event in sent_events(response):
                assert event.id == now + 1
                break


async def test_filters_by_plugin_and_type(plugins: Path, data_dir: Path) -> None:
    write_lab(plugins)
    write_honest(plugins)
    async with serving(plugins, data_dir) as lab:
        await lab.run("echo", text="x")
        await lab.run("echo", plugin="honest", text="x")
        path = "/v1/events?after=0&plugin=honest&type=plugin.transition&type=holdfast.plugin.call.finished"
        seen = await read(lab, path, 4)
        assert {event.data["subject"] for event in seen} == {"honest"}
        assert [event.data["data"].get("to") for event in seen] == ["LOADED", "INITIALIZED", "RUNNING", None]
        both = await read(lab, "/v1/events?after=0&type=plugin.call.finished&plugin=honest&plugin=lab", 2)
        assert [event.data["subject"] for event in both] == ["lab", "honest"]


@pytest.mark.parametrize(
    ("query", "headers", "says"),
    [
        ("type=plugin.transitoin", {}, "`plugin.transition`"),
        ("type=holdfast.gpa", {}, "`gap`"),
        ("after=x", {}, "`after`"),
        ("after=-1", {}, "`after`"),
        ("after=" + "9" * 40, {}, "`after`"),
        ("after=١", {}, "`after`"),
        ("", {"Last-Event-ID": "abc"}, "`Last-Event-ID`"),
        ("limit=0", JSON, "`limit`"),
        ("limit=1001", JSON, "`limit`"),
        ("limit=ten", JSON, "`limit`"),
    ],
)
async def test_what_is_no_number_or_no_type_is_422(
    plugins: Path, data_dir: Path, query: str, headers: dict[str, str], says: str
) -> None:
    write_honest(plugins)
    async with serving(plugins, data_dir) as lab, lab.http.get(f"/v1/events?{query}", headers=headers) as response:
        body = await response.json()
        assert (response.status, body["reason_code"]) == (422, "bad_input")
        assert says in body["error"]


async def test_pages_splice_the_log_and_lead_on(plugins: Path, data_dir: Path) -> None:
    write_lab(plugins)
    async with serving(plugins, data_dir) as lab:
        for _ in range(5):
            await lab.run("echo", text="x")
        assert await asyncio.to_thread(lab.engine.log.flush, 10)
        durable = lab.engine.log.durable
        after, ids = 0, []
        while after < durable:
            status, page = await lab.get(f"/v1/events?after={after}&limit=3", Accept="application/json")
            assert status == 200
            ids += [int(event["id"]) for event in page["events"]]
            assert page["next"] > after
            after = page["next"]
        assert ids == list(range(1, durable + 1))
        _, empty = await lab.get(f"/v1/events?after={durable}", Accept="application/json")
        assert empty == {"events": [], "next": durable}
        # A filtered page says up to where it looked, so that nobody searches the same stretch again.
        _, filtered = await lab.get("/v1/events?type=gap", Accept="application/json")
        assert filtered == {"events": [], "next": durable}
        stored = lab.engine.log.page(0, 2)
        async with lab.http.get("/v1/events?limit=2", headers=JSON) as response:
            body = await response.read()
        assert body == b'{"events":[' + b",".join(record.json for record in stored) + b'],"next":2}'


async def test_a_number_of_another_log_is_told_by_a_gap(plugins: Path, data_dir: Path) -> None:
    write_honest(plugins)
    async with serving(plugins, data_dir) as lab:
        seen = await read(lab, "/v1/events?after=100000", 1)
        assert seen[0].event == "holdfast.gap"
        assert "different one" in seen[0].data["data"]["why"]
        _, page = await lab.get("/v1/events?after=100000", Accept="application/json")
        assert page["events"][0]["type"] == "holdfast.gap"
        assert page["next"] <= lab.engine.bus.last


async def test_only_durable_events_are_sent(
    plugins: Path, data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An event is published long before it is committed; a stream that shows it must find it committed."""
    write_lab(plugins)
    async with serving(plugins, data_dir) as lab, lab.http.get("/v1/events?after=0") as response:
        count = 0
        for _ in range(20):
            lab.engine.bus.publish(PluginLog("output", "info", "line"), "lab")
        async for event in sent_events(response):
            assert event.id <= lab.engine.log.durable
            count += 1
            if event.id == lab.engine.bus.last:
                break
    assert count >= 20


async def test_an_idle_stream_shows_signs_of_life(plugins: Path, data_dir: Path) -> None:
    write_honest(plugins)
    async with serving(plugins, data_dir, {KEEP_ALIVE_S: 0.05}) as lab:
        assert await asyncio.to_thread(lab.engine.log.flush, 10)
        came = []
        async with lab.http.get("/v1/events") as response:
            async for block in blocks(response):
                came.append(block)
                if len(came) == 4:
                    break
    assert came[0] == "retry: 1000"
    assert came[1:] == [": keep-alive"] * 3


@pytest.mark.contract(9)
@pytest.mark.parametrize("linger_s", [0.0, 0.3])
async def test_stopping_the_engine_ends_streams_after_the_last_event(
    linger_s: float, plugins: Path, data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Streams, "linger_s", linger_s)
    write_lab(plugins)
    engine = Engine(settings_for(plugins, data_dir))
    async with engine, client_of(engine) as http, http.get("/v1/events?after=0") as response:
        stream = sent_events(response)
        assert (await anext(stream)).id == 1
        await engine.close()
        http.app[STREAMS].stop()
        seen = [event.event async for event in stream]  # ends by itself, and cleanly
        assert "holdfast.engine.stopping" in seen
        assert seen[-1] == "holdfast.worker.exited"


@pytest.mark.parametrize("chosen", ["", "&type=engine.started"])
async def test_stopping_the_server_ends_streams_of_an_engine_that_goes_on(
    chosen: str, plugins: Path, data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Streams, "linger_s", 0.3)
    write_honest(plugins)
    async with serving(plugins, data_dir) as lab, lab.http.get(f"/v1/events?after=0{chosen}") as response:
        stream = sent_events(response)
        assert (await anext(stream)).id == 1
        lab.engine.bus.publish(PluginLog("output", "info", "while it lingers"), "honest")
        assert await asyncio.to_thread(lab.engine.log.flush, 10)
        lab.http.app[STREAMS].stop()
        async for _ in stream:
            pass
        async with lab.http.get("/v1/events") as refused:
            assert refused.status == 503


async def test_a_reader_that_takes_nothing_is_dropped_and_misses_nothing(plugins: Path, data_dir: Path) -> None:
    write_honest(plugins)
    async with serving(plugins, data_dir, {STALL_S: 0.2}) as lab:
        async with raw_request(lab, "GET /v1/events?after=0 HTTP/1.1") as reader:
            assert (await reader.readline()).split()[1] == b"200"
            line = "x" * 10_000
            for _ in range(2000):  # 20 MB: more than the sockets hold
                lab.engine.bus.publish(PluginLog("output", "info", line), "honest")
            await until(lambda: not connections(lab))
            taken = await rest_of(reader)
        assert not taken.endswith(b"0\r\n\r\n")
        whole = taken.split(b"\nid: ")[1:-1]  # the last was cut
        ids = [int(part.split(b"\n")[0]) for part in whole]
        assert ids == list(range(1, len(ids) + 1))
        last = ids[-1]
        resumed = await read(lab, "/v1/events", 50, {"Last-Event-ID": str(last)})
        assert [event.id for event in resumed] == list(range(last + 1, last + 51))


async def test_a_reader_that_leaves_is_forgotten(plugins: Path, data_dir: Path) -> None:
    write_honest(plugins)
    async with serving(plugins, data_dir) as lab:
        async with raw_request(lab, "GET /v1/events HTTP/1.1") as reader:
            assert (await reader.readline()).split()[1] == b"200"
        await until(lambda: not connections(lab))
        assert not lab.http.app[STREAMS]._waits


async def test_slow_readers_cost_neither_memory_nor_a_fast_reader(plugins: Path, data_dir: Path) -> None:
    """200 readers that take nothing, while 80 MB go by: each is a number, one batch, and what its socket holds."""
    write_honest(plugins)
    async with serving(plugins, data_dir, max_streams=256) as lab:
        address = Address("127.0.0.1", lab.http.port or 0)
        line = "x" * 10_000
        for _ in range(2000):  # for those who replay
            lab.engine.bus.publish(PluginLog("output", "info", line), "honest")
        assert await asyncio.to_thread(lab.engine.log.flush, 20)
        before = psutil.Process().memory_info().rss
        for _ in range(200):
            reader, writer = await connect(address, limit=1024, receive_bytes=4096)
            writer.write(b"GET /v1/events?after=0 HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert (await reader.readline()).split()[1] == b"200"
        assert lab.http.app[STREAMS].open == 200
        async with lab.http.get("/v1/events") as response:
            events = sent_events(response)
            memory: list[int] = []
            for _ in range(80):
                after = lab.engine.bus.last
                for _ in range(100):
                    lab.engine.bus.publish(PluginLog("output", "info", line), "honest")
                started_s = asyncio.get_running_loop().time()
                while (await anext(events)).id < after + 100:
                    pass
                assert asyncio.get_running_loop().time() - started_s < 5
                memory.append(psutil.Process().memory_info().rss)
            assert (await lab.get("/v1/plugins/honest/health"))[0] == 200
        grown_mib = [(one - before) / 2**20 for one in memory]
        assert max(grown_mib) < 250, grown_mib  # 200 batches, and the log's own ring
        assert grown_mib[-1] - grown_mib[len(memory) // 2] < 40, grown_mib
        await hang_up()
        await until(lambda: lab.http.app[STREAMS].open == 0)


async def test_many_readers_see_the_same(plugins: Path, data_dir: Path) -> None:
    write_lab(plugins)
    async with serving(plugins, data_dir) as lab:
        before = lab.engine.bus.last
        readers = [asyncio.create_task(read(lab, f"/v1/events?after={before}", 5)) for _ in range(90)]
        await asyncio.gather(*(lab.run("echo", text="x") for _ in range(3)))
        seen = await asyncio.gather(*readers)
    assert all([event.raw for event in one] == [event.raw for event in seen[0]] for one in seen)
    assert json.loads(seen[0][0].raw)["sequence"] == before + 1


@pytest.mark.parametrize(("streams", "linger_s"), [(1, 0.0001), (1000, 0.1), (5000, 0.1)])
def test_the_more_streams_there_are_the_longer_each_lets_events_gather(streams: int, linger_s: float) -> None:
    open_streams = Streams(5000)
    with contextlib.ExitStack() as places:
        for _ in range(streams):
            places.enter_context(open_streams.place())
        assert open_streams.linger_s == pytest.approx(linger_s)
    assert open_streams.linger_s == 0


async def test_a_stream_lingers_where_it_has_sent_all_there_is_and_not_while_it_replays(
    plugins: Path, data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []

    def linger_s(streams: Streams) -> float:
        asked.append(streams.open)
        return 0.0

    monkeypatch.setattr(Streams, "linger_s", property(linger_s))
    write_lab(plugins)
    async with serving(plugins, data_dir) as lab:
        for number in range(3 * BATCH_LIMIT):
            lab.engine.bus.publish(PluginLog("output", "info", str(number)), "lab")
        assert await asyncio.to_thread(lab.engine.log.flush, 30)
        last = lab.engine.bus.last
        async with lab.http.get("/v1/events?after=0") as response:
            events = sent_events(response)
            assert [event.id async for event in first(events, last)] == list(range(1, last + 1))
            await until(lambda: asked == [1])
            lab.engine.bus.publish(PluginLog("output", "info", "live"), "lab")
            assert (await anext(events)).id == last + 1
            await until(lambda: asked == [1, 1])


async def first(events: AsyncIterator[ServerSent], count: int) -> AsyncIterator[ServerSent]:
    """So many of them."""
    for _ in range(count):
        yield await anext(events)
