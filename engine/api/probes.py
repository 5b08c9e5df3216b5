"""For those who run the server: is it alive, is it ready, how is it doing."""

from __future__ import annotations

import msgspec
from aiohttp import web

from engine.api.keys import ENGINE
from engine.api.response import Response
from engine.engine import Part

_encoder = msgspec.json.Encoder()


class Liveness(msgspec.Struct, frozen=True):
    """The event loop runs."""

    alive: bool = True


class Readiness(msgspec.Struct, frozen=True, omit_defaults=True):
    """Whether calls are taken and events are kept; the parts only where asked for."""

    ready: bool
    parts: tuple[Part, ...] | None = None


_ALIVE = _encoder.encode(Liveness())


async def livez(_request: web.Request) -> Response:
    """Whether the event loop runs."""
    return Response(_ALIVE)


async def readyz(request: web.Request) -> Response:
    """Whether calls are taken; no plugin's failure counts."""
    parts = request.app[ENGINE].parts()
    ready = all(part.ok for part in parts)
    shown = tuple(parts) if "verbose" in request.query else None
    body = _encoder.encode(Readiness(ready, shown))
    return Response(body, status=200 if ready else 503)


async def metrics(request: web.Request) -> Response:
    """Prometheus text."""
    body, content_type = request.app[ENGINE].metrics.render()
    return Response(body, content_type=content_type)
