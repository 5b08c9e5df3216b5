"""Making the audit's lines: structlog fields → level · order · redact · chain → JSON."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any, Literal, TypeAlias

import msgspec
import structlog

from events.audit_verify import NOTHING, digest
from events.envelope import CallFinished, Event, EventData, Gap, Transition, rfc3339_all
from events.redact import Fields, redactor, suspicion

Level: TypeAlias = Literal["info", "warning", "error"]

_encoder = msgspec.json.Encoder()


def level_of(data: EventData) -> Level:
    """`error` where a plugin broke or events were lost, `warning` where one cannot work here, else `info`."""
    if isinstance(data, CallFinished):
        return "error" if data.broke else "info"
    if isinstance(data, Transition):
        return "error" if data.to == "FAILED" else "warning" if data.to == "UNAVAILABLE" else "info"
    return "error" if isinstance(data, Gap) else "info"


class _Line(msgspec.Struct, gc=False):
    """Of an event, in the order a person reads in: number, time, level, what, whose, the rest."""

    sequence: int
    time: str
    level: Level
    event: str
    plugin: str | msgspec.UnsetType
    data: EventData


class Chain:
    """The last processor: renders lines without secrets, links each to the one before, keeps them until taken."""

    def __init__(self, secrets: Sequence[str]) -> None:
        self.head = NOTHING
        self._rendered: list[bytes] = []
        self._suspicious = suspicion(secrets)
        self._redact = redactor(secrets)

    def __call__(self, logger: Any, level: str, fields: Fields) -> bytes:
        encoded = _encoder.encode_lines(fields["lines"])
        lines = encoded.split(b"\n")
        lines.pop()  # what follows the last line's end
        if self._suspicious(encoded):
            lines = [self._clean(logger, level, line) if self._suspicious(line) else line for line in lines]
        head = self.head
        for number, line in enumerate(lines):
            lines[number] = linked = b'%b,"prev":"%b"}\n' % (line[:-1], head.encode())
            head = digest(linked)
        self.head = head
        return b"".join(lines)

    def _clean(self, logger: Any, level: str, line: bytes) -> bytes:
        return _encoder.encode(self._redact(logger, level, msgspec.json.decode(line)))

    def keep(self, rendered: bytes) -> None:
        """The sink that structlog calls with the rendered lines."""
        self._rendered.append(rendered)

    info = keep

    def take(self) -> bytes:
        """The lines rendered since the last call."""
        rendered, self._rendered = self._rendered, []
        return b"".join(rendered)


class Emitter(structlog.BoundLoggerBase):
    """Makes lines of events and of notes; a field's name is never a plugin's to choose."""

    @classmethod
    def into(cls, chain: Chain) -> Emitter:
        """One whose lines end in `chain`."""
        made = structlog.wrap_logger(chain, processors=[chain], wrapper_class=cls, context_class=dict).bind()
        assert isinstance(made, cls)  # noqa: S101 - for the type checker
        return made

    def emit(self, lines: Sequence[_Line | Fields]) -> None:
        """Lines of these fields, in this order; one of them is `event`.

        Many at once: what structlog does for a call takes longer than all the rest of a line.
        """
        self._proxy_to_logger("info", None, lines=lines)

    def emit_events(self, events: Sequence[Event]) -> None:
        """The events' lines."""
        times = rfc3339_all(event.time_ns for event in events)
        self.emit([_line(event, time) for event, time in zip(events, times, strict=True)])

    def emit_note(self, name: str, *, after: int, **fields: Any) -> None:
        """A line about the audit itself; `after` is the event it follows."""
        time = datetime.now(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")
        self.emit([{"time": time, "level": "warning", "event": name, "after": after, **fields}])


def _line(event: Event, time: str) -> _Line:
    data, subject = event.data, event.subject
    return _Line(
        event.sequence, time, level_of(data), data.TYPE, msgspec.UNSET if subject is None else subject, data
    )
