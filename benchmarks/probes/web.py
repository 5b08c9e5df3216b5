"""Requests per second: of a bare aiohttp handler, and of `holdfast serve`."""

from __future__ import annotations

from benchmarks.load import Load
from benchmarks.probes import Plan
from benchmarks.probes.hosting import write_plain
from benchmarks.probes.serving import bare as bare_server
from benchmarks.probes.serving import holdfast
from benchmarks.probes.serving import least as least_server

LOAD_S = 2.5
_BODY = '{"n": 7}'


def bare(plan: Plan) -> dict[str, float]:
    """The base: a handler that returns a small JSON object."""
    with bare_server() as server:
        return _figures(server.load(plan.of(LOAD_S), "GET", "/"))


def bare_of_the_same_size(plan: Plan) -> dict[str, float]:
    """The base of the list of plugins: a handler whose body has as many bytes as that list had in this round."""
    with bare_server(round(plan.seen["http-list.body_bytes"])) as server:
        return _figures(server.load(plan.of(LOAD_S), "GET", "/"))


def run(plan: Plan, plugins: int) -> dict[str, float]:
    """A no-op, called by `POST …/run`."""
    return _load(plan, plugins, "POST", f"/v1/plugins/plain-{plugins - 1}/tools/noop/run", _BODY)


def least(plan: Plan) -> dict[str, float]:
    """The least that a call by HTTP comes to: a handler that makes the calls of `benchmarks.least`."""
    with least_server(plan.folder) as server:
        return _figures(server.load(plan.of(LOAD_S), "POST", "/", _BODY))


def health(plan: Plan, plugins: int) -> dict[str, float]:
    """One plugin's health, among so many."""
    return _load(plan, plugins, "GET", f"/v1/plugins/plain-{plugins - 1}/health")


def plugins(plan: Plan, plugins: int) -> dict[str, float]:
    """The health of all."""
    return _load(plan, plugins, "GET", "/v1/plugins")


def _load(plan: Plan, plugins: int, method: str, path: str, body: str = "") -> dict[str, float]:
    with holdfast(write_plain(plan.folder / "plugins", plugins)) as server:
        return _figures(server.load(plan.of(LOAD_S), method, path, body))


def _figures(load: Load) -> dict[str, float]:
    return {"per_s": load.per_s, "p50_us": load.p50_us, "p99_us": load.p99_us, "body_bytes": load.body_bytes}
