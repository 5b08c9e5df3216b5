"""The server as a process: its address, its start and its end."""

from __future__ import annotations

import asyncio
import signal
import socket
from pathlib import Path

import aiohttp
import msgspec
import pytest
from http_support import sent_events, server_process, write_lab
from support import descendants, settings_for, until, write_honest

from engine import Engine, SetupError
from engine.api.app import bind, serve


async def test_a_port_in_use_is_one_line_and_starts_nothing(plugins: Path, data_dir: Path) -> None:
    write_honest(plugins)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        settings = settings_for(plugins, data_dir, port=taken.getsockname()[1])
        with pytest.raises(SetupError, match=r"cannot listen on 127\.0\.0\.1:\d+.*another port") as caught:
            await serve(settings)
    assert "\n" not in str(caught.value)
    assert not await asyncio.to_thread(data_dir.exists)


@pytest.mark.parametrize("host", ["no.such.host.invalid", "203.0.113.7", "", "a" * 300, "\x00"])
async def test_a_host_that_is_not_here_is_one_line(plugins: Path, data_dir: Path, host: str) -> None:
    with pytest.raises(SetupError) as caught:
        await serve(settings_for(plugins, data_dir, host=host, port=0, token="t"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("port", [-1, 65536])
async def test_a_port_that_is_none_is_one_line(plugins: Path, data_dir: Path, port: int) -> None:
    with pytest.raises(SetupError):
        await serve(settings_for(plugins, data_dir, port=port))


@pytest.mark.parametrize("host", ["0.0.0.0", "::"])
async def test_open_to_others_only_with_a_token(plugins: Path, data_dir: Path, host: str) -> None:
    settings = settings_for(plugins, data_dir, host=host, port=0)
    with pytest.raises(SetupError, match="set a token"):
        await serve(settings)
    with pytest.raises(SetupError, match="set a token"):
        await serve(msgspec.structs.replace(settings, token=""))
    bind(msgspec.structs.replace(settings, token="s3cret")).close()


async def test_an_engine_that_cannot_open_gives_the_port_back(plugins: Path, data_dir: Path) -> None:
    await asyncio.to_thread(data_dir.write_text, "a file, not a folder")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    settings = settings_for(plugins, data_dir, port=port)
    with pytest.raises(SetupError, match="data folder"):
        await serve(settings)
    bind(settings).close()


async def test_health_is_there_before_the_plugins_have_settled(
    plugins: Path, data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_honest(plugins)
    settling = asyncio.Event()
    urls: asyncio.Queue[str] = asyncio.Queue()
    settle, listening = Engine.settle, asyncio.Queue[Engine]()

    async def held(engine: Engine) -> None:
        listening.put_nowait(engine)
        await settling.wait()
        await settle(engine)

    monkeypatch.setattr(Engine, "settle", held)
    settings = settings_for(plugins, data_dir, port=0)
    listener = bind(settings)
    monkeypatch.setattr("engine.api.app.bind", lambda _settings: listener)
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    settled = asyncio.Event()
    serving = asyncio.create_task(
        serve(
            settings,
            announce=lambda _engine, url: urls.put_nowait(url),
            settled=lambda _engine: settled.set(),
        )
    )
    await asyncio.wait({serving, asyncio.ensure_future(listening.get())}, return_when=asyncio.FIRST_COMPLETED)
    assert not serving.done(), serving.exception()
    async with aiohttp.ClientSession(url) as session:
        async with session.get("/v1/plugins") as response:
            assert [health["state"] for health in await response.json()] == ["LOADED"]
        async with session.get("/readyz") as response:
            assert response.status == 503
        assert await urls.get() == url
        assert not settled.is_set()
        settling.set()
        await settled.wait()
        async with session.get("/readyz") as response:
            assert response.status == 200
    signal.raise_signal(signal.SIGTERM)
    assert await serving == 0
    assert not await asyncio.to_thread(descendants)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_signal_drains_and_ends_with_0(
    plugins: Path, data_dir: Path, tmp_path: Path, number: signal.Signals
) -> None:
    write_lab(plugins)
    gate = tmp_path / "gate"
    async with server_process(plugins, data_dir) as server, aiohttp.ClientSession(server.url) as session:
        workers = await asyncio.to_thread(descendants, server.process.pid)
        assert len(workers) >= 2
        async with session.get("/v1/events") as response:
            stream = sent_events(response)
            hold = session.post("/v1/plugins/lab/tools/hold/run", json={"gate": str(gate)})
            holding = asyncio.ensure_future(hold)
            while (await anext(stream)).event != "holdfast.plugin.call.started":
                pass
            server.signal(number)
            while (await anext(stream)).event != "holdfast.engine.stopping":
                pass
            async with session.get("/readyz") as probe:
                assert probe.status == 503
            async with session.post("/v1/plugins/lab/tools/echo/run", json={"text": "x"}) as refused:
                assert (refused.status, (await refused.json())["reason_code"]) == (503, "engine_stopping")
            async with session.get("/v1/plugins/lab/health") as health:
                assert health.status == 200
            gate.touch()
            async with await holding as answer:
                assert (answer.status, (await answer.json())["value"]) == (200, "let go")
            rest = [event.event async for event in stream]
            assert rest[-1] == "holdfast.worker.exited"
        assert await server.ended() == 0
    await until(lambda: not workers & all_processes())
    assert not list((data_dir / "scratch").iterdir())


async def test_a_call_that_outlasts_the_drain_is_told_so(plugins: Path, data_dir: Path, tmp_path: Path) -> None:
    write_lab(plugins)
    async with (
        server_process(plugins, data_dir, drain_s=0.2) as server,
        aiohttp.ClientSession(server.url) as session,
        session.get("/v1/events") as response,
    ):
        stream = sent_events(response)
        hold = session.post("/v1/plugins/lab/tools/hold/run", json={"gate": str(tmp_path / "never")})
        holding = asyncio.ensure_future(hold)
        while (await anext(stream)).event != "holdfast.plugin.call.started":
            pass
        server.signal(signal.SIGTERM)
        async with await holding as answer:
            assert (answer.status, (await answer.json())["ok"]) == (503, False)
        assert await server.ended() == 0


async def test_a_second_signal_ends_it_at_once(plugins: Path, data_dir: Path, tmp_path: Path) -> None:
    write_lab(plugins)
    async with server_process(plugins, data_dir) as server, aiohttp.ClientSession(server.url) as session:
        workers = await asyncio.to_thread(descendants, server.process.pid)
        async with session.get("/v1/events") as response:
            stream = sent_events(response)
            hold = session.post("/v1/plugins/lab/tools/hold/run", json={"gate": str(tmp_path / "never")})
            holding = asyncio.ensure_future(hold)
            while (await anext(stream)).event != "holdfast.plugin.call.started":
                pass
            server.signal(signal.SIGTERM)
            while (await anext(stream)).event != "holdfast.engine.stopping":
                pass
            server.signal(signal.SIGTERM)
            assert await server.ended() == 1
            with pytest.raises(aiohttp.ClientError):
                await holding
    await until(lambda: not workers & all_processes())
    await until(lambda: not list((data_dir / "scratch").iterdir()))


def all_processes() -> set[int]:
    """Every process that still runs."""
    return {
        int(entry.name)
        for entry in Path("/proc").iterdir()
        if entry.name.isdigit() and _state(entry) not in ("Z", "X", "")
    }


def _state(entry: Path) -> str:
    try:
        return (entry / "stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return ""
