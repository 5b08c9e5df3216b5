"""The event bus: number, fold, offer. Synchronous, from any thread; no subscriber can stop it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Protocol

import msgspec
import structlog

from events.bounds import bounded
from events.envelope import Event, EventData
from events.projections import HealthProjection

log = structlog.get_logger(__name__)


class Subscriber(Protocol):
    """Takes each event as it is published. Must not block and must not publish."""

    name: str

    def offer(self, event: Event) -> None:
        """Take one event; called under the bus's lock, in order."""


class Fault(msgspec.Struct, frozen=True):
    """How often a part failed, and how the last time."""

    count: int
    last: str

    @classmethod
    def after(cls, seen: Fault | None, last: str) -> Fault:
        """What was `seen` so far, and one more."""
        return cls(1 if seen is None else seen.count + 1, last)


class EventBus:
    """Numbers events, folds them into the projection, offers them to subscribers.

    Invariant: numbers are consecutive, and every subscriber is offered them in order, because all three steps
    happen under one lock.
    """

    def __init__(
        self,
        projection: HealthProjection,
        *,
        last: int = 0,
        clock: Callable[[], int] = time.time_ns,
    ) -> None:
        self.projection = projection
        self.faults: dict[str, Fault] = {}
        self._last = last
        self._clock = clock
        self._lock = threading.Lock()
        self._subscribers: tuple[Subscriber, ...] = ()

    @property
    def last(self) -> int:
        """The number of the last event published."""
        return self._last

    def subscribe(self, subscriber: Subscriber) -> None:
        """Offer every event from now on to `subscriber`."""
        with self._lock:
            self._subscribers = (*self._subscribers, subscriber)

    def unsubscribe(self, subscriber: Subscriber) -> None:
        """Offer it nothing more."""
        with self._lock:
            self._subscribers = tuple(s for s in self._subscribers if s is not subscriber)

    def publish(self, data: EventData, subject: str | None = None) -> Event:
        """Number the event, fold it, offer it. Returns it as numbered, over-long texts cut (`events.bounds`)."""
        data = bounded(data)
        with self._lock:
            # Whole microseconds, as the envelope's `time` has: a replayed fold must equal the live one.
            time_ns = self._clock() // 1000 * 1000
            event = Event(self._last + 1, time_ns, subject, data)
            self._last = event.sequence
            self.projection.apply(event)
            for subscriber in self._subscribers:
                try:
                    subscriber.offer(event)
                except Exception as exc:  # one subscriber's trouble is its own
                    self._note_fault(subscriber.name, exc)
        return event

    def _note_fault(self, name: str, exc: Exception) -> None:
        fault = self.faults[name] = Fault.after(self.faults.get(name), f"{type(exc).__name__}: {exc}")
        if fault.count.bit_count() == 1:  # 1, 2, 4, …: it may well fail on each event from now on
            log.error("subscriber_failed", subscriber=name, error=fault.last, count=fault.count)
