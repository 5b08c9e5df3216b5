"""`POST /v1/plugins/{name}/tools/{tool}/run`: a call, from its body to its outcome.

refused whatever the arguments? → body (spooled) → engine → outcome as JSON, or items as they come
"""

from __future__ import annotations

import uuid
from contextlib import nullcontext

import structlog
from aiohttp import web

from engine.api import ndjson
from engine.api.answers import state_of, tell, told_response
from engine.api.body import BodyLimits, BodyRefused, Spool, read_arguments
from engine.api.budget import Share
from engine.api.connections import Connection
from engine.api.errors import given_request_id
from engine.api.keys import BACKGROUND, ENGINE, PENDING, STALL_S, STREAMS, UPLOADED
from engine.engine import Engine
from engine.errors import ReasonCode
from engine.outcome import Outcome, Refused
from engine.sandbox.wire import Encoded

log = structlog.get_logger(__name__)

_STALLED = 408


async def run(request: web.Request) -> web.StreamResponse:
    """Run a tool."""
    engine = request.app[ENGINE]
    plugin, tool = request.match_info["name"], request.match_info["tool"]
    request_id = given_request_id(request) or uuid.uuid4().hex
    # Before the body is read: nobody should send a gigabyte to learn that there is no such tool.
    if (refused := engine.refusal(plugin, tool, request_id)) is not None:
        return told_response(tell(refused, refused.state))
    with request.app[STREAMS].place() if ndjson.wanted(request) else nullcontext():
        return await _answer(request, engine, plugin, tool, request_id)


async def _answer(
    request: web.Request, engine: Engine, plugin: str, tool: str, request_id: str
) -> web.StreamResponse:
    spool = Spool(engine.uploads, Share(request.app[PENDING]), Share(request.app[UPLOADED]))
    try:
        arguments = await _arguments(request, engine, spool)
    except BodyRefused as exc:
        request.app[BACKGROUND].start(spool.remove())
        refused = Refused(
            error=exc.error,
            error_type=exc.error_type,
            reason_code=exc.reason_code,
            state=state_of(engine, plugin),
            request_id=request_id,
        )
        if exc.status == _STALLED and isinstance(request.protocol, Connection):
            request.protocol.hear_no_more()
        return told_response(tell(refused, refused.state), exc.status)
    except BaseException:
        request.app[BACKGROUND].start(spool.remove())
        raise
    if ndjson.wanted(request):
        call = ndjson.Call(engine, plugin, tool, arguments, request_id)
        return await ndjson.answer(request, call, spool)
    if not spool.lasting:
        spool.release()
        outcome = await engine.run(plugin, tool, arguments, request_id=request_id)
    else:
        call_and_remove = _run(engine, plugin, tool, arguments, request_id, spool)
        outcome = await request.app[BACKGROUND].run(call_and_remove)
    return told_response(tell(outcome, state_of(engine, plugin)))


async def _arguments(request: web.Request, engine: Engine, spool: Spool) -> Encoded:
    settings = engine.settings
    limits = BodyLimits.of(settings, request.app[STALL_S])
    try:
        return await read_arguments(request, limits, spool)
    except ConnectionError:
        raise
    except OSError as exc:
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
