"""The document: made of the routes, whole, and true of a running server."""

from __future__ import annotations

import asyncio
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import msgspec
import pytest
import schemathesis
from http_support import client_of, write_lab
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.strategies import SearchStrategy, just, one_of
from schemathesis import GenerationMode
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)
from support import settings_for

from engine import Engine
from engine.api.answers import status_of
from engine.api.app import all_routes
from engine.api.openapi import COMMON, document
from engine.api.routes import ROUTES
from engine.errors import ReasonCode
from engine.outcome import Broke, Refused
from events.projections import Health

DOCUMENT: dict[str, Any] = msgspec.json.decode(document(all_routes(), "1"))
EXAMPLES = 40  # of each route
LOOK = settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)
# Tools of the plugin, and arguments that fit them.
TOOLS = {"echo": {"text": "x"}, "count": {"n": 3}, "picky": {"text": "x"}, "odd": {}, "size": {}, "nope": {}}


def test_every_route_is_documented_with_every_status() -> None:
    for route in all_routes():
        operation = DOCUMENT["paths"][route.path][route.method.lower()]
        assert operation["operationId"] == route.name
        expected = {str(answer.status) for answer in (*route.answers, *COMMON)}
        assert set(operation["responses"]) == expected
        placeholders = {part[1:-1] for part in route.path.split("/") if part.startswith("{")}
        documented = {entry["name"] for entry in operation.get("parameters", ()) if entry["in"] == "path"}
        assert documented == placeholders
    assert len({route.name for route in all_routes()}) == len(all_routes())


def test_the_run_route_documents_every_status_an_outcome_can_have() -> None:
    common: dict[str, Any] = {"error": "", "error_type": "X", "state": None, "request_id": "r"}
    possible = {status_of(kind(reason_code=code, **common)) for kind in (Refused, Broke) for code in ReasonCode}
    responses = DOCUMENT["paths"]["/v1/plugins/{name}/tools/{tool}/run"]["post"]["responses"]
    assert {str(status) for status in possible} <= set(responses)


def test_schemas_are_those_of_the_types() -> None:
    schemas = DOCUMENT["components"]["schemas"]
    assert list(schemas["Health"]["properties"]) == list(Health.__struct_fields__)
    assert schemas["Health"]["properties"]["reason"] == {"anyOf": [{"type": "string"}, {"type": "null"}]}
    assert "RUNNING" not in schemas["FailedCall"]["properties"]["reason_code"].get("enum", [])
    references = str(DOCUMENT).split("#/components/schemas/")[1:]
    assert {reference.split("'")[0] for reference in references} <= set(schemas)


class Served:
    """A server on a loop and a thread of its own, for a client that blocks."""

    def __init__(self, root: Path, data_dir: Path) -> None:
        self.url: Future[str] = Future()
        self.engine: Engine | None = None
        self._loop = asyncio.new_event_loop()
        self._stop = asyncio.Event()
        self._thread = threading.Thread(target=self._loop.run_until_complete, args=(self._serve(root, data_dir),))
        self._thread.start()

    async def _serve(self, root: Path, data_dir: Path) -> None:
        try:
            async with Engine(settings_for(root, data_dir)) as self.engine, client_of(self.engine) as http:
                self.url.set_result(str(http.make_url("/")))
                await self._stop.wait()
        except BaseException as exc:
            if not self.url.done():
                self.url.set_exception(exc)
            raise

    def close(self) -> None:
        """Stop it."""
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join()
        self._loop.close()


@pytest.fixture
def served(plugins: Path, data_dir: Path) -> Iterator[Served]:
    """A running server that hosts `lab`."""
    write_lab(plugins)
    server = Served(plugins, data_dir)
    yield server
    server.close()


CHECKS = [
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
    response_headers_conformance,
]


def cases(operation: Any) -> SearchStrategy[Any]:
    """Good and bad requests; to a plugin that exists, and to any name."""
    names: list[dict[str, str] | None] = [None]
    if "{tool}" in operation.path:
        names += [{"name": "lab", "tool": tool} for tool in TOOLS]
    elif "{name}" in operation.path:
        names.append({"name": "lab"})
    modes = [GenerationMode.POSITIVE]
    if any(operation.iter_parameters()):
        modes.append(GenerationMode.NEGATIVE)
    any_body = [operation.as_strategy(mode, path_parameters=chosen) for chosen in names for mode in modes]
    fitting = [
        operation.as_strategy(path_parameters=chosen, body=TOOLS[chosen["tool"]], media_type="application/json")
        for chosen in names
        if chosen is not None and "tool" in chosen
    ]
    return one_of(any_body + fitting)


def ask(case: Any, seen: Counter[tuple[str, int]]) -> None:
    """Send one request, and hold the answer against the document."""
    label = case.operation.label
    # As a stream the events have no end.
    response = case.call(headers={"Accept": "application/json"} if label == "GET /v1/events" else {}, timeout=10)
    case.validate_response(response, checks=CHECKS)
    seen[label, response.status_code] += 1


@pytest.mark.contract(4, 7)
def test_a_running_server_keeps_to_its_document(served: Served) -> None:
    """No status but the documented ones, thus no 5xx but the documented ones; and bodies as they are described."""
    schema = schemathesis.openapi.from_url(served.url.result(20) + "openapi.json")
    seen: Counter[tuple[str, int]] = Counter()
    for found in schema.get_all_operations():
        operation: Any = found.ok()  # type: ignore[union-attr] # raises where the document is wrong

        LOOK(given(case=cases(operation), seen=just(seen))(ask))()
    # schemathesis leaves out the route that it read the document from.
    assert {label for label, _ in seen} == {f"{route.method} {route.path}" for route in ROUTES}
    assert {status for label, status in seen if label.endswith("/run")} >= {200, 404, 422, 502}
    assert served.engine is not None
    assert not served.engine.faults
