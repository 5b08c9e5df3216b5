"""Requests per second of `holdfast serve`, and in turn with it, of bare aiohttp handlers.

All servers of a probe are there while one of them is loaded: see `benchmarks.load`.
"""

from __future__ import annotations

from contextlib import ExitStack

import msgspec

from benchmarks.load import Load
from benchmarks.probes import Plan
from benchmarks.probes.hosting import write_plain
from benchmarks.probes.serving import bare, holdfast, least, load

LOAD_S = 2.5
_BODY = '{"n": 7}'
_PLUGINS = 100


def run(plan: Plan) -> dict[str, float]:
    """A no-op, called by `POST …/run`; beside the bare handler, and one that makes the least of a call."""
    with bare() as base, least(plan.folder) as other, holdfast(write_plain(plan.folder / "plugins", 1)) as server:
        run = server.target("POST", _run(1), _BODY)
        found = load([run, base.target("GET", "/"), other.target("POST", "/", _BODY)], plan.of(LOAD_S))
    return {**_figures(found[0]), **_figures(found[1], "bare_"), **_figures(found[2], "least_")}


def health(plan: Plan) -> dict[str, float]:
    """One plugin's health, of a hundred; beside the bare handler."""
    path = f"/v1/plugins/plain-{_PLUGINS - 1}/health"
    with bare() as base, holdfast(write_plain(plan.folder / "plugins", _PLUGINS)) as server:
        found = load([server.target("GET", path), base.target("GET", "/")], plan.of(LOAD_S))
    return {**_figures(found[0]), **_figures(found[1], "bare_")}


def plugins(plan: Plan) -> dict[str, float]:
    """The health of all; beside a bare handler whose body has as many bytes."""
    path = "/v1/plugins"
    with holdfast(write_plain(plan.folder / "plugins", _PLUGINS)) as server:
        size = len(server.get(path)[1])
        with bare(size) as base:
            found = load([server.target("GET", path), base.target("GET", "/")], plan.of(LOAD_S))
    return {**_figures(found[0]), **_figures(found[1], "bare_")}


def flat(plan: Plan) -> dict[str, float]:
    """`POST …/run`, with 1, 10 and 100 plugins registered."""
    counts = (1, 10, 100)
    with ExitStack() as stack:
        targets = []
        for count in counts:
            server = stack.enter_context(holdfast(write_plain(plan.folder / str(count) / "plugins", count)))
            targets.append(server.target("POST", _run(count), _BODY))
        found = load(targets, plan.of(LOAD_S))
    return {f"with_{count}_per_s": each.per_s for count, each in zip(counts, found, strict=True)}


def _run(plugins: int) -> str:
    return f"/v1/plugins/plain-{plugins - 1}/tools/noop/run"


def _figures(found: Load, whose: str = "") -> dict[str, float]:
    return {whose + name: value for name, value in msgspec.structs.asdict(found).items()}
