"""The bases of the HTTP rows: aiohttp with one handler, on uvloop, as `holdfast serve` is.

python -m benchmarks.bare [BYTES]        # a small JSON object, or a body of so many bytes
python -m benchmarks.bare calls FOLDER   # `POST /` calls another process, and the folder gets its events
"""

from __future__ import annotations

import asyncio
import socket
import sys
from pathlib import Path

import uvloop
from aiohttp import web
from aiohttp.typedefs import Handler

from benchmarks.least import Caller, Keeper, answering


async def serve(method: str, handler: Handler) -> None:
    """Serve until killed; prints the address."""
    app = web.Application()
    app.router.add_route(method, "/", handler)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    print(f"bare at http://127.0.0.1:{runner.addresses[0][1]}", flush=True)
    await asyncio.Event().wait()


async def serve_body(body_bytes: int) -> None:
    """Answer with a body of that size; 0: with a small JSON object."""
    body = b" " * body_bytes

    async def small(_request: web.Request) -> web.Response:
        return web.json_response({"ok": True})

    async def large(_request: web.Request) -> web.Response:
        return web.Response(body=body, content_type="application/json")

    await serve("GET", large if body_bytes else small)


async def serve_calls(end: socket.socket, folder: Path) -> None:
    """Answer with what another process says to the `n` of a JSON object."""
    with Keeper(folder) as keeper:
        caller = await Caller.connect(end, keeper)

        async def call(request: web.Request) -> web.Response:
            arguments = await request.json()
            return web.json_response({"ok": True, "value": await caller.call(arguments["n"])})

        await serve("POST", call)


if __name__ == "__main__":
    if sys.argv[1:2] == ["calls"]:
        with answering() as _end, asyncio.Runner(loop_factory=uvloop.new_event_loop) as _runner:
            _runner.run(serve_calls(_end, Path(sys.argv[2])))
    else:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as _runner:
            _runner.run(serve_body(int(sys.argv[1]) if len(sys.argv) > 1 else 0))
