"""Making the audit's lines: structlog fields → level · order · redact · chain → JSON."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any, Literal, TypeAlias

import msgspec
import structlog

from events.audit_verify import NOTHING, digest
from events.envelope import CallFinished, Event, Gap, Transition
from events.redact import Fields, redactor, suspicion

Level: TypeAlias = Literal["info", "warning", "error"]

_encoder = msgspec.json.Encoder()


def level_of(event: Event) -> Level:
    """`error` where a plugin broke or events were lost, `warning` where one cannot work here, else `info`."""
    data = event.data
    if isinstance(data, CallFinished):
        return "error" if data.broke else "info"
    if isinstance(data, Transition):
        return "error" if data.to == "FAILED" else "warning" if data.to == "UNAVAILABLE" else "info"
    return "error" if isinstance(data, Gap) else "info"


class Chain:
    """The last processor: renders a line without secrets, links it to the one before, keeps it until taken."""

    def __init__(self, secrets: Sequence[str]) -> None:
        self.head = NOTHING
        self._lines: list[bytes] = []
        self._suspicious = suspicion(secrets)
        self._redact = redactor(secrets)

    def __call__(self, logger: Any, level: str, fields: Fields) -> bytes:
        fields["prev"] = self.head
        raw = _encoder.encode(fields)
        if self._suspicious(raw):
            raw = _encoder.encode(self._redact(logger, level, msgspec.json.decode(raw)))
        raw += b"\n"
        self.head = digest(raw)
        return raw

    def keep(self, raw: bytes) -> None:
        """The sink that structlog calls with the rendered line."""
        self._lines.append(raw)

    info = warning = error = keep

    def take(self) -> bytes:
        """The lines rendered since the last call."""
        lines, self._lines = self._lines, []
        return b"".join(lines)


class Emitter(structlog.BoundLoggerBase):
    """Makes lines of events and of notes; a field's name is never a plugin's to choose."""

    @classmethod
    def into(cls, chain: Chain) -> Emitter:
        """One whose lines end in `chain`."""
        made = structlog.wrap_logger(chain, processors=[chain], wrapper_class=cls, context_class=dict).bind()
        assert isinstance(made, cls)  # noqa: S101 - for the type checker
        return made

    def emit(self, level: Level, fields: dict[str, Any]) -> None:
        """A line of these fields, in this order; one of them is `event`."""
        (raw,), _ = self._process_event(level, None, fields)
        getattr(self._logger, level)(raw)

    def emit_event(self, event: Event, time: str) -> None:
        """The event's line, in the order a person reads in: number, time, level, what, whose, the rest."""
        level = level_of(event)
        fields = {"sequence": event.sequence, "time": time, "level": level, "event": event.data.TYPE}
        if event.subject is not None:
            fields["plugin"] = event.subject
        fields["data"] = event.data
        self.emit(level, fields)

    def emit_note(self, name: str, *, after: int, **fields: Any) -> None:
        """A line about the audit itself; `after` is the event it follows."""
        time = datetime.now(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")
        self.emit("warning", {"time": time, "level": "warning", "event": name, "after": after, **fields})
