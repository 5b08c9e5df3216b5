"""Who may ask, and what an error looks like: the one middleware around every route.

Host    a name of this machine's loopback, or the one we bind to   421: DNS rebinding
Origin  absent, or the very host that is asked                     403: another site's page
token   `Authorization: Bearer`, where there are tokens            401; 403 where its role is not enough
place   a connection beyond the limit may only read health         503
"""

from __future__ import annotations

import functools
import ipaddress
from collections.abc import Mapping
from typing import TypeAlias
from urllib.parse import urlsplit

from aiohttp import web
from aiohttp.typedefs import Handler, Middleware

from engine.api.connections import Connection
from engine.api.errors import Problem, busy, error_response
from engine.api.tokens import Role, Tokens
from engine.engine import Engine
from engine.errors import ReasonCode, UnknownPlugin
from engine.settings import Settings

Roles: TypeAlias = Mapping[tuple[str, str], Role]

_LOOPBACK_NAMES = ("localhost", "127.0.0.1", "::1")
# For a probe: they tell one bit, and only without `?verbose`.
_OPEN_PATHS = ("/livez", "/readyz")
_LONG_READS = ("/v1/events", "/v1/plugins/{name}/crashes")  # these wait, or read the disk


def is_loopback(host: str) -> bool:
    """Whether a host name or address means this machine only."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def is_wildcard(host: str) -> bool:
    """Whether a bind address means every interface."""
    try:
        return ipaddress.ip_address(host).is_unspecified
    except ValueError:
        return False


class Guard:
    """Decides whether a request may pass. Pure but for the settings it was made from."""

    def __init__(self, settings: Settings, tokens: Tokens, roles: Roles) -> None:
        self._tokens = tokens if tokens.required else None
        self._roles = roles
        # Bound to every interface we cannot know our names; but a token is required there, and no page has it.
        self._hosts = None if is_wildcard(settings.host) else {*_LOOPBACK_NAMES, settings.host.lower()}

    def check(self, request: web.Request, *, crowded: bool) -> None:
        """Raises Problem where it may not; `crowded`: it came over a connection beyond the limit."""
        host = request.headers.get("Host", "")
        if self._hosts is not None and _hostname(host) not in self._hosts:
            text = f"this server is not `{host}`; ask for it by the address it is bound to"
            raise Problem(421, text)
        origin = request.headers.get("Origin")
        if origin is not None and not _same_origin(origin, host):
            raise Problem(403, "the request comes from a page of another site; that is not allowed")
        tokens = self._tokens
        if tokens is not None and not (request.path in _OPEN_PATHS and "verbose" not in request.query):
            method = "GET" if request.method == "HEAD" else request.method
            _check_token(request, tokens, self._roles.get((method, _route_of(request)), Role.READ))
        if crowded and not _is_short(request):
            raise busy("all connections of this server are at work; retry, or raise `max_connections`")


def _is_crowded(request: web.Request) -> bool:
    return isinstance(request.protocol, Connection) and request.protocol.crowded


def _check_token(request: web.Request, tokens: Tokens, needed: Role) -> None:
    scheme, _, given = request.headers.get("Authorization", "").partition(" ")
    token = tokens.find(given.strip()) if scheme.lower() == "bearer" else None
    if token is None:
        text = "a token is needed; send one of the server's in the header `Authorization: Bearer <token>`"
        if given:
            text = "the server does not know this token; send another, or restart the server if it is new"
        raise Problem(401, text, headers={"WWW-Authenticate": 'Bearer realm="holdfast"'})
    if not token.role.includes(needed):
        text = f"the token `{token.name}` may {token.role.value}, this needs `{needed.value}`; use another token"
        raise Problem(403, text)


def _is_short(request: web.Request) -> bool:
    return request.method in ("GET", "HEAD") and _route_of(request) not in _LONG_READS


@functools.lru_cache(maxsize=64)
def _hostname(host: str) -> str:
    """`[::1]:8700` → `::1`."""
    if host.startswith("["):
        return host[1:].partition("]")[0].lower()
    return host.partition(":")[0].lower()


def _same_origin(origin: str, host: str) -> bool:
    try:
        parts = urlsplit(origin)
    except ValueError:
        return False
    return parts.scheme in ("http", "https") and parts.netloc.lower() == host.lower()


def middleware(engine: Engine, tokens: Tokens, roles: Roles) -> Middleware:
    """Guards every request, and makes an answer of everything that a handler raises.

    Args:
        engine: whose settings say who may ask.
        tokens: that it knows.
        roles: what a route needs, by (method, path).
    """
    guard = Guard(engine.settings, tokens, roles)

    @web.middleware
    async def guarded(request: web.Request, handler: Handler) -> web.StreamResponse:
        crowded = _is_crowded(request)
        try:
            guard.check(request, crowded=crowded)
            response = await handler(request)
        except Problem as problem:
            response = error_response(request, problem)
        except UnknownPlugin as exc:
            response = error_response(request, Problem(404, str(exc), ReasonCode.UNKNOWN_PLUGIN))
        except web.HTTPException as exc:
            response = error_response(request, _routing_problem(request, exc))
        except ConnectionError:  # the caller is gone; nobody is left to answer
            raise
        except Exception as exc:  # our own fault, whatever it is: counted, logged, and told
            name = f"http {request.method} {_route_of(request)}"
            engine.note_fault(name, exc)
            text = f"the engine itself failed on this request ({type(exc).__name__}); see its log, ask again"
            response = error_response(request, Problem(503, text, ReasonCode.ENGINE_FAULT))
        if crowded:
            response.force_close()
        return response

    return guarded


def _route_of(request: web.Request) -> str:
    resource = request.match_info.route.resource
    return "?" if resource is None else resource.canonical


def _routing_problem(request: web.Request, exc: web.HTTPException) -> Problem:
    headers = {name: value for name, value in exc.headers.items() if name in ("Allow", "Location")}
    if exc.status == 404:
        return Problem(404, f"there is no `{request.path}` here; /openapi.json lists the routes")
    if exc.status == 405:
        allowed = exc.headers.get("Allow", "")
        return Problem(
            405, f"`{request.path}` does not take {request.method}; it takes {allowed}", headers=headers
        )
    return Problem(exc.status, exc.text or exc.reason, headers=headers)
