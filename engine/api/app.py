"""The server: an application around an engine, and how both start and stop.

bind → open (health is there) → answer, announce → settle → … signal → drain → close → exit
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import structlog
from aiohttp import web

from engine import descriptors
from engine.api.body import BodyLimits
from engine.api.budget import Budget
from engine.api.guard import is_loopback, middleware
from engine.api.keys import (
    BACKGROUND,
    BODY_LIMITS,
    ENGINE,
    KEEP_ALIVE_S,
    PENDING,
    STALL_S,
    STREAMS,
    UPLOADED,
    Background,
    Streams,
)
from engine.api.openapi import Answer, Route, document
from engine.api.response import JSON_TYPE, Response
from engine.api.routes import ROUTES
from engine.api.server import Runner
from engine.api.tokens import Tokens
from engine.engine import VERSION, Engine
from engine.errors import SetupError
from engine.sandbox import priority
from engine.settings import Settings

log = structlog.get_logger(__name__)

KEEP_ALIVE_DEFAULT_S = 15.0
_FINISH_S = 5.0  # for answers that are still going out when the engine has closed
_BACKLOG = 1024

Announce = Callable[[Engine, str], None]
Settled = Callable[[Engine], None]


def all_routes() -> tuple[Route, ...]:
    """Every route there is: the table, and the document made of it."""
    text = "This document: OpenAPI 3.1."
    answers = (Answer(200, "The document.", {JSON_TYPE: {"type": "object"}}),)
    openapi = Route("GET", "/openapi.json", _openapi, "openapi", text, answers)
    return (*ROUTES, openapi)


async def _openapi(request: web.Request) -> Response:
    return Response(request.app[_DOCUMENT])


_DOCUMENT = web.AppKey("openapi", bytes)


def create_app(engine: Engine, tokens: Tokens) -> web.Application:
    """The HTTP side of an engine that is open. Opening, settling and closing it is the caller's.

    Args:
        engine: that is open.
        tokens: who may ask.
    """
    routes = all_routes()
    app = web.Application(middlewares=[middleware(engine, tokens, {(r.method, r.path): r.role for r in routes})])
    app[ENGINE] = engine
    app[BACKGROUND] = Background()
    settings = engine.settings
    app[STREAMS] = Streams(settings.max_streams)
    # One call alone may always have what its own limit allows.
    app[PENDING] = Budget(max(settings.max_pending_bytes, settings.max_json_bytes), "max_pending_bytes")
    app[UPLOADED] = Budget(max(settings.max_uploads_bytes, settings.max_body_bytes), "max_uploads_bytes")
    app[KEEP_ALIVE_S] = KEEP_ALIVE_DEFAULT_S
    app[STALL_S] = settings.stream_stall_s
    app[_DOCUMENT] = document(routes, VERSION)
    for route in routes:
        app.router.add_route(route.method, route.path, route.handler)
        if route.method == "GET" and not route.endless:
            app.router.add_route("HEAD", route.path, route.handler)
    app.on_startup.append(_set_limits)
    app.on_shutdown.append(_end_streams)
    app.on_cleanup.append(_end_background)
    return app


async def _set_limits(app: web.Application) -> None:
    app[BODY_LIMITS] = BodyLimits.of(app[ENGINE].settings, app[STALL_S])


async def _end_streams(app: web.Application) -> None:
    app[STREAMS].stop()


async def _end_background(app: web.Application) -> None:
    await app[BACKGROUND].close()


async def serve(settings: Settings, *, announce: Announce | None = None, settled: Settled | None = None) -> int:
    """Run a server until SIGTERM or SIGINT; a second one ends the process at once.

    Args:
        settings: of the engine and the server.
        announce: is called with the engine and the server's URL once it answers; plugins are still starting.
        settled: is called with the engine once every plugin has settled.

    Returns:
        The process's exit status.

    Raises:
        SetupError: it cannot start as asked; one line, with the next step.
    """
    descriptors.raise_limit()
    await asyncio.to_thread(priority.set_process, priority.SERVER)
    await _start_threads()
    tokens = await asyncio.to_thread(Tokens, settings)
    with contextlib.closing(await asyncio.to_thread(bind, settings)) as listener:
        engine = Engine(settings)
        with _signals() as stop:
            await engine.open()
            async with contextlib.AsyncExitStack() as stack:
                stack.push_async_callback(engine.close)
                app = create_app(engine, tokens)
                runner = Runner(app, handler_cancellation=True, shutdown_timeout=_FINISH_S)
                await runner.setup()
                await web.SockSite(runner, listener, backlog=_BACKLOG).start()
                # The server answers on while the engine drains: calls in flight get their answers, new ones 503.
                stack.push_async_callback(runner.cleanup)
                stack.push_async_callback(engine.close)
                if announce is not None:
                    announce(engine, _url(settings, listener))
                await _until_stopped(engine, settled, stop)
    return 0


async def _start_threads() -> None:
    """Have the threads for blocking work while there are some to be had: a plugin may take the last."""
    count = min(32, (os.cpu_count() or 1) + 4)
    together = threading.Barrier(count)  # so that each takes a thread of its own
    asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(count, "holdfast"))
    await asyncio.gather(*(asyncio.to_thread(together.wait) for _ in range(count)))


async def _until_stopped(engine: Engine, settled: Settled | None, stop: asyncio.Event) -> None:
    stopped = asyncio.create_task(stop.wait())
    settling = asyncio.create_task(engine.settle())
    try:
        await asyncio.wait({stopped, settling}, return_when=asyncio.FIRST_COMPLETED)
        if settling.done():
            await settling
            if settled is not None:
                settled(engine)
            await stopped
    finally:
        stopped.cancel()
        settling.cancel()


@contextlib.contextmanager
def _signals() -> Iterator[asyncio.Event]:
    """An event that the first signal sets."""
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()

    def on_signal(number: signal.Signals) -> None:
        if stop.is_set():
            log.warning("ended_at_once", signal=number.name)
            os._exit(1)  # the fork server sees it, ends the workers and removes what they left
        log.info("stopping", signal=number.name)
        stop.set()

    numbers = (signal.SIGTERM, signal.SIGINT)
    for number in numbers:
        loop.add_signal_handler(number, on_signal, number)
    try:
        yield stop
    finally:
        for number in numbers:
            loop.remove_signal_handler(number)


def bind(settings: Settings) -> socket.socket:
    """The listening socket; taken before anything is started. Blocking, where a name has to be looked up.

    Raises:
        SetupError: the address cannot be had, or is open to others without a token.
    """
    where = f"{settings.host}:{settings.port}"
    if not 0 <= settings.port <= 65535:  # the resolver takes others, and cuts them
        raise SetupError(f"the port {settings.port} does not exist; choose one from 1 to 65535, or 0 for any")
    try:
        found = socket.getaddrinfo(settings.host, settings.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, protocol, _, address = min(found, key=lambda info: info[0] != socket.AF_INET)
    except (OSError, UnicodeError, OverflowError) as exc:
        raise SetupError(
            f"the host `{settings.host}` is not known ({exc}); choose an address of this machine"
        ) from exc
    if not is_loopback(str(address[0])) and not settings.token and settings.token_file is None:
        raise SetupError(f"{where} can be reached by others; set a token or a token_file, or bind to 127.0.0.1")
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(_BACKLOG)
        listener.setblocking(False)
    except (OSError, OverflowError) as exc:
        listener.close()
        why = exc.strerror if isinstance(exc, OSError) else str(exc)
        raise SetupError(f"cannot listen on {where}: {why}; stop what uses it, or choose another port") from exc
    return listener


def _url(settings: Settings, listener: socket.socket) -> str:
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    return f"http://{host}:{listener.getsockname()[1]}"
