"""The events themselves, and their CloudEvents 1.0 JSON form.

One frozen struct per kind of event; `Event` adds the number, the time and the plugin. A struct's `TYPE` is
what stands behind `holdfast.` in the envelope's `type`. New fields get defaults, so that old logs still read.
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from typing import Any, ClassVar, TypeAlias

import msgspec

TYPE_PREFIX = "holdfast."


class PluginFacts(msgspec.Struct, frozen=True, gc=False):
    """What the manifest says of a plugin; rides on its entry at LOADED."""

    version: str = ""
    description: str = ""
    requires_gpu: bool = False
    tools: tuple[str, ...] = ()


class Transition(msgspec.Struct, frozen=True, gc=False, rename={"from_": "from"}):
    """A plugin changed its lifecycle state; `from` is null on its entry at LOADED."""

    TYPE: ClassVar[str] = "plugin.transition"
    from_: str | None
    to: str
    trigger: str | None
    incarnation: int
    reason_code: str | None = None
    reason: str | None = None
    plugin: PluginFacts | msgspec.UnsetType = msgspec.UNSET  # on entry only


class Restarted(msgspec.Struct, frozen=True, gc=False):
    """Somebody restarted the plugin by hand: the next incarnation begins."""

    TYPE: ClassVar[str] = "plugin.restarted"
    incarnation: int  # the one that begins


class CallStarted(msgspec.Struct, frozen=True, gc=False):
    """A call was handed to a worker."""

    TYPE: ClassVar[str] = "plugin.call.started"
    tool: str
    request_id: str


class CallFinished(msgspec.Struct, frozen=True, gc=False):
    """A call that had started came to its end, however that was."""

    TYPE: ClassVar[str] = "plugin.call.finished"
    tool: str
    request_id: str
    ok: bool
    duration_ms: float
    error_type: str | None = None
    reason_code: str | None = None
    broke: bool = False  # the plugin is to blame; bad input is not


class CallProgress(msgspec.Struct, frozen=True, gc=False):
    """A running call said how far it is."""

    TYPE: ClassVar[str] = "plugin.call.progress"
    tool: str
    request_id: str
    done: float
    total: float


class PluginLog(msgspec.Struct, frozen=True, gc=False):
    """A line the plugin wrote; `dropped` lines before it were over the rate limit."""

    TYPE: ClassVar[str] = "plugin.log"
    stream: str  # "output" (descriptors 1 and 2) or "log" (context.log)
    level: str
    message: str
    dropped: int = 0


class WorkerStarted(msgspec.Struct, frozen=True, gc=False):
    """A worker process exists; the plugin has not been touched yet."""

    TYPE: ClassVar[str] = "worker.started"
    pid: int
    incarnation: int


class WorkerExited(msgspec.Struct, frozen=True, gc=False):
    """A worker process is gone; `verdict` is a reason code, or `stopped` where we ended a healthy one."""

    TYPE: ClassVar[str] = "worker.exited"
    pid: int
    incarnation: int
    verdict: str
    reason: str | None = None
    exit_code: int | None = None
    signal: str | None = None


class EngineStarted(msgspec.Struct, frozen=True, gc=False):
    """An engine opened this log; whatever ran before it is over."""

    TYPE: ClassVar[str] = "engine.started"
    version: str
    pid: int


class EngineStopping(msgspec.Struct, frozen=True, gc=False):
    """The engine takes no more calls."""

    TYPE: ClassVar[str] = "engine.stopping"


class Gap(msgspec.Struct, frozen=True, gc=False):
    """Events `first` to `last` could not be kept; this one stands in their place, numbered `first`."""

    TYPE: ClassVar[str] = "gap"
    first: int
    last: int
    why: str


EventData: TypeAlias = (
    Transition
    | Restarted
    | CallStarted
    | CallFinished
    | CallProgress
    | PluginLog
    | WorkerStarted
    | WorkerExited
    | EngineStarted
    | EngineStopping
    | Gap
)

DATA_TYPES: dict[str, type[EventData]] = {
    data.TYPE: data
    for data in (
        Transition,
        Restarted,
        CallStarted,
        CallFinished,
        CallProgress,
        PluginLog,
        WorkerStarted,
        WorkerExited,
        EngineStarted,
        EngineStopping,
        Gap,
    )
}
EVENT_TYPES = tuple(DATA_TYPES)


class Event(msgspec.Struct, frozen=True, gc=False):
    """One numbered event. `time_ns` is nanoseconds since the epoch, UTC."""

    sequence: int
    time_ns: int
    subject: str | None  # the plugin's name
    data: EventData

    @property
    def type(self) -> str:
        """The kind of event, without the `holdfast.` prefix."""
        return self.data.TYPE

    @property
    def time(self) -> str:
        """RFC 3339, UTC, microseconds."""
        return rfc3339(self.time_ns)

    @property
    def end(self) -> int:
        """The last number it stands for: its own, or for a gap the last that is missing."""
        return self.data.last if isinstance(self.data, Gap) else self.sequence


class CloudEvent(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """The form outside the process: CloudEvents 1.0, structured mode."""

    specversion: str = "1.0"
    id: str
    source: str
    type: str
    subject: str | None = None
    time: str
    datacontenttype: str = "application/json"
    sequence: int
    data: Any


_encoder = msgspec.json.Encoder()
_envelope_decoder = msgspec.json.Decoder(CloudEvent)
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


def rfc3339(time_ns: int) -> str:
    """Nanoseconds since the epoch as RFC 3339 in UTC, with microseconds. Texts order as their times do."""
    second, microsecond = divmod(time_ns // 1000, 1_000_000)
    return _within_the_second(second) % microsecond


@lru_cache(maxsize=16)
def _within_the_second(second: int) -> str:
    # The same for all of a second; `%` formats a number in half the time of an f-string.
    return (_EPOCH + timedelta(seconds=second)).isoformat()[:19] + ".%06dZ"


def rfc3339_all(times_ns: Iterable[int]) -> list[str]:
    """`rfc3339` of each; asked for once a second, not once an event."""
    times = []
    begins, ends, form = 0, 0, ""
    for time_ns in times_ns:
        if not begins <= time_ns < ends:
            second = time_ns // 1_000_000_000
            begins, form = second * 1_000_000_000, _within_the_second(second)
            ends = begins + 1_000_000_000
        times.append(form % ((time_ns - begins) // 1000))
    return times


def encode(event: Event, source: str) -> bytes:
    """The event as CloudEvents JSON, one line."""
    data = event.data
    return encode_line(event.sequence, data.TYPE, event.subject, event.time_ns, data, source)


def encode_line(
    sequence: int, kind: str, subject: str | None, time_ns: int, data: EventData | msgspec.Raw, source: str
) -> bytes:
    """`encode` of an event's parts; of its data may be there what it was encoded to, which stays as it is."""
    return _encoder.encode(
        CloudEvent(
            id=str(sequence),
            source=source,
            type=TYPE_PREFIX + kind,
            subject=subject,
            time=rfc3339(time_ns),
            sequence=sequence,
            data=data,
        )
    )


def decode(line: bytes | str) -> Event:
    """The reverse of `encode`.

    Raises:
        msgspec.ValidationError: it is not one of our events.
    """
    envelope = _envelope_decoder.decode(line)
    kind = DATA_TYPES.get(envelope.type.removeprefix(TYPE_PREFIX))
    if kind is None:
        raise msgspec.ValidationError(f"unknown event type {envelope.type!r}")
    time_ns = (datetime.fromisoformat(envelope.time) - _EPOCH) // timedelta(microseconds=1) * 1000
    return Event(envelope.sequence, time_ns, envelope.subject, msgspec.convert(envelope.data, kind))
