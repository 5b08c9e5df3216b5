"""The plugins' own routes. Those that read, read the projection: no plugin and no writer can make them fail."""

from __future__ import annotations

from typing import Any

import msgspec
from aiohttp import web

from engine.api.errors import JSON_TYPE, Problem
from engine.api.keys import ENGINE
from engine.errors import ReasonCode, SetupError

_encoder = msgspec.json.Encoder()


def _json(value: Any) -> web.Response:
    return web.Response(body=_encoder.encode(value), content_type=JSON_TYPE)


async def list_plugins(request: web.Request) -> web.Response:
    """The health of every plugin."""
    return _json(request.app[ENGINE].plugins())


async def describe(request: web.Request) -> web.Response:
    """A plugin's manifest, tools and checks."""
    return _json(request.app[ENGINE].describe(request.match_info["name"]))


async def health(request: web.Request) -> web.Response:
    """A plugin's health."""
    return _json(request.app[ENGINE].health(request.match_info["name"]))


async def crashes(request: web.Request) -> web.Response:
    """How a plugin's workers died."""
    return _json(await request.app[ENGINE].crashes(request.match_info["name"]))


async def restart(request: web.Request) -> web.Response:
    """End the plugin's incarnation and begin the next; answers once that has settled."""
    try:
        return _json(await request.app[ENGINE].restart(request.match_info["name"]))
    except SetupError as exc:
        raise Problem(503, str(exc), ReasonCode.ENGINE_STOPPING) from exc
