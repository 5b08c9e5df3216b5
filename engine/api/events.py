"""`GET /v1/events`: the log as it grows, as server-sent events; or a page of it, as JSON.

    id: 4711
    event: holdfast.plugin.transition
    data: {"specversion": "1.0", …}          the very bytes of the log

Nothing is sent before it is durable, and a reader is a number: whoever comes back with the last `id` it saw
misses nothing and gets nothing twice.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Iterable
from difflib import get_close_matches

import msgspec
import structlog
from aiohttp import web

from engine.api.errors import Problem, bad_input
from engine.api.keys import ENGINE, KEEP_ALIVE_S, STALL_S, STREAMS
from engine.api.outlet import Outlet
from engine.api.response import JSON_TYPE, Response
from engine.errors import ReasonCode
from events.cursor import Cursor, Filter
from events.envelope import EVENT_TYPES, TYPE_PREFIX, CloudEvent
from events.log import CorruptLog, LogClosed, LogUnavailable, Record

log = structlog.get_logger(__name__)

SSE_TYPE = "text/event-stream"
DEFAULT_LIMIT = 100
MAX_LIMIT = 1000
_RETRY = b"retry: 1000\n\n"  # milliseconds until a reader that lost its connection comes back
_KEEP_ALIVE = b": keep-alive\n\n"
_LAST_S = 1.0  # for the last events to be read, once the server stops
_MAX_DIGITS = 18  # of a number in a query: all of SQLite's fit


class EventPage(msgspec.Struct, frozen=True):
    """A page of the log. Ask for `?after=<next>` to go on, with the same filters."""

    events: list[CloudEvent]
    next: int


async def events(request: web.Request) -> web.StreamResponse:
    """Events after a number: replayed, then live; or a page of them."""
    chosen = Filter.of(request.query.getall("plugin", None), _types(request.query.getall("type", [])))
    if _wants_page(request):
        return await _page(request, chosen)
    return await _stream(request, chosen)


def _wants_page(request: web.Request) -> bool:
    accept = request.headers.get("Accept", "")
    return JSON_TYPE in accept and SSE_TYPE not in accept


def _types(names: Iterable[str]) -> list[str] | None:
    """The event types asked for, without their prefix; None is all."""
    wanted = [name.removeprefix(TYPE_PREFIX) for name in names]
    for name in wanted:
        if name not in EVENT_TYPES:
            near = get_close_matches(name, EVENT_TYPES, 1, 0.0)[0]
            raise bad_input(f"there is no event type `{name}`; the nearest is `{near}`")
    return wanted or None


def _number(name: str, text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) <= _MAX_DIGITS):
        raise bad_input(f"`{name}` must be a whole number from 0 on, not `{text[:40]}`")
    return int(text)


async def _page(request: web.Request, chosen: Filter) -> Response:
    query = request.query
    after = _number("after", query.get("after", "0"))
    limit = _number("limit", query.get("limit", str(DEFAULT_LIMIT)))
    if not 1 <= limit <= MAX_LIMIT:
        raise bad_input(f"`limit` must be from 1 to {MAX_LIMIT}, not {limit}")
    try:
        page = await asyncio.to_thread(request.app[ENGINE].log.read, after, limit, chosen)
    except (LogUnavailable, CorruptLog, LogClosed) as exc:
        raise _unreadable(exc) from exc
    body = b'{"events":[%b],"next":%d}' % (b",".join(record.json for record in page.records), page.position)
    return Response(body)


def _unreadable(exc: Exception) -> Problem:
    log.error("events_unreadable", error=str(exc))
    code = ReasonCode.ENGINE_STOPPING if isinstance(exc, LogClosed) else ReasonCode.ENGINE_FAULT
    return Problem(503, "the event log cannot be read now; see /readyz?verbose, ask again", code)


async def _stream(request: web.Request, chosen: Filter) -> web.StreamResponse:
    engine, streams = request.app[ENGINE], request.app[STREAMS]
    # An empty header is what some readers send before they have seen anything.
    if last_id := request.headers.get("Last-Event-ID"):
        after: int | None = _number("Last-Event-ID", last_id)
    else:
        after = _number("after", request.query["after"]) if "after" in request.query else None
    if streams.stopping or engine.log.closed:
        raise Problem(503, "the engine is stopping; follow the next one", ReasonCode.ENGINE_STOPPING)
    with streams.place():
        cursor = engine.log.subscribe(after, subjects=chosen.subjects, types=chosen.types)
        outlet = Outlet(request, SSE_TYPE, request.app[STALL_S], {"Cache-Control": "no-store"})
        async with outlet:
            await outlet.send(_RETRY)
            await _follow(request, cursor, outlet)
    return outlet.response


async def _follow(request: web.Request, cursor: Cursor, outlet: Outlet) -> None:
    """Send every batch, until the log ends, or the server: then what is durable by that time."""
    streams, patience_s = request.app[STREAMS], request.app[KEEP_ALIVE_S]
    end = math.inf
    while cursor.position < end:
        if streams.stopping and end == math.inf:
            end, patience_s = request.app[ENGINE].log.durable, _LAST_S
            continue
        try:
            batch = await streams.wait(anext(cursor), patience_s)
        except StopAsyncIteration:
            return
        except TimeoutError:
            if end < math.inf:  # what is left passes no filter of this reader's
                return
            if not streams.stopping:
                await outlet.send(_KEEP_ALIVE)
        except (LogUnavailable, CorruptLog) as exc:  # the reader comes back, by number, and misses nothing
            log.error("events_unreadable", error=str(exc))
            return
        else:
            await outlet.send(b"".join(map(_event, batch)))
            if not cursor.behind:  # a replay is not held up
                await asyncio.sleep(streams.linger_s)


def _event(record: Record) -> bytes:
    kind = (TYPE_PREFIX + record.type).encode()
    return b"id: %d\nevent: %b\ndata: %b\n\n" % (record.sequence, kind, record.json)
