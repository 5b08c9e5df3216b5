"""A running server, over HTTP."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from types import TracebackType
from typing import Any, Self, TypeVar
from urllib.parse import quote, urlsplit

import aiohttp
import msgspec
from msgspec import UNSET, UnsetType

from engine.cli.arguments import Form
from engine.cli.client import Answer, Reply, Sink, decode_reply
from engine.cli.console import ExitCode, Failure
from engine.errors import ReasonCode

DEFAULT_URL = "http://127.0.0.1:8700"
NDJSON = "application/x-ndjson"

_CONNECT_S = 5.0
_PROBE_S = 2.0
_KNOWN_CODES = frozenset(ReasonCode)


class Line(msgspec.Struct):
    """One line of a streaming run: exactly one of these."""

    item: msgspec.Raw | UnsetType = UNSET
    progress: dict[str, float] | UnsetType = UNSET
    outcome: msgspec.Raw | UnsetType = UNSET


class Tool(msgspec.Struct):
    """What matters here of a tool's description."""

    name: str
    streams: bool


class Described(msgspec.Struct):
    """What matters here of a plugin's description."""

    tools: list[Tool]


T = TypeVar("T")
_decode_line = msgspec.json.Decoder(Line).decode


class Server:
    """A connection to one server. Use as `async with`; every method raises `Failure` where it does not answer."""

    def __init__(self, url: str, token: str | None) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise Failure(ExitCode.WRONG_USE, f"--url {url} is not an address; write it as {DEFAULT_URL}")
        self.url = url.rstrip("/")
        self._token = token

    async def __aenter__(self) -> Self:
        headers = {"Authorization": f"Bearer {self._token}"} if self._token else {}
        self._session = aiohttp.ClientSession(
            headers=headers,
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_S),
            read_bufsize=1 << 20,
        )
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._session.close()

    @asynccontextmanager
    async def request(self, method: str, path: str, **options: Any) -> AsyncIterator[aiohttp.ClientResponse]:
        """One request; the body of the `async with` reads the answer."""
        try:
            async with self._session.request(method, self.url + path, **options) as response:
                if response.status == 401:
                    text = f"{self.url} wants a token, or another one; pass --token or set HOLDFAST_TOKEN"
                    raise Failure(ExitCode.WRONG_USE, text)
                yield response
        except (aiohttp.ClientConnectorError, aiohttp.ServerTimeoutError) as exc:
            text = f"no server answers at {self.url} ({_why(exc)}); start one (holdfast serve) or correct --url"
            raise Failure(ExitCode.NO_SERVER, text) from None
        except BrokenPipeError:  # of our own stdout, while the answer is read: aiohttp's is a ClientError
            raise
        except (aiohttp.ClientError, ConnectionError):
            text = f"the connection to {self.url} was lost; look whether the server runs, then retry"
            raise Failure(ExitCode.NO_SERVER, text) from None

    async def read(self, kind: type[T], method: str, path: str, **options: Any) -> T:
        """The JSON of an answer that is not an error, as `kind`."""
        async with self.request(method, path, **options) as response:
            body = await response.read()
            if response.status != 200:
                raise self.failure(response.status, body)
        try:
            return msgspec.json.decode(body, type=kind)
        except msgspec.MsgspecError:
            raise self._stranger() from None

    async def answers(self) -> bool:
        """Whether a Holdfast server is there; one that wants a token is."""
        try:
            await self.read(list[Any], "GET", "/v1/plugins", timeout=aiohttp.ClientTimeout(_PROBE_S))
        except TimeoutError:
            return False
        except Failure as failure:
            return failure.code is ExitCode.WRONG_USE
        return True

    def failure(self, status: int, body: bytes) -> Failure:
        """What an error answer means."""
        reply = self._reply(body)
        code = ExitCode.WRONG_USE if 400 <= status < 500 else reply.exit_code
        return Failure(code, reply.error or f"{self.url} answered {status}")

    def _reply(self, body: bytes) -> Reply:
        try:
            reply = decode_reply(body)
        except msgspec.MsgspecError:
            raise self._stranger() from None
        if reply.ok is not True and reply.error is None:
            raise self._stranger()
        return reply

    def _stranger(self) -> Failure:
        return Failure(ExitCode.NO_SERVER, f"what answers at {self.url} is not a Holdfast server; correct --url")


class HttpClient(Server):
    """Runs tools on a server."""

    async def call(self, plugin: str, tool: str, form: Form, sink: Sink) -> Answer:
        """Run a tool to its end; its files are uploaded."""
        path = f"/v1/plugins/{quote(plugin, safe='')}"
        streamed = await self._streams(path, tool)
        async with AsyncExitStack() as files:
            body = _body(form, files)
            target = f"{path}/tools/{quote(tool, safe='')}/run"
            async with self.request("POST", target, headers={"Accept": NDJSON}, **body) as response:
                if response.content_type == NDJSON:
                    return Answer(await self._follow(response, sink), streamed)
                text = await response.read()
                reply = self._reply(text)
                if reply.ok is UNSET and reply.reason_code not in _KNOWN_CODES:
                    raise self.failure(response.status, text)
                return Answer(reply, streamed)

    async def _streams(self, path: str, tool: str) -> bool:
        """Whether the tool streams; of an unknown one the call itself will say so."""
        async with self.request("GET", path) as response:
            body = await response.read()
        try:
            tools = msgspec.json.decode(body, type=Described).tools if response.status == 200 else []
        except msgspec.MsgspecError:
            raise self._stranger() from None
        return any(known.name == tool and known.streams for known in tools)

    async def _follow(self, response: aiohttp.ClientResponse, sink: Sink) -> Reply:
        async for raw in lines(response):
            try:
                line = _decode_line(raw)
            except msgspec.MsgspecError:
                raise self._stranger() from None
            if line.item is not UNSET:
                await sink.item(bytes(line.item))
            elif line.progress is not UNSET:
                sink.progress(line.progress["done"], line.progress["total"])
            elif line.outcome is not UNSET:
                return self._reply(bytes(line.outcome))
        text = f"{self.url} ended the stream before the call was over; look whether the server runs, then retry"
        raise Failure(ExitCode.NO_SERVER, text)


async def lines(response: aiohttp.ClientResponse) -> AsyncIterator[bytes]:
    """The lines of a body as they come, however long; without their ends."""
    rest = b""
    async for chunk in response.content.iter_any():
        *whole, rest = (rest + chunk).split(b"\n")
        for line in whole:
            yield line.rstrip(b"\r")


def _body(form: Form, files: AsyncExitStack) -> Mapping[str, Any]:
    """A form's text and files as multipart; nothing at all as an empty object, for a form cannot be empty."""
    if not form:
        return {"json": {}}
    data = aiohttp.FormData(default_to_multipart=True)
    for name, value in form.items():
        if isinstance(value, str):
            data.add_field(name, value)
        else:
            try:
                file = files.enter_context(value.open("rb"))
            except OSError as exc:
                text = f"argument `{name}`: {value} cannot be read ({exc.strerror}); correct that"
                raise Failure(ExitCode.WRONG_USE, text) from None
            data.add_field(name, file, filename=value.name)
    return {"data": data}


def _why(exc: BaseException) -> str:
    if isinstance(exc, aiohttp.ClientConnectorError):
        return os.strerror(exc.os_error.errno) if exc.os_error.errno else str(exc.os_error)
    return str(exc) or type(exc).__name__
