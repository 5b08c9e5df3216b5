"""The routes as data, and OpenAPI 3.1 made of them: what is registered is what is documented.

Schemas come from the very types that the handlers encode.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import msgspec
from aiohttp.typedefs import Handler

from engine.api.errors import ErrorBody
from engine.api.response import JSON_TYPE
from engine.api.tokens import Role

Schema: TypeAlias = dict[str, Any]
# By media type: the type that is encoded, several of which one is, or a schema of what has no type.
Content: TypeAlias = Mapping[str, Any]

_TEXT: Schema = {"type": "string"}
_ERROR: Content = {JSON_TYPE: ErrorBody}


class Answer(NamedTuple):
    """One status that a route may answer. `content` maps a media type to a Python type or a schema."""

    status: int
    text: str
    content: Content = _ERROR
    headers: Sequence[str] = ()


class Parameter(NamedTuple):
    """One parameter: `where` is path, query or header."""

    where: str
    name: str
    text: str
    schema: Schema = _TEXT


class Route(NamedTuple):
    """One route: how it is registered, and all there is to say of it."""

    method: str
    path: str
    handler: Handler
    name: str  # the operation's id
    summary: str
    answers: Sequence[Answer]
    parameters: Sequence[Parameter] = ()
    body: Content | None = None
    open: bool = False  # answers without a token
    role: Role = Role.READ  # what the token has to allow
    endless: bool = False  # its answer may have no end, so there is no HEAD


# What any route may answer, whatever it does.
COMMON = (
    Answer(400, "No valid HTTP; the connection ends."),
    Answer(401, "The token is missing or wrong.", headers=("WWW-Authenticate",)),
    Answer(403, "The request comes from a page of another site, or its token does not allow it."),
    Answer(421, "`Host` is not this server: DNS rebinding."),
)


def document(routes: Iterable[Route], version: str) -> bytes:
    """The OpenAPI document, as JSON."""
    routes = list(routes)
    types = _Schemas(
        kind
        for route in routes
        for answer in (*route.answers, *COMMON)
        for content in answer.content.values()
        for kind in (content if isinstance(content, tuple) else (content,))
        if not isinstance(kind, dict)
    )
    paths: dict[str, dict[str, Any]] = {}
    for route in routes:
        paths.setdefault(route.path, {})[route.method.lower()] = _operation(route, types)
    return msgspec.json.encode(
        {
            "openapi": "3.1.0",
            "info": {
                "title": "Holdfast",
                "version": version,
                "description": "A crash-proof plugin engine: a plugin can fail; the engine cannot be made to.",
            },
            "paths": paths,
            "components": {
                "schemas": types.components,
                "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}},
            },
        }
    )


class _Schemas:
    """The schemas of the types that are answered."""

    def __init__(self, types: Iterable[Any]) -> None:
        distinct = list({repr(kind): kind for kind in types}.values())
        schemas, self.components = msgspec.json.schema_components(
            distinct, ref_template="#/components/schemas/{name}"
        )
        self._by_type = {repr(kind): schema for kind, schema in zip(distinct, schemas, strict=True)}

    def of(self, kind: Any) -> Schema:
        """A type's schema, or the schema that was given in its place."""
        if isinstance(kind, tuple):
            return {"anyOf": [self.of(one) for one in kind]}
        return kind if isinstance(kind, dict) else self._by_type[repr(kind)]

    def content(self, content: Content) -> dict[str, Any]:
        """OpenAPI's `content`."""
        return {media_type: {"schema": self.of(kind)} for media_type, kind in content.items()}


def _operation(route: Route, types: _Schemas) -> dict[str, Any]:
    operation: dict[str, Any] = {
        "operationId": route.name,
        "summary": route.summary,
        "security": [{}] if route.open else [{}, {"token": []}],
        "responses": {
            str(answer.status): {
                "description": answer.text,
                "content": types.content(answer.content),
                **({"headers": {name: {"schema": _TEXT} for name in answer.headers}} if answer.headers else {}),
            }
            for answer in sorted((*route.answers, *COMMON), key=lambda answer: answer.status)
        },
    }
    if route.parameters:
        operation["parameters"] = [
            {
                "in": parameter.where,
                "name": parameter.name,
                "required": parameter.where == "path",
                "description": parameter.text,
                "schema": parameter.schema,
            }
            for parameter in route.parameters
        ]
    if route.body is not None:
        operation["requestBody"] = {"required": False, "content": types.content(route.body)}
    return operation
