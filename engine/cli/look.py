"""What a running server says: `list`, `health`, `crashes`, `restart`, `events`."""

from __future__ import annotations

import sys
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from typing import Any
from urllib.parse import quote

import msgspec

from engine.cli.console import ExitCode, Failure, note, printable, say, table, write_json, write_raw
from engine.cli.http import Server, lines

_PAGE_EVENTS = 1000  # per request
_SSE = "text/event-stream"
_OUT_OF_SERVICE = ("FAILED", "UNAVAILABLE")


def show_plugins(plugins: Sequence[Mapping[str, Any]], *, brief: bool = False) -> None:
    """All plugins, one per line: what they are, what they did (unless `brief`), why one is not in service."""
    head = ["PLUGIN", "STATE", "REASON"]
    rows = [[str(plugin["name"]), str(plugin["state"]), _why(plugin)] for plugin in plugins]
    if not brief:
        head[2:2] = ["OK", "FAILED", "RUNNING", "PID"]
        for row, plugin in zip(rows, plugins, strict=True):
            row[2:2] = [_cell(plugin[key]) for key in ("success_count", "error_count", "in_flight", "pid")]
    table(head, rows, state_column=1)


def _why(plugin: Mapping[str, Any]) -> str:
    if plugin["reason_code"] is None:
        return plugin["reason"] or ""
    return f"{plugin['reason_code']}: {plugin['reason']}"


async def list_plugins(server: Server, *, json: bool) -> ExitCode:
    """Every plugin's health."""
    async with server:
        plugins = await server.read(list[dict[str, Any]], "GET", "/v1/plugins")
    if json:
        write_json(plugins)
    else:
        show_plugins(plugins)
    return ExitCode.FINE


async def show_health(server: Server, name: str, *, json: bool, restart: bool = False) -> ExitCode:
    """One plugin's health, after a restart if asked; exit 1 where it is not in service."""
    path = f"/v1/plugins/{quote(name, safe='')}/" + ("restart" if restart else "health")
    async with server:
        health = await server.read(dict[str, Any], "POST" if restart else "GET", path)
    if json:
        write_json(health)
    else:
        rows = [(key, _cell(value)) for key, value in health.items()]
        table(("FIELD", "VALUE"), rows)
    return ExitCode.PLUGIN_FAILED if health["state"] in _OUT_OF_SERVICE else ExitCode.FINE


async def show_crashes(server: Server, name: str, *, json: bool) -> ExitCode:
    """How a plugin's workers died, the newest first."""
    async with server:
        crashes = await server.read(list[dict[str, Any]], "GET", f"/v1/plugins/{quote(name, safe='')}/crashes")
    if json:
        write_json(crashes)
    else:
        head = ("TIME", "BY", "EXIT", "DURING", "RAN_MS", "PEAK_MIB", "INCARNATION", "PID", "REASON")
        table(head, [_crash_row(crash) for crash in crashes])
    return ExitCode.FINE


def _crash_row(crash: Mapping[str, Any]) -> list[str]:
    ended = crash["exit_code"] if crash["signal"] is None else crash["signal"]
    peak_mib = crash["memory"]["peak_bytes"] // (1024 * 1024)
    ran_ms = None if crash["ran_ms"] is None else round(crash["ran_ms"])
    numbers = (ran_ms, peak_mib, crash["incarnation"], crash["pid"])
    return [crash["time"], crash["by"], *map(_cell, (ended, crash["doing"], *numbers)), _why(crash)]


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, list):
        return ", ".join(map(_cell, value))
    return value if isinstance(value, str) else _json(value)


def _json(value: Any) -> str:
    return f"{value:.7g}" if isinstance(value, float) else msgspec.json.encode(value).decode()


async def show_events(server: Server, *, after: int, plugin: str | None, follow: bool, json: bool) -> ExitCode:
    """The log's events from number `after` on, and then those to come."""
    async with server:
        if plugin:
            await _warn_of_unknown(server, plugin, follow)
        # Closed here, not by whoever finds it: `| head` ends us in the middle of it.
        async with aclosing(
            _following(server, after, plugin) if follow else _pages(server, after, plugin)
        ) as source:
            async for raw in source:
                if json:
                    write_raw(raw + b"\n")
                else:
                    say(_event_line(msgspec.json.decode(raw)))
    return ExitCode.FINE


async def _warn_of_unknown(server: Server, plugin: str, follow: bool) -> None:
    """A name that is not known may come, or be in the log; or it is misspelt, and would be waited for in vain."""
    async with server.request("GET", f"/v1/plugins/{quote(plugin, safe='')}/health") as response:
        if response.status == 404:
            step = "waiting for it all the same" if follow else "this is what the log has of it"
            note(f"{server.failure(404, await response.read())} ({step})")


class _Page(msgspec.Struct):
    events: list[msgspec.Raw]
    next: int


async def _pages(server: Server, after: int, plugin: str | None) -> AsyncGenerator[bytes, None]:
    while True:
        query = {"after": str(after), "limit": str(_PAGE_EVENTS), **({"plugin": plugin} if plugin else {})}
        page = await server.read(_Page, "GET", "/v1/events", params=query, headers={"Accept": "application/json"})
        for event in page.events:
            yield bytes(event)
        if page.next <= after:
            return
        after = page.next


async def _following(server: Server, after: int, plugin: str | None) -> AsyncGenerator[bytes, None]:
    """Server-sent events. A connection that ends after it brought something is taken up again, by number."""
    began = after
    while True:
        before = after
        try:
            async with aclosing(_stream(server, before, plugin)) as stream:
                async for number, event in stream:
                    after = number
                    yield event
        except Failure as failure:
            if failure.code is not ExitCode.NO_SERVER or after == began:
                raise
        if after == before:
            text = f"{server.url} ended the stream of events; when it is back, go on with --after {after}"
            raise Failure(ExitCode.NO_SERVER, text)


async def _stream(server: Server, after: int, plugin: str | None) -> AsyncGenerator[tuple[int, bytes], None]:
    """One connection's events, with their numbers."""
    query = {"after": str(after), **({"plugin": plugin} if plugin else {})}
    async with server.request("GET", "/v1/events", params=query, headers={"Accept": _SSE}) as response:
        if response.status != 200 or response.content_type != _SSE:
            raise server.failure(response.status, await response.read())
        async for line in lines(response):
            field, _, value = line.partition(b":")
            if field == b"id":
                after = int(value)
            elif field == b"data":
                yield after, value.removeprefix(b" ")


_SHOWN_FIRST = ("from", "to", "tool", "ok", "verdict", "reason_code", "reason", "message")


def _event_line(event: Mapping[str, Any]) -> str:
    """`12:00:01.123456  41  motion_tracker  plugin.transition  from=LOADED to=FAILED …`."""
    time = str(event["time"])
    shown = time.partition("T")[2].rstrip("Z") if sys.stdout.isatty() else time
    data = event["data"]
    names = [
        *(name for name in _SHOWN_FIRST if name in data),
        *(name for name in data if name not in _SHOWN_FIRST),
    ]
    details = " ".join(f"{name}={_detail(data[name])}" for name in names if data[name] is not None)
    kind = str(event["type"]).removeprefix("holdfast.")
    return printable(f"{shown}  {event['sequence']}  {event.get('subject') or '-'}  {kind}  {details}")


def _detail(value: Any) -> str:
    return value if isinstance(value, str) and value and not set(value) & set(' "=') else _json(value)
