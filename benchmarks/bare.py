"""The base of the HTTP rows: aiohttp, one handler, nothing else; on uvloop, as `holdfast serve` is.

python -m benchmarks.bare [BYTES]        # with BYTES, a body of that size instead of a small JSON object
"""

from __future__ import annotations

import asyncio
import sys

import uvloop
from aiohttp import web


async def serve(body_bytes: int) -> None:
    """Serve until killed; prints the address."""
    body = b" " * body_bytes

    async def small(_request: web.Request) -> web.Response:
        return web.json_response({"ok": True})

    async def large(_request: web.Request) -> web.Response:
        return web.Response(body=body, content_type="application/json")

    app = web.Application()
    app.router.add_get("/", large if body_bytes else small)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    print(f"bare at http://127.0.0.1:{runner.addresses[0][1]}", flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as _runner:
        _runner.run(serve(int(sys.argv[1]) if len(sys.argv) > 1 else 0))
