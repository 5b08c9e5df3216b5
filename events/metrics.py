"""Prometheus metrics, folded from events.

The bus offers under its lock, so `offer` only adds to plain numbers (well under a microsecond); the Prometheus
form is made when somebody scrapes. Label values are plugin and tool names from manifests, reason codes and event
types: all bounded.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeAlias

import structlog
from prometheus_client import CollectorRegistry
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

from events.audit import AuditLog
from events.bus import EventBus
from events.envelope import (
    CallFinished,
    CallStarted,
    EngineStarted,
    Event,
    EventData,
    Transition,
    WorkerExited,
    WorkerStarted,
)
from events.log import EventLog

log = structlog.get_logger(__name__)

STATES = ("LOADED", "INITIALIZED", "RUNNING", "FAILED", "UNAVAILABLE")
# Seconds: an isolated call takes about a millisecond; the default timeout is 60 s, a video may take 900.
BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300, 900)

Labels: TypeAlias = tuple[str, ...]
Sample: TypeAlias = float | Mapping[str, float]  # a mapping is one value per `part`
_Counts: TypeAlias = defaultdict[Labels, int]

# Where what stands in a tool's counts, behind its buckets.
_COMPLETED, _BROKE, _REJECTED, _SUM = range(len(BUCKETS) + 1, len(BUCKETS) + 5)
_OUTCOMES = {"completed": _COMPLETED, "broke": _BROKE, "rejected": _REJECTED}


class Metrics:
    """A bus subscriber with a registry of its own; `render` on any thread."""

    name = "metrics"

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.registry.register(self)
        self.scrape_faults = 0  # readings that raised
        self._readings: list[tuple[type[Metric], str, str, Callable[[], Sample]]] = []
        self._events: defaultdict[type[EventData], int] = defaultdict(int)
        self._transitions: _Counts = defaultdict(int)
        self._starts: _Counts = defaultdict(int)
        self._exits: _Counts = defaultdict(int)
        self._in_flight: defaultdict[str, int] = defaultdict(int)
        self._states: dict[str, str] = {}
        # Per (plugin, tool): a count per bucket, the last for what is above them all; one per outcome; the sum in
        # seconds. One list, so that a scrape copies it at once.
        self._calls: defaultdict[Labels, list[float]] = defaultdict(lambda: [0] * _SUM + [0.0])
        self._folds: dict[type[EventData], Callable[[str, Any], None]] = {
            Transition: self._transition,
            CallStarted: self._call_started,
            CallFinished: self._call_finished,
            WorkerStarted: self._worker_started,
            WorkerExited: self._worker_exited,
        }

    # Folding: one thread at a time, under the bus's lock

    def offer(self, event: Event) -> None:
        """Count one event."""
        data = event.data
        self._events[type(data)] += 1
        if event.subject is not None:
            fold = self._folds.get(type(data))
            if fold is not None:
                fold(event.subject, data)
        elif isinstance(data, EngineStarted):
            self._states.clear()
            self._in_flight.clear()

    def _transition(self, plugin: str, data: Transition) -> None:
        self._states[plugin] = data.to
        self._transitions[(plugin, data.to, data.reason_code or "")] += 1
        if data.from_ is None:
            self._in_flight[plugin] = 0

    def _call_started(self, plugin: str, _data: CallStarted) -> None:
        self._in_flight[plugin] += 1

    def _call_finished(self, plugin: str, data: CallFinished) -> None:
        if in_flight := self._in_flight[plugin]:
            self._in_flight[plugin] = in_flight - 1
        counts = self._calls[plugin, data.tool]
        seconds = data.duration_ms / 1000
        counts[bisect_left(BUCKETS, seconds)] += 1
        counts[_COMPLETED if data.ok else _BROKE if data.broke else _REJECTED] += 1
        counts[_SUM] += seconds

    def _worker_started(self, plugin: str, _data: WorkerStarted) -> None:
        self._starts[(plugin,)] += 1

    def _worker_exited(self, plugin: str, data: WorkerExited) -> None:
        self._exits[(plugin, data.verdict)] += 1

    # Gauges of other parts

    def gauge(self, name: str, documentation: str, read: Callable[[], Sample]) -> None:
        """Read a gauge at every scrape; one that raises is left out of that scrape and counted."""
        self._readings.append((GaugeMetricFamily, name, documentation, read))

    def counter(self, name: str, documentation: str, read: Callable[[], Sample]) -> None:
        """Like `gauge`, for a number that only grows; `_total` is added to the name."""
        self._readings.append((CounterMetricFamily, name, documentation, read))

    def watch(
        self,
        *,
        bus: EventBus | None = None,
        log: EventLog | None = None,
        audit: AuditLog | None = None,
        engine_faults: Callable[[], int] | None = None,
    ) -> None:
        """Add the gauges of these parts."""
        if bus is not None:
            self.gauge("holdfast_events_last", "Number of the last event published.", lambda: bus.last)
            self.counter(
                "holdfast_subscriber_faults",
                "Events that a subscriber failed on.",
                lambda: {name: fault.count for name, fault in bus.faults.copy().items()},
            )
        if log is not None:
            self._watch_log(log)
        if log is not None and bus is not None:
            self.gauge(
                "holdfast_log_lag",
                "Events published and not durable yet.",
                lambda: max(0, bus.last - log.durable),
            )
        if audit is not None:
            self.gauge("holdfast_audit_ok", "1 while the audit file is written.", lambda: audit.state.ok)
            self.gauge("holdfast_audit_last", "Number of the last event audited.", lambda: audit.state.last)
            self.counter("holdfast_audit_faults", "Failed audit writes.", lambda: audit.state.faults)
        if engine_faults is not None:
            self.counter("holdfast_engine_faults", "Unforeseen faults of the engine itself.", engine_faults)

    def _watch_log(self, log: EventLog) -> None:
        self.gauge("holdfast_log_ok", "1 while the event log can be written.", lambda: log.state.ok)
        self.gauge("holdfast_log_durable", "Number of the last durable event.", lambda: log.durable)
        self.gauge("holdfast_log_first", "From this number on every event is kept.", lambda: log.first)
        self.gauge("holdfast_log_backlog", "Events waiting for the disk.", lambda: log.state.backlog)
        self.counter("holdfast_log_dropped", "Events that a gap stands for.", lambda: log.state.dropped)
        self.counter(
            "holdfast_log_faults",
            "Faults around the event log, by part.",
            lambda: {name: fault.count for name, fault in log.faults.copy().items()},
        )

    # Scraping

    def render(self) -> tuple[bytes, str]:
        """The Prometheus text and its content type."""
        return generate_latest(self.registry), CONTENT_TYPE_LATEST

    def describe(self) -> list[Metric]:
        """Nothing: the registry need not scrape to learn the names."""
        return []

    def collect(self) -> Iterator[Metric]:
        """The metric families as they are now; called by the registry."""
        state = GaugeMetricFamily("holdfast_plugin_state", "1 for the plugin's state.", labels=["plugin", "state"])
        for plugin, current in self._states.copy().items():
            for name in STATES:
                state.add_metric([plugin, name], float(name == current))
        yield state
        calls = {key: counts.copy() for key, counts in self._calls.copy().items()}
        ended = {
            (*key, outcome): counts[place]
            for key, counts in calls.items()
            for outcome, place in _OUTCOMES.items()
            if counts[place]
        }
        published = {(kind.TYPE,): count for kind, count in self._events.copy().items()}
        for name, documentation, labels, counters in (
            ("holdfast_transitions", "State changes.", ["plugin", "to", "reason_code"], self._transitions.copy()),
            ("holdfast_calls", "Calls that ended.", ["plugin", "tool", "outcome"], ended),
            ("holdfast_worker_starts", "Workers started.", ["plugin"], self._starts.copy()),
            ("holdfast_worker_exits", "Workers gone.", ["plugin", "verdict"], self._exits.copy()),
            ("holdfast_events", "Events published.", ["type"], published),
        ):
            counter = CounterMetricFamily(name, documentation, labels=labels)
            for key, count in counters.items():
                counter.add_metric(key, count)
            yield counter
        in_flight = GaugeMetricFamily("holdfast_calls_in_flight", "Calls running now.", labels=["plugin"])
        for plugin, running in self._in_flight.copy().items():
            in_flight.add_metric([plugin], running)
        yield in_flight
        yield _durations(calls)
        for kind, name, documentation, read in self._readings:
            family = self._collect_reading(kind, name, documentation, read)
            if family is not None:
                yield family
        yield CounterMetricFamily(
            "holdfast_scrape_faults", "Readings that raised while scraped.", value=self.scrape_faults
        )

    def _collect_reading(
        self, kind: type[Metric], name: str, documentation: str, read: Callable[[], Sample]
    ) -> Metric | None:
        try:
            reading = read()
        except Exception as exc:  # a scrape shows what can be shown
            self.scrape_faults += 1
            log.error("metric_failed", metric=name, error=f"{type(exc).__name__}: {exc}")
            return None
        by_part = isinstance(reading, Mapping)
        family: Any = kind(name, documentation, labels=["part"] if by_part else [])  # type: ignore[call-arg]
        for part, value in reading.items() if isinstance(reading, Mapping) else [(None, reading)]:
            family.add_metric([part] if by_part else [], float(value))
        return family  # type: ignore[no-any-return]


def _durations(calls: Mapping[Labels, list[float]]) -> Metric:
    family = HistogramMetricFamily(
        "holdfast_call_duration_seconds", "Duration of calls.", labels=["plugin", "tool"]
    )
    for key, counts in calls.items():
        buckets, so_far = [], 0.0
        for bound, count in zip((*BUCKETS, float("inf")), counts, strict=False):
            so_far += count
            buckets.append(("+Inf" if bound == float("inf") else str(float(bound)), so_far))
        family.add_metric(key, buckets, counts[_SUM])
    return family
