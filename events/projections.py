"""Health as a pure fold of events: the only source that health routes read.

`fold` has no clock, no I/O and no hidden state, so replaying the log gives the very projection that was
live. Each plugin's view is one frozen struct that is swapped whole: a reader on any thread sees a state that
existed, and takes no lock to see it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeAlias

import msgspec
from msgspec.structs import replace

from events.envelope import (
    CallFinished,
    CallStarted,
    EngineStarted,
    Event,
    EventData,
    PluginFacts,
    Transition,
    WorkerExited,
    WorkerStarted,
    rfc3339,
)


class PluginView(msgspec.Struct, frozen=True, gc=False):
    """Everything the events say about one plugin."""

    name: str
    present: bool = True  # False: known from an earlier engine run, not registered in this one
    state: str = "LOADED"
    reason: str | None = None
    reason_code: str | None = None
    incarnation: int = 0
    facts: PluginFacts = PluginFacts()
    in_service_since_ns: int | None = None
    last_used_ns: int | None = None
    success_count: int = 0
    error_count: int = 0
    in_flight: int = 0
    last_execution_time_ms: float | None = None
    total_execution_time_ms: float = 0.0  # of the successful calls
    pids: tuple[int, ...] = ()
    as_of: int = 0  # the number of the last event folded in


class Health(msgspec.Struct, frozen=True):
    """The health object of the HTTP API."""

    name: str
    state: str
    reason: str | None
    reason_code: str | None
    version: str
    description: str
    incarnation: int
    uptime_seconds: float  # since INITIALIZED; 0 while not in service
    last_used: str | None  # RFC 3339: when the last call started
    success_count: int
    error_count: int  # calls the plugin broke on; a caller's bad input is not one
    in_flight: int
    last_execution_time_ms: float | None
    avg_execution_time_ms: float | None  # over the successful calls
    requires_gpu: bool
    tools: tuple[str, ...]
    pid: int | None
    memory_bytes: int | None  # resident, the worker's whole process tree, as last sampled
    as_of: int


Views: TypeAlias = Mapping[str, PluginView]
_IN_SERVICE = ("INITIALIZED", "RUNNING")


def _transition(view: PluginView, event: Event, data: Any) -> PluginView:
    entry = data.from_ is None
    since = view.in_service_since_ns if data.to in _IN_SERVICE else None
    return replace(
        view,
        present=True,
        state=data.to,
        reason=data.reason,
        reason_code=data.reason_code,
        incarnation=data.incarnation,
        facts=view.facts if data.plugin is msgspec.UNSET else data.plugin,
        in_service_since_ns=event.time_ns if data.to == "INITIALIZED" else since,
        in_flight=0 if entry else view.in_flight,
        pids=() if entry else view.pids,
        as_of=event.sequence,
    )


def _call_started(view: PluginView, event: Event, _data: Any) -> PluginView:
    return replace(view, in_flight=view.in_flight + 1, last_used_ns=event.time_ns, as_of=event.sequence)


def _call_finished(view: PluginView, event: Event, data: Any) -> PluginView:
    total_ms = view.total_execution_time_ms
    return replace(
        view,
        in_flight=max(0, view.in_flight - 1),
        success_count=view.success_count + data.ok,
        error_count=view.error_count + data.broke,
        last_execution_time_ms=data.duration_ms,
        total_execution_time_ms=total_ms + data.duration_ms if data.ok else total_ms,
        as_of=event.sequence,
    )


def _worker_started(view: PluginView, event: Event, data: Any) -> PluginView:
    return replace(view, pids=(*view.pids, data.pid), as_of=event.sequence)


def _worker_exited(view: PluginView, event: Event, data: Any) -> PluginView:
    return replace(view, pids=tuple(pid for pid in view.pids if pid != data.pid), as_of=event.sequence)


def _seen(view: PluginView, event: Event, _data: Any) -> PluginView:
    return replace(view, as_of=event.sequence)


_FOLDS: dict[type[EventData], Callable[[PluginView, Event, Any], PluginView]] = {
    Transition: _transition,
    CallStarted: _call_started,
    CallFinished: _call_finished,
    WorkerStarted: _worker_started,
    WorkerExited: _worker_exited,
}


def fold(views: Views, event: Event) -> Views:
    """The views after `event`: a new mapping, the old one untouched."""
    return fold_all([event], views)


def fold_all(events: Iterable[Event], views: Views | None = None) -> Views:
    """`fold` over many events."""
    projection = HealthProjection(views)
    for event in events:
        projection.apply(event)
    return projection.snapshot()


def health(view: PluginView, now_ns: int, memory_bytes: int | None = None) -> Health:
    """The health object of a view; only the clock and the memory gauge do not come from events."""
    since = view.in_service_since_ns
    return Health(
        name=view.name,
        state=view.state,
        reason=view.reason,
        reason_code=view.reason_code,
        version=view.facts.version,
        description=view.facts.description,
        incarnation=view.incarnation,
        uptime_seconds=0.0 if since is None else max(0, now_ns - since) / 1e9,
        last_used=None if view.last_used_ns is None else rfc3339(view.last_used_ns),
        success_count=view.success_count,
        error_count=view.error_count,
        in_flight=view.in_flight,
        last_execution_time_ms=view.last_execution_time_ms,
        avg_execution_time_ms=(view.total_execution_time_ms / view.success_count if view.success_count else None),
        requires_gpu=view.facts.requires_gpu,
        tools=view.facts.tools,
        pid=view.pids[0] if view.pids else None,
        memory_bytes=memory_bytes,
        as_of=view.as_of,
    )


class HealthProjection:
    """The live fold. One writer (the bus, under its lock); readers on any thread, without one.

    Invariant: `_views` maps a name to a whole frozen view, and single dict operations are atomic.
    """

    def __init__(self, views: Views | None = None) -> None:
        self._views: dict[str, PluginView] = dict(views or {})

    def apply(self, event: Event) -> None:
        """Fold one event in."""
        subject, data, views = event.subject, event.data, self._views
        if subject is None:
            if isinstance(data, EngineStarted):
                for name, known in list(views.items()):
                    views[name] = replace(known, present=False, in_flight=0, pids=(), as_of=event.sequence)
            return
        view = views.get(subject)
        if view is None or not view.present:  # it enters this engine run: that is the order of plugins
            views.pop(subject, None)
            view = view or PluginView(subject, present=False)
        views[subject] = _FOLDS.get(type(data), _seen)(view, event, data)

    def view(self, name: str) -> PluginView | None:
        """What is known of a plugin of this engine run, or None."""
        view = self._views.get(name)
        return view if view is not None and view.present else None

    def views(self) -> list[PluginView]:
        """All plugins of this engine run, in the order they were first seen."""
        return [view for view in self._views.copy().values() if view.present]

    def snapshot(self) -> dict[str, PluginView]:
        """Everything folded so far, plugins of earlier runs included."""
        return self._views.copy()
