"""What the API answers when it does not answer with a result: one JSON form, one exception, one table.

A route raises `Problem` for what is the caller's fault or cannot be served now; the middleware (`guard`) makes
the answer. A call's own trouble is no `Problem`: it is an `Outcome`, see `answers`.
"""

from __future__ import annotations

from collections.abc import Mapping
from http import HTTPStatus

import msgspec
from aiohttp import web

from engine.api.response import JSON_TYPE, Response
from engine.errors import ReasonCode
from engine.outcome import new_request_id

REQUEST_ID = "X-Request-Id"
RETRY_AFTER_S = 1  # places become free at any moment

_MAX_REQUEST_ID = 128
_encoder = msgspec.json.Encoder()


class ErrorBody(msgspec.Struct, frozen=True):
    """The body of every error answer that is not a call's outcome."""

    error: str  # fact, cause, next step
    reason_code: str  # of `ReasonCode`, or the snake-case name of the HTTP status
    request_id: str


class Problem(Exception):
    """A request that gets an error answer.

    Args:
        status: of HTTP.
        error: fact, cause, next step.
        reason_code: by default the status in snake case, such as `not_found`.
        headers: more headers of the answer.
    """

    def __init__(
        self,
        status: int,
        error: str,
        reason_code: ReasonCode | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(error)
        self.status = status
        self.error = error
        self.reason_code = status_code_name(status) if reason_code is None else reason_code.value
        self.headers = dict(headers or {})


def bad_input(error: str) -> Problem:
    """422: the request cannot be understood."""
    return Problem(422, error, ReasonCode.BAD_INPUT)


def busy(error: str) -> Problem:
    """503: there is no room for this now, but soon may be."""
    return Problem(503, error, headers={"Retry-After": str(RETRY_AFTER_S)})


def status_code_name(status: int) -> str:
    """`404` → `not_found`."""
    return HTTPStatus(status).phrase.lower().replace(" ", "_").replace("-", "_")


def given_request_id(request: web.BaseRequest) -> str | None:
    """The request's own id, from `X-Request-Id`.

    Raises:
        Problem: it is not 1 to 128 visible ASCII characters.
    """
    given = request.headers.get(REQUEST_ID)
    if given is not None and not _is_request_id(given):
        raise bad_input(f"{REQUEST_ID} must be 1 to {_MAX_REQUEST_ID} visible ASCII characters")
    return given


def _is_request_id(text: str) -> bool:
    return 0 < len(text) <= _MAX_REQUEST_ID and all("!" <= character <= "~" for character in text)


def error_response(request: web.BaseRequest, problem: Problem) -> Response:
    """The answer to a request that cannot be served."""
    given = request.headers.get(REQUEST_ID)
    request_id = given if given is not None and _is_request_id(given) else new_request_id()
    body = _encoder.encode(ErrorBody(printable(problem.error), problem.reason_code, request_id))
    headers = {**problem.headers, REQUEST_ID: request_id}
    return Response(body, status=problem.status, headers=headers)


def raw_answer(problem: Problem) -> bytes:
    """The same answer as bytes, for a connection on which no request is there yet. It ends the connection."""
    request_id = new_request_id()
    body = _encoder.encode(ErrorBody(printable(problem.error), problem.reason_code, request_id))
    headers = {
        "Content-Type": JSON_TYPE,
        "Content-Length": str(len(body)),
        "Connection": "close",
        REQUEST_ID: request_id,
        **problem.headers,
    }
    lines = (f"{name}: {value}" for name, value in headers.items())
    head = "\r\n".join((f"HTTP/1.1 {problem.status} {HTTPStatus(problem.status).phrase}", *lines, "", ""))
    return head.encode("ascii") + body


def printable(text: str) -> str:
    """Without the lone surrogates that a URL can smuggle in and JSON cannot hold."""
    return text.encode("utf-8", "replace").decode("utf-8")
