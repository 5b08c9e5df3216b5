"""The probes: each measures one thing, in a process of its own.

A probe is a function of a `Plan` that returns figures by name. The unit is the name's end: `_us`, `_ms`, `_s`,
`_mib`, `per_s`, `_cores`, `_bytes`; a name without one is a count. Elsewhere a figure is `<probe>.<name>`.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

import msgspec


class Plan(msgspec.Struct, frozen=True):
    """What a probe is told.

    Attributes:
        place: its own folder, on a disk; removed afterwards.
        video: the file that is tracked.
        quick: a third of the time is enough.
    """

    place: str
    video: str
    quick: bool = False

    @property
    def folder(self) -> Path:
        """Its own folder."""
        return Path(self.place)

    @property
    def clip(self) -> Path:
        """The video that is tracked."""
        return Path(self.video)

    def of(self, amount: float) -> float:
        """The amount, or a third of it where it is to be quick."""
        return amount / 3 if self.quick else amount


class Probe(NamedTuple):
    """Where a probe is, what it is given, and what it is called in tables."""

    module: str
    function: str
    title: str
    arguments: tuple[str | int, ...] = ()

    def __call__(self, plan: Plan) -> Mapping[str, float]:
        """Measure. Only now is the module imported, so that no probe carries another's packages."""
        function = getattr(import_module(f"benchmarks.probes.{self.module}"), self.function)
        figures: Mapping[str, float] = function(plan, *self.arguments)
        return figures


# In the order of a round: what is compared stands side by side.
PROBES: dict[str, Probe] = {
    "socketpair": Probe("echo", "blocking", "blocking socketpair echo"),
    "least-uvloop": Probe("calls", "least", "the least, uvloop", ("uvloop",)),
    "holdfast-uvloop": Probe("calls", "noop", "Holdfast on uvloop", ("uvloop", 1)),
    "echo": Probe("echo", "streams", "asyncio streams echo"),
    "least": Probe("calls", "least", "the least", ("asyncio",)),
    "holdfast-10": Probe("calls", "noop", "Holdfast, 10 plugins", ("asyncio", 10)),
    "holdfast": Probe("calls", "noop", "Holdfast", ("asyncio", 1)),
    "holdfast-100": Probe("calls", "noop", "Holdfast, 100 plugins", ("asyncio", 100)),
    "pebble": Probe("pools", "noop", "pebble", ("pebble",)),
    "executor": Probe("pools", "noop", "ProcessPoolExecutor", ("executor",)),
    "loky": Probe("pools", "noop", "loky", ("loky",)),
    "ray": Probe("pools", "noop", "Ray", ("ray",)),
    "copy": Probe("frames", "copy", "one copy"),
    "frame-10": Probe("frames", "holdfast", "Holdfast, 10 plugins", (10,)),
    "frame": Probe("frames", "holdfast", "Holdfast", (1,)),
    "frame-100": Probe("frames", "holdfast", "Holdfast, 100 plugins", (100,)),
    "pebble-frame": Probe("pools", "frames", "pebble", ("pebble",)),
    "executor-frame": Probe("pools", "frames", "ProcessPoolExecutor", ("executor",)),
    "ray-frame": Probe("pools", "frames", "Ray", ("ray",)),
    "http-health": Probe("web", "health", "Holdfast, health"),
    "http-list": Probe("web", "plugins", "Holdfast, 100 plugins"),
    "http-run": Probe("web", "run", "Holdfast, no-op"),
    "http-flat": Probe("web", "flat", "Holdfast, no-op"),
    "python": Probe("starts", "python", "python -c pass"),
    "least-start": Probe("starts", "least", "the least start"),
    "worker": Probe("starts", "worker", "Holdfast worker"),
    "engine": Probe("starts", "engine", "Holdfast engine, 100 plugins"),
    "deadline": Probe("deadline", "deadline", "Holdfast"),
    "publish": Probe("publish", "publish", "Holdfast"),
    "sse": Probe("sse", "sse", "Holdfast"),
    "track": Probe("tracking", "clip", "Holdfast"),
}
