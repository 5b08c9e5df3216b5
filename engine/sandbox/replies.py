"""What a call to a worker comes to, and where its signs of life go on the way."""

from __future__ import annotations

from typing import Any, Protocol, TypeAlias

import msgspec

from engine.errors import Cause, ReasonCode
from engine.sandbox.channel import Channel


class Value(msgspec.Struct, frozen=True):
    """A tool's result."""

    value: Any


class Rejected(msgspec.Struct, frozen=True):
    """The caller's input was bad; the plugin is as it was."""

    error_type: str
    message: str
    reason_code: ReasonCode = ReasonCode.BAD_INPUT


class Broken(msgspec.Struct, frozen=True):
    """The plugin broke. `error_type` is the exception's, where there was one."""

    cause: Cause
    error_type: str = ""


Reply: TypeAlias = Value | Rejected | Broken


class Sink(Protocol):
    """Where a running call's signs of life go. `held_s` is how long the caller kept the worker waiting."""

    def began(self) -> None:
        """The arguments were accepted; plugin code runs now."""

    def progress(self, done: float, total: float) -> None:
        """The tool said how far it is."""

    def item(self, value: Any, size_bytes: int, channel: Channel) -> None:
        """One item of a stream. May pause the channel, to resume it once the consumer has caught up."""

    def take_held_s(self) -> float:
        """Seconds for which the consumer held the worker up since the last time this was asked."""
