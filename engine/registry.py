"""The registry: name → the plugin's present incarnation.

Any thread may read, without a lock, begin an incarnation, or fire a trigger of its lifecycle. Pools, and with them
`leave_service`, belong to the engine's event loop.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence
from difflib import get_close_matches

import structlog

from engine.errors import Cause, UnknownPlugin
from engine.lifecycle.machine import Lifecycle, Status
from engine.lifecycle.states import Trigger
from engine.loader.discovery import Candidate
from engine.loader.findings import Finding
from engine.loader.manifest import Manifest
from engine.sandbox.pool import Pool
from engine.sandbox.wire import ToolInfo
from events.bus import EventBus
from events.envelope import PluginFacts, Restarted

log = structlog.get_logger(__name__)


class Incarnation:
    """One life of a plugin: what was found on disk, where it stands, and the workers that serve it.

    `findings`, `tools` and `pool` are set once, by the start, before the plugin leaves LOADED.
    """

    def __init__(self, candidate: Candidate, lifecycle: Lifecycle) -> None:
        self.candidate = candidate
        self.lifecycle = lifecycle
        self.findings: Sequence[Finding] = ()
        self.tools: dict[str, ToolInfo] = {}
        self.pool: Pool | None = None

    @property
    def name(self) -> str:
        """The plugin's name."""
        return self.candidate.name

    @property
    def manifest(self) -> Manifest | None:
        """Its manifest, or None where that is broken."""
        return self.candidate.manifest

    @property
    def status(self) -> Status:
        """Where it stands; a whole state."""
        return self.lifecycle.status

    def leave_service(self, trigger: Trigger, cause: Cause) -> bool:
        """FAILED or UNAVAILABLE, once: calls that wait are refused. Returns whether this was the first cause.

        On the engine's event loop only; ending the workers is left to the caller.
        """
        first = self.lifecycle.fire_if(trigger, cause)
        if first:
            state, code = self.status.state.value, cause.reason_code.value
            log.warning(
                "plugin_left_service", plugin=self.name, state=state, reason_code=code, reason=cause.reason
            )
        if self.pool is not None:
            self.pool.close(cause)
        return first


class PluginRegistry:
    """All plugins of this engine run.

    Invariant: `_incarnations` is replaced whole and never changed, so a reader needs no lock.
    """

    def __init__(self, bus: EventBus) -> None:
        self._bus = bus
        self._lock = threading.Lock()
        self._incarnations: dict[str, Incarnation] = {}

    def begin(self, candidate: Candidate) -> Incarnation:
        """Begin the next incarnation of a plugin, at LOADED. Numbers go on from what the log remembers."""
        with self._lock:
            name = candidate.name
            known = self._bus.projection.snapshot().get(name)
            number = 1 if known is None else known.incarnation + 1
            if (old := self._incarnations.get(name)) is not None:
                old.lifecycle.end()
                self._bus.publish(Restarted(number), name)
            lifecycle = Lifecycle(number, _facts(candidate), lambda event: self._bus.publish(event, name))
            incarnation = Incarnation(candidate, lifecycle)
            self._incarnations = {**self._incarnations, name: incarnation}
            return incarnation

    def get(self, name: str) -> Incarnation:
        """The present incarnation.

        Raises:
            UnknownPlugin: with the nearest name that exists.
        """
        found = self._incarnations.get(name)
        if found is None:
            raise UnknownPlugin(f"there is no plugin `{name}`{did_you_mean(name, self._incarnations)}")
        return found

    def all(self) -> list[Incarnation]:
        """The present incarnations, in the order in which they were registered."""
        return list(self._incarnations.values())


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`; did you mean `x`?`, or what there is, or nothing."""
    names = list(known)
    near = get_close_matches(name, names, 1)
    if near:
        return f"; did you mean `{near[0]}`?"
    return f"; there are {', '.join(f'`{other}`' for other in names[:10])}" if names else ""


def _facts(candidate: Candidate) -> PluginFacts:
    manifest = candidate.manifest
    if manifest is None:
        return PluginFacts()
    return PluginFacts(manifest.version, manifest.description, manifest.requires_gpu, tuple(manifest.tools))
