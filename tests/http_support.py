"""A server around a real engine, the plugins it hosts, and readers of what it answers."""

from __future__ import annotations

import asyncio
import io
import json
import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple, cast

import aiohttp
from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer
from support import settings_for, write_plugin

from engine import Engine
from engine.api.app import create_app
from engine.api.server import Runner
from engine.api.tokens import Tokens

Client = TestClient[web.Request, web.Application]

LAB = """
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass
class Odd:
    values: dict


class Plugin:
    def __init__(self, context): pass
    def validate(self): pass
    def echo(self, text: str, times: int = 1) -> str: return text * times
    def reverse(self, data: bytes) -> bytes: return data[::-1]
    def size(self, file: Path, note: str = "", count: int = 0) -> dict:
        return {"bytes": file.stat().st_size, "name": file.name, "path": str(file), "note": note, "count": count}
    def count(self, n: int, progress=None) -> Iterator[dict]:
        for i in range(n):
            progress(i + 1, n)
            yield {"i": i}
    def steps(self, n: int, progress) -> str:
        for i in range(n):
            progress(i + 1, n)
        return "done"
    def stumble(self, n: int) -> Iterator[int]:
        yield from range(n)
        raise RuntimeError("stumbled")
    def odd_items(self) -> Iterator[object]:
        yield 1
        yield Odd({None: 1})
    def flood(self, items: int, size: int) -> Iterator[str]:
        for _ in range(items):
            yield "x" * size
    def hold(self, gate: str) -> str:
        while not Path(gate).exists():
            time.sleep(0.005)
        return "let go"
    def hold_file(self, file: Path, gate: str) -> int:
        while not Path(gate).exists():
            time.sleep(0.005)
        return file.stat().st_size
    def hold_items(self, file: Path, gate: str) -> Iterator[int]:
        yield 1
        while not Path(gate).exists():
            time.sleep(0.005)
        yield file.stat().st_size
    def picky(self, text: str) -> str: raise ValueError(f"{text} is not to my taste")
    def not_a_number(self) -> list: return [float("nan"), float("inf"), 1.5]
    def odd(self) -> Odd: return Odd({None: 1})
    def leave(self) -> None: os._exit(3)
    def hang(self) -> None:
        while True:
            pass
"""
LAB_TOOLS = {
    **dict.fromkeys(["echo", "reverse", "size", "count", "steps", "stumble", "odd_items", "flood"], ""),
    **dict.fromkeys(["hold", "hold_file", "hold_items", "not_a_number", "odd", "leave"], ""),
    "picky": 'rejects = ["ValueError"]',
    "hang": "timeout_s = 0.5",
}


def write_lab(root: Path, name: str = "lab", limits: str = "") -> Path:
    """A plugin with a tool for every answer there is."""
    return write_plugin(root, name, LAB, LAB_TOOLS, limits)


class Lab(NamedTuple):
    """An engine, and a client of its server."""

    engine: Engine
    http: Client

    async def run(self, tool: str, plugin: str = "lab", **arguments: Any) -> tuple[int, Any]:
        """POST a call; the status and the JSON of its answer."""
        async with self.http.post(f"/v1/plugins/{plugin}/tools/{tool}/run", json=arguments) as response:
            return response.status, await response.json()

    async def get(self, path: str, **headers: str) -> tuple[int, Any]:
        """The status and the JSON of an answer."""
        sent = {name.replace("_", "-"): value for name, value in headers.items()}
        async with self.http.get(path, headers=sent) as response:
            return response.status, await response.json()


@asynccontextmanager
async def serving(
    root: Path, data_dir: Path, keys: dict[Any, Any] | None = None, **changes: Any
) -> AsyncIterator[Lab]:
    """A server in this process. On leaving: its engine had no fault of its own.

    Args:
        root: the plugins' folder.
        data_dir: of the engine.
        keys: values of the application.
        changes: of the settings.
    """
    async with Engine(settings_for(root, data_dir, **changes)) as engine:
        async with client_of(engine, keys) as http:
            yield Lab(engine, http)
        assert not engine.faults, engine.faults


@asynccontextmanager
async def client_of(engine: Engine, keys: dict[Any, Any] | None = None) -> AsyncIterator[Client]:
    """A client of a server around an engine; the engine is the caller's."""
    app = create_app(engine, await asyncio.to_thread(Tokens, engine.settings))
    for key, value in (keys or {}).items():
        app[key] = value
    async with TestClient(_Server(app)) as client:
        yield client


class _Server(TestServer):
    """Runs the application as `serve` does."""

    async def _make_runner(self, **options: Any) -> Runner:
        return Runner(self.app, **options)


def form(files: dict[str, tuple[str, bytes]], **texts: str) -> aiohttp.FormData:
    """A multipart form; a file is its name and its content."""
    made = aiohttp.FormData(texts, default_to_multipart=True)
    for name, (filename, content) in files.items():
        made.add_field(name, io.BytesIO(content), filename=filename)
    return made


@asynccontextmanager
async def raw_request(lab: Lab, *head: str, body: bytes = b"") -> AsyncIterator[asyncio.StreamReader]:
    """A request that is sent as it stands, on a connection of its own; for reading the answer as it comes."""
    reader, writer = await asyncio.open_connection("127.0.0.1", lab.http.port, limit=1024)
    try:
        writer.write("\r\n".join([head[0], "Host: localhost", *head[1:], "", ""]).encode("latin-1") + body)
        yield reader
    finally:
        writer.close()
        with suppress(ConnectionError):
            await writer.wait_closed()


async def rest_of(reader: asyncio.StreamReader) -> bytes:
    """All that still comes, until the connection ends, however it does."""
    taken = bytearray()
    with suppress(ConnectionError):
        while chunk := await reader.read(1 << 20):
            taken += chunk
    return bytes(taken)


def connections(lab: Lab) -> int:
    """How many connections the server holds."""
    runner = cast(web.AppRunner, cast(TestServer, lab.http.server).runner)
    return 0 if runner.server is None else len(runner.server.connections)


class ServerSent(NamedTuple):
    """One server-sent event."""

    id: int
    event: str
    data: dict[str, Any]
    raw: str


async def blocks(response: aiohttp.ClientResponse) -> AsyncIterator[str]:
    """What comes between blank lines, comments included."""
    lines: list[str] = []
    async for line in response.content:
        text = line.decode().rstrip("\n")
        if text:
            lines.append(text)
        else:
            yield "\n".join(lines)
            lines = []


async def sent_events(response: aiohttp.ClientResponse) -> AsyncIterator[ServerSent]:
    """The events of a stream, as they come."""
    async for block in blocks(response):
        fields = dict(line.split(": ", 1) for line in block.splitlines() if not line.startswith(":"))
        if "data" in fields:
            yield ServerSent(int(fields["id"]), fields["event"], json.loads(fields["data"]), fields["data"])


async def lines_of(response: aiohttp.ClientResponse) -> list[Any]:
    """Every line of an NDJSON answer."""
    return [json.loads(line) async for line in response.content]


_ROOT = str(Path(__file__).resolve().parents[1])
_SERVE = """
import asyncio, sys, msgspec
from engine.api.app import serve
from engine.settings import Settings

urls = []

settings = msgspec.json.decode(sys.argv[1], type=Settings, dec_hook=lambda kind, value: kind(value))
sys.exit(asyncio.run(serve(
    settings,
    announce=lambda _engine, url: urls.append(url),
    settled=lambda _engine: print(urls[0], flush=True),
)))
"""


class ServerProcess:
    """A server in a process of its own, whose plugins have settled."""

    def __init__(self, process: asyncio.subprocess.Process, url: str) -> None:
        self.process = process
        self.url = url

    def signal(self, number: signal.Signals) -> None:
        """Send a signal."""
        self.process.send_signal(number)

    async def ended(self) -> int:
        """Its exit status."""
        return await self.process.wait()


@asynccontextmanager
async def server_process(root: Path, data_dir: Path, **changes: Any) -> AsyncIterator[ServerProcess]:
    """A server in a process of its own, on a free port; killed on leaving if it still runs."""
    import msgspec

    settings = msgspec.json.encode(settings_for(root, data_dir, port=0, **changes), enc_hook=str)
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-c",
        _SERVE,
        settings.decode(),
        stdout=asyncio.subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": _ROOT},
    )
    log: asyncio.Task[bytes] | None = None
    try:
        assert process.stdout is not None
        while (line := await process.stdout.readline()) and not line.startswith(b"http://"):
            pass  # of its own log
        assert line, "the server did not come up"
        log = asyncio.create_task(process.stdout.read())  # a full pipe would hold the server up
        yield ServerProcess(process, line.decode().strip())
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()
        if log is not None:
            await log
