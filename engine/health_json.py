"""Health objects as JSON: encoded once per event, but for the two figures that no event brings.

    {"name": …, "uptime_seconds":  12.5  ,"last_used": …, "memory_bytes":  4096  ,"as_of": 7}
    └──── head ─────────────────┘ clock └──── middle ───────────────────┘ gauge └─ tail ──┘

In the list, what lies between two clocks is one piece, for as long as no event came and no gauge moved.

Invariant: parts belong to one view, and are used only while that is the plugin's present one. Views, parts and the
list are swapped whole, so any thread may read, without a lock.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from typing import NamedTuple, Protocol

import msgspec

from events.projections import PluginView, health

_UPTIME, _MEMORY = b'"uptime_seconds":', b'"memory_bytes":'  # no text holds these: in it, a quote is escaped
_encode = msgspec.json.Encoder().encode


class Measured(Protocol):
    """A live worker: its memory, with that of all it started, as last sampled."""

    memory_bytes: int


class _Parts(NamedTuple):
    """One plugin's health, cut where its figures go."""

    view: PluginView
    workers: Sequence[Measured]
    head: bytes
    middle: bytes
    tail: bytes

    def after_uptime(self) -> bytes:
        """What follows the uptime, with the memory as it is now."""
        memory = sum(worker.memory_bytes for worker in self.workers) or None
        return b"".join((self.middle, _encode(memory), self.tail))


class _List(NamedTuple):
    """All plugins: each one's uptime goes after its lead, which begins with the end of the one before."""

    views: list[PluginView]
    workers: list[Measured]
    memory_bytes: list[int]  # of each worker
    since_ns: list[float]
    leads: list[bytes]
    end: bytes


class HealthJson:
    """Makes the JSON of health objects.

    Args:
        workers: a plugin's live workers. One that comes or goes is told by an event.
    """

    def __init__(self, workers: Callable[[str], Sequence[Measured]]) -> None:
        self._workers = workers
        self._parts: dict[str, _Parts] = {}
        self._list = _list([])

    def one(self, view: PluginView, now_ns: int) -> bytes:
        """The health of a plugin, at `now_ns` by the wall clock."""
        parts = self._of(view)
        (uptime_s,) = _uptimes_s([_since_ns(view)], now_ns)
        return b"".join((parts.head, _encode(uptime_s), parts.after_uptime()))

    def all(self, views: list[PluginView], now_ns: int) -> bytes:
        """An array of the health of plugins."""
        made = self._list
        # Quick: neither views nor numbers that are the same object are looked into.
        if made.views != views or made.memory_bytes != _memory_bytes(made.workers):
            made = self._list = _list([self._of(view) for view in views])
        uptimes = _encode(_uptimes_s(made.since_ns, now_ns))[1:-1].split(b",")
        return b"".join([*chain.from_iterable(zip(made.leads, uptimes, strict=False)), made.end])

    def _of(self, view: PluginView) -> _Parts:
        parts = self._parts.get(view.name)
        if parts is None or parts.view is not view:
            workers = self._workers(view.name)
            head, uptime, rest = _encode(health(view, 0)).partition(_UPTIME)
            middle, memory, tail = rest.partition(_MEMORY)
            after_uptime, after_memory = middle.index(b","), tail.index(b",")
            parts = _Parts(view, workers, head + uptime, middle[after_uptime:] + memory, tail[after_memory:])
            self._parts[view.name] = parts
        return parts


def _list(parts: list[_Parts]) -> _List:
    workers = [worker for each in parts for worker in each.workers]
    memory_bytes = _memory_bytes(workers)  # first: a gauge that moves meanwhile is seen by the next reader
    rests = [each.after_uptime() for each in parts]
    return _List(
        views=[each.view for each in parts],
        workers=workers,
        memory_bytes=memory_bytes,
        since_ns=[_since_ns(each.view) for each in parts],
        leads=[
            before + each.head
            for before, each in zip((b"[", *(rest + b"," for rest in rests)), parts, strict=False)
        ],
        end=rests[-1] + b"]" if rests else b"[]",
    )


def _memory_bytes(workers: Iterable[Measured]) -> list[int]:
    return [worker.memory_bytes for worker in workers]


def _since_ns(view: PluginView) -> float:
    return math.inf if view.in_service_since_ns is None else view.in_service_since_ns


def _uptimes_s(since_ns: Iterable[float], now_ns: int) -> list[float]:
    return [(now_ns - since) / 1e9 if since < now_ns else 0.0 for since in since_ns]
