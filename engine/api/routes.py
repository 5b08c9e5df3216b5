"""The table of all routes. A route that is not in it does not exist; one that is, is documented."""

from __future__ import annotations

from typing import Any

from engine.api import events, ndjson, plugins, probes, run
from engine.api.answers import FailedCall
from engine.api.errors import ErrorBody
from engine.api.openapi import Answer, Parameter, Route
from engine.api.response import JSON_TYPE
from engine.api.tokens import Role
from engine.crashes import Crash
from engine.description import PluginDescription
from engine.outcome import Completed
from events.envelope import EVENT_TYPES
from events.projections import Health

_TEXT: dict[str, Any] = {"type": "string"}
_NUMBER: dict[str, Any] = {"type": "integer", "minimum": 0, "maximum": 10**18 - 1}
_LIST: dict[str, Any] = {"type": "array", "items": _TEXT}

_NAME = Parameter("path", "name", "The plugin's name.")
_TOOL = Parameter("path", "tool", "The tool's name.")
_REQUEST_ID = Parameter(
    "header",
    "X-Request-Id",
    "Stands in the call's events and in its outcome; made up if not given.",
    {"type": "string", "pattern": "^[!-~]{1,128}$"},
)
_UNKNOWN = Answer(404, "There is no such plugin; names the nearest.")
_FAILED = {JSON_TYPE: FailedCall}

_FOLLOW = (
    Parameter("query", "after", "Events after this number. A stream begins now by default, a page at 0.", _NUMBER),
    Parameter("query", "limit", "Of a page.", {"type": "integer", "minimum": 1, "maximum": events.MAX_LIMIT}),
    Parameter("query", "plugin", "Only of these plugins.", _LIST),
    Parameter(
        "query",
        "type",
        f"Only of these types, with or without the prefix `holdfast.`: {', '.join(EVENT_TYPES)}.",
        {"type": "array", "items": {"type": "string", "enum": list(EVENT_TYPES)}},
    ),
    Parameter("header", "Last-Event-ID", "Of a stream: go on after this one. Wins over `after`.", _NUMBER),
)

_RUN_ANSWERS = (
    Answer(
        200,
        "The tool's result. As NDJSON: lines of `item` and `progress`, and last one of `outcome`.",
        {JSON_TYPE: Completed, ndjson.CONTENT_TYPE: _TEXT},
        headers=("X-Request-Id",),
    ),
    Answer(404, "There is no such plugin or tool; names the nearest.", _FAILED),
    Answer(408, "The body stopped coming, or came too slowly.", _FAILED),
    Answer(413, "The body is too large, or a streaming tool's items are too many for one value.", _FAILED),
    Answer(415, "The content type is neither JSON nor a form, or the body is packed.", _FAILED),
    Answer(
        422, "Bad input: names the argument, what it wants and what came.", {JSON_TYPE: (FailedCall, ErrorBody)}
    ),
    Answer(429, "Too many calls wait for this plugin.", _FAILED, headers=("Retry-After",)),
    Answer(502, "The plugin broke on this call, and is FAILED now.", _FAILED),
    Answer(
        503,
        "The plugin is not in service, with its reason; or the server has no room now, with `Retry-After`.",
        {JSON_TYPE: (FailedCall, ErrorBody)},
    ),
    Answer(504, "The tool ran past its deadline, and the plugin is FAILED now.", _FAILED),
)
# An object of the tool's arguments by name; each tool's own JSON Schema is in the plugin's description.
_RUN_BODY = {
    JSON_TYPE: {"type": "object", "description": "The tool's arguments by name."},
    "multipart/form-data": {
        "type": "object",
        "description": "The tool's arguments by name: text as JSON or as it is, files as files.",
        "additionalProperties": {"type": "string"},
    },
}

_LIST_ANSWERS = (Answer(200, "All plugins, in whatever state they are.", {JSON_TYPE: list[Health]}),)

# The router tries them in this order, where they begin alike: first what is asked for most, and should take least.
ROUTES = (
    Route(
        "GET",
        "/v1/plugins/{name}/health",
        plugins.health,
        "plugin_health",
        "Health of one plugin.",
        (Answer(200, "Its health, in whatever state it is.", {JSON_TYPE: Health}), _UNKNOWN),
        (_NAME,),
    ),
    Route(
        "POST",
        "/v1/plugins/{name}/tools/{tool}/run",
        run.run,
        "run_tool",
        "Run a tool; with `Accept: application/x-ndjson`, its items as they come.",
        _RUN_ANSWERS,
        (_NAME, _TOOL, _REQUEST_ID),
        _RUN_BODY,
        role=Role.RUN,
    ),
    Route("GET", "/v1/plugins", plugins.list_plugins, "list_plugins", "Health of every plugin.", _LIST_ANSWERS),
    Route(
        "GET", "/v1/plugins/", plugins.list_plugins, "list_plugins_slash", "As without the slash.", _LIST_ANSWERS
    ),
    Route(
        "GET",
        "/v1/plugins/{name}",
        plugins.describe,
        "describe_plugin",
        "A plugin's manifest, its tools with their JSON Schemas, and what the checks found.",
        (Answer(200, "The plugin.", {JSON_TYPE: PluginDescription}), _UNKNOWN),
        (_NAME,),
    ),
    Route(
        "GET",
        "/v1/plugins/{name}/crashes",
        plugins.crashes,
        "plugin_crashes",
        "How a plugin's workers died, with the evidence; the newest first.",
        (
            Answer(200, "Its crash bundles; none is an empty array.", {JSON_TYPE: list[Crash]}),
            _UNKNOWN,
            Answer(503, "The server's connections are all at work; retry."),
        ),
        (_NAME,),
    ),
    Route(
        "POST",
        "/v1/plugins/{name}/restart",
        plugins.restart,
        "restart_plugin",
        "Begin the plugin's next incarnation, read again from disk.",
        (
            Answer(200, "Its health, once it has settled.", {JSON_TYPE: Health}),
            _UNKNOWN,
            Answer(503, "The engine is stopping, or the server's connections are all at work."),
        ),
        (_NAME,),
        role=Role.ADMIN,
    ),
    Route(
        "GET",
        "/v1/events",
        events.events,
        "events",
        "The events, replayed and live; with `Accept: application/json`, a page of them.",
        (
            Answer(200, "Events.", {events.SSE_TYPE: _TEXT, JSON_TYPE: events.EventPage}),
            Answer(422, "A bad number, or an unknown event type; names the nearest."),
            Answer(503, "The event log cannot be read now, the engine is stopping, or all streams are open."),
        ),
        _FOLLOW,
        endless=True,
    ),
    Route(
        "GET",
        "/livez",
        probes.livez,
        "livez",
        "Whether the process answers.",
        (Answer(200, "It does.", {JSON_TYPE: probes.Liveness}),),
        open=True,
    ),
    Route(
        "GET",
        "/readyz",
        probes.readyz,
        "readyz",
        "Whether calls are taken and events are kept. No plugin's failure counts.",
        (
            Answer(200, "Ready.", {JSON_TYPE: probes.Readiness}),
            Answer(503, "Starting, stopping, or a part of the engine is not well.", {JSON_TYPE: probes.Readiness}),
        ),
        (Parameter("query", "verbose", "Lists the parts; needs the token."),),
        open=True,
    ),
    Route(
        "GET",
        "/metrics",
        probes.metrics,
        "metrics",
        "Prometheus metrics.",
        (Answer(200, "In the Prometheus text format.", {"text/plain": _TEXT}),),
    ),
)
