"""`POST /v1/plugins/{name}/tools/{tool}/run`: a call, from its body to its outcome.

refused whatever the arguments? → body (spooled) → engine → outcome as JSON, or items as they come
"""

from __future__ import annotations

from contextlib import nullcontext

import structlog
from aiohttp import web

from engine.api import ndjson
from engine.api.answers import state_of, tell, told_response
from engine.api.body import BodyRefused, Spool, read_arguments
from engine.api.budget import Share
from engine.api.connections import Connection
from engine.api.errors import given_request_id
from engine.api.keys import BACKGROUND, BODY_LIMITS, ENGINE, PENDING, STREAMS, UPLOADED
from engine.engine import Engine
from engine.errors import ReasonCode
from engine.outcome import Outcome, Refused, new_request_id
from engine.sandbox.wire import Encoded

log = structlog.get_logger(__name__)

_STALLED = 408


async def run(request: web.Request) -> web.StreamResponse:
    """Run a tool."""
    app = request.app
    engine = app[ENGINE]
    plugin, tool = request.match_info["name"], request.match_info["tool"]
    request_id = given_request_id(request) or new_request_id()
    # Before the body is read: nobody should send a gigabyte to learn that there is no such tool.
    if (refused := engine.refusal(plugin, tool, request_id)) is not None:
        return told_response(tell(refused, engine, plugin))
    with app[STREAMS].place() if ndjson.wanted(request) else nullcontext():
        return await _answer(request, app, plugin, tool, request_id)


async def _answer(
    request: web.Request, app: web.Application, plugin: str, tool: str, request_id: str
) -> web.StreamResponse:
    engine = app[ENGINE]
    spool = Spool(engine.uploads, Share(app[PENDING]), Share(app[UPLOADED]))
    try:
        arguments = await _arguments(request, app, spool)
    except BodyRefused as exc:
        app[BACKGROUND].start(spool.remove())
        refused = Refused(
            error=exc.error,
            error_type=exc.error_type,
            reason_code=exc.reason_code,
            state=state_of(engine, plugin),
            request_id=request_id,
        )
        if exc.status == _STALLED and isinstance(request.protocol, Connection):
            request.protocol.hear_no_more()
        return told_response(tell(refused, engine, plugin), exc.status)
    except BaseException:
        app[BACKGROUND].start(spool.remove())
        raise
    if ndjson.wanted(request):
        call = ndjson.Call(engine, plugin, tool, arguments, request_id)
        return await ndjson.answer(request, call, spool)
    if not spool.lasting:
        spool.release()
        outcome = await engine.run(plugin, tool, arguments, request_id=request_id)
    else:
        call_and_remove = _run(engine, plugin, tool, arguments, request_id, spool)
        outcome = await app[BACKGROUND].run(call_and_remove)
    return told_response(tell(outcome, engine, plugin))


async def _arguments(request: web.Request, app: web.Application, spool: Spool) -> Encoded:
    try:
        return await read_arguments(request, app[BODY_LIMITS], spool)
    except ConnectionError:
        raise
    except OSError as exc:
        engine = app[ENGINE]
        log.error("upload_not_kept", folder=str(engine.scratch_root), error=str(exc))
        engine.note_fault("uploads", exc)
        text = f"the upload cannot be kept ({exc.strerror}); free space in the server's data folder, call again"
        raise BodyRefused(503, ReasonCode.ENGINE_FAULT, "UploadNotKept", text) from exc


async def _run(
    engine: Engine, plugin: str, tool: str, arguments: Encoded, request_id: str, spool: Spool
) -> Outcome:
    """The call, and only then the removal of its files, whether or not somebody still waits for it."""
    try:
        return await engine.run(plugin, tool, arguments, request_id=request_id)
    finally:
        await spool.remove()
