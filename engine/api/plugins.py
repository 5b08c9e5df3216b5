"""The plugins' own routes. Those that read, read the projection: no plugin and no writer can make them fail."""

from __future__ import annotations

from typing import Any

import msgspec
from aiohttp import web

from engine.api.errors import Problem
from engine.api.keys import ENGINE
from engine.api.response import Response
from engine.errors import ReasonCode, SetupError

_encoder = msgspec.json.Encoder()


def _json(value: Any) -> Response:
    return Response(_encoder.encode(value))


async def list_plugins(request: web.Request) -> Response:
    """The health of every plugin."""
    return Response(request.app[ENGINE].plugins_json())


async def describe(request: web.Request) -> Response:
    """A plugin's manifest, tools and checks."""
    return _json(request.app[ENGINE].describe(request.match_info["name"]))


async def health(request: web.Request) -> Response:
    """A plugin's health."""
    return Response(request.app[ENGINE].health_json(request.match_info["name"]))


async def crashes(request: web.Request) -> Response:
    """How a plugin's workers died."""
    return _json(await request.app[ENGINE].crashes(request.match_info["name"]))


async def restart(request: web.Request) -> Response:
    """End the plugin's incarnation and begin the next; answers once that has settled."""
    try:
        return _json(await request.app[ENGINE].restart(request.match_info["name"]))
    except SetupError as exc:
        raise Problem(503, str(exc), ReasonCode.ENGINE_STOPPING) from exc
