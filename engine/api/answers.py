"""A call's outcome as an answer: its status, its headers, its JSON."""

from __future__ import annotations

from typing import Any, NamedTuple

import msgspec

from engine.api.errors import REQUEST_ID, printable
from engine.api.response import Response
from engine.engine import Engine
from engine.errors import ReasonCode, UnknownPlugin
from engine.outcome import Broke, Completed, Outcome, Refused, encode_hook

RETRY_AFTER_S = 1  # for a full queue: the next call's end is the next place

# What a refused call answers; whatever is not named here means "not in service now".
_REFUSED = {
    ReasonCode.UNKNOWN_PLUGIN: 404,
    ReasonCode.UNKNOWN_TOOL: 404,
    ReasonCode.INPUT_TOO_LARGE: 413,
    ReasonCode.BAD_INPUT: 422,
    ReasonCode.QUEUE_FULL: 429,
}
_NOT_IN_SERVICE = 503
_ITEMS_TOO_MANY = "ResultTooLarge"  # of a streaming tool, collected into one value; the plugin is fine

_encoder = msgspec.json.Encoder(enc_hook=encode_hook)


class FailedCall(msgspec.Struct, frozen=True, kw_only=True):
    """A call without a result. No traceback: that is in the plugin's reason and in the log."""

    ok: bool = False
    error: str  # fact, cause, next step
    error_type: str
    reason_code: ReasonCode
    state: str | None  # the plugin's; null where there is no such plugin
    request_id: str


def status_of(outcome: Outcome) -> int:
    """The HTTP status of an outcome."""
    match outcome:
        case Completed():
            return 200
        case Broke(reason_code=ReasonCode.TOOL_TIMEOUT):
            return 504
        case Broke():
            return 502
        # A plugin that FAILED by a result too large refuses with the same code, but another type.
        case Refused(reason_code=ReasonCode.RESULT_TOO_LARGE, error_type=kind) if kind == _ITEMS_TOO_MANY:
            return 413
        case Refused(reason_code=code):
            return _REFUSED.get(code, _NOT_IN_SERVICE)


class Told(NamedTuple):
    """An outcome as the caller is told it: `result_invalid` where its value turned out to have no JSON form."""

    outcome: Outcome
    body: bytes

    @property
    def status(self) -> int:
        """Of HTTP."""
        return status_of(self.outcome)


def tell(outcome: Outcome, engine: Engine, plugin: str) -> Told:
    """The JSON of the outcome of a call of `plugin`."""
    if isinstance(outcome, Completed):
        try:
            return Told(outcome, _encoder.encode(outcome))
        except Exception as exc:  # a worker's value may be anything that MessagePack can hold
            outcome = no_json(exc, state_of(engine, plugin), outcome.request_id)
    failed = FailedCall(
        error=printable(outcome.error),
        error_type=outcome.error_type,
        reason_code=outcome.reason_code,
        state=outcome.state,
        request_id=outcome.request_id,
    )
    return Told(outcome, _encoder.encode(failed))


def state_of(engine: Engine, plugin: str) -> str | None:
    """A plugin's present state, None where there is none of that name."""
    try:
        return engine.health(plugin).state
    except UnknownPlugin:
        return None


def no_json(exc: Exception, state: str | None, request_id: str) -> Broke:
    """The outcome of a call whose value cannot be told."""
    text = f"the tool's result has no JSON form: {exc}; it must return JSON values, dataclasses, bytes or arrays"
    return Broke(
        error=text,
        error_type=type(exc).__name__,
        reason_code=ReasonCode.RESULT_INVALID,
        state=state,
        request_id=request_id,
    )


def encode_line(name: str, value: Any) -> bytes:
    """One line of a stream: `{"item": …}`. Raises what a value without a JSON form raises."""
    return b'{"%s":%s}\n' % (name.encode(), _encoder.encode(value))


def told_response(told: Told, status: int | None = None) -> Response:
    """The answer that tells an outcome; `status` where HTTP has a finer one than the outcome."""
    headers = {REQUEST_ID: told.outcome.request_id}
    if told.outcome.reason_code is ReasonCode.QUEUE_FULL:
        headers["Retry-After"] = str(RETRY_AFTER_S)
    return Response(told.body, status=status or told.status, headers=headers)
