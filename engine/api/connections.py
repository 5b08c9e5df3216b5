"""A connection: how long it may keep us waiting, and what one is told that speaks no HTTP.

    opened ─ head_s ─▶ head complete ─▶ handler: body (see `body`), answer ─▶ idle_s ─▶ a next head begins …
                                                             └─ takes nothing of its answer: stall_s

A client that is too slow with its head is told 408 where it has begun one, and closed. One that does not take its
answer is cut off.

aiohttp has no deadline for a request's head and no bound on connections; the seam is its protocol class. Of its
internals this uses three: `_waiter`, which is pending while no request is there, `_request_count`, and
`_reading_paused`, which is set while nothing is read for the body's sake.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import structlog
from aiohttp import web

from engine import descriptors
from engine.api.errors import Problem, error_response, raw_answer
from engine.errors import ReasonCode
from engine.settings import Settings

log = structlog.get_logger(__name__)

RESERVED_DESCRIPTORS = 512  # for the log, for workers that start, for what a library opens
_DESCRIPTORS_EACH = 2  # a connection, and the file that its upload is written to

_CROWDED_LEAST, _CROWDED_MOST = 4, 64

OnFault = Callable[[str, BaseException], None]


class Limits(NamedTuple):
    """How many connections there may be, and how long each may keep us waiting."""

    connections: int
    crowded: int  # beyond those, that can only read health
    head_s: float
    idle_s: float
    stall_s: float

    @classmethod
    def of(cls, settings: Settings, stall_s: float) -> Limits:
        """Those of the settings, where this process may hold as many descriptors."""
        free = descriptors.limit() - RESERVED_DESCRIPTORS
        possible = max(free, descriptors.limit() // 2) // _DESCRIPTORS_EACH
        if possible < settings.max_connections:
            log.warning(
                "connections_limited_by_descriptors", connections=possible, wanted=settings.max_connections
            )
        connections = min(settings.max_connections, possible)
        crowded = max(_CROWDED_LEAST, min(_CROWDED_MOST, connections // 4))
        return cls(connections, crowded, settings.request_head_s, settings.idle_connection_s, stall_s)


class Connection(web.RequestHandler):
    """One connection.

    Invariant: `waits_since_s` is None while a request is there, so whatever it says is how long the client has
    kept us waiting; a wait that begins without a byte of the client is seen by the next look.
    """

    __slots__ = ("_begun", "_on_fault", "_unsent_bytes", "_unsent_since_s", "crowded", "waits_since_s", "wire")

    def __init__(self, server: web.Server, on_fault: OnFault, **options: Any) -> None:
        super().__init__(server, **options)
        self._on_fault = on_fault
        self.crowded = False
        self.waits_since_s: float | None = self._loop.time()
        self.wire: asyncio.Transport | None = None  # until the connection is lost; aiohttp forgets it on closing
        self._begun = False  # a part of a head has come
        self._unsent_bytes = 0
        self._unsent_since_s = 0.0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """The client is there."""
        self.wire = cast(asyncio.Transport, transport)
        super().connection_made(transport)

    def connection_lost(self, exc: BaseException | None) -> None:
        """The client is gone."""
        self.wire = None
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Bytes of the client."""
        heads = self._request_count
        try:
            super().data_received(data)
        except Exception as exc:  # a parser's own failure must end this connection alone
            self._on_fault("http parser", exc)
            self.cut()
            return
        if self._request_count != heads:
            self.waits_since_s, self._begun = None, False
        elif not self._begun and data and self._awaits_head():
            self.waits_since_s, self._begun = self._loop.time(), True

    def resume_reading(self, resume_parser: bool = True) -> None:
        """Read again what comes of a body. aiohttp asks for it with each piece that is taken, paused or not."""
        if self._reading_paused:
            super().resume_reading(resume_parser)

    def enter_crowd(self) -> None:
        """From now on it can only read health: the answer to anything else ends it, whatever it still sends."""
        self.crowded = True
        self.hear_no_more()

    def hear_no_more(self) -> None:
        """What still comes of the present request's body is not waited for: its answer ends the connection."""
        self._lingering_time = 0.0

    def _awaits_head(self) -> bool:
        return self._waiter is not None and not self._waiter.done()

    def look(self, now_s: float, limits: Limits) -> None:
        """End it where it has kept us waiting for too long."""
        if self.wire is None:
            return
        unsent_bytes = self.wire.get_write_buffer_size()
        if unsent_bytes != self._unsent_bytes:
            self._unsent_bytes, self._unsent_since_s = unsent_bytes, now_s
        elif unsent_bytes and now_s - self._unsent_since_s >= limits.stall_s:
            self.cut()
            return
        if self.transport is None or not self._awaits_head():
            return
        if self.waits_since_s is None:
            self.waits_since_s = now_s
        elif now_s - self.waits_since_s >= self._patience_s(limits):
            if self._begun:
                text = f"the head of the request was not complete after {limits.head_s:g} s; send it at once"
                self.tell(Problem(408, text))
            self.force_close()

    def _patience_s(self, limits: Limits) -> float:
        return limits.head_s if self._begun or not self._request_count else limits.idle_s

    def tell(self, problem: Problem) -> None:
        """Answer what is no request yet. Only while no handler is at work."""
        if self.wire is not None:
            self.wire.write(raw_answer(problem))

    def cut(self) -> None:
        """End it at once, with whatever was not sent."""
        wire = self.wire
        self.force_close()
        if wire is not None:
            wire.abort()

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """The answer to what is no HTTP, and to what came through the middleware; it ends the connection."""
        if isinstance(exc, ConnectionError) or request.writer.output_size > 0:
            raise ConnectionError("the caller is gone, or has half of an answer")
        if status < 500:  # `message` quotes what came on lines of its own
            why = (message or "").strip().partition("\n")[0].rstrip(":.") or "it cannot be parsed"
            problem = Problem(status, f"the request is not valid HTTP/1.1: {why}; correct it")
        else:
            self._on_fault("http", exc or RuntimeError(f"an answer of {status}"))
            problem = Problem(503, "the engine itself failed on this request", ReasonCode.ENGINE_FAULT)
        response = error_response(request, problem)
        response.force_close()
        return response

    def log_exception(self, *args: Any, **fields: Any) -> None:
        """What aiohttp would log and forget is a fault of ours."""
        exc = fields.get("exc_info")
        self._on_fault("http connection", exc if isinstance(exc, BaseException) else RuntimeError(*args))
