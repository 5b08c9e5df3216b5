"""What a call to a worker comes to, and where its signs of life go on the way."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, TypeAlias

import msgspec

from engine.errors import Cause, ReasonCode
from engine.sandbox.channel import Channel
from engine.sandbox.wire import Encoded


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


class Invocation(Protocol):
    """A call as a worker sees it: what to run, and where its signs of life and its reply go."""

    tool: str
    arguments: Mapping[str, Any] | Encoded  # by name, or already encoded
    timeout_s: float  # time for which the caller held the worker up does not count
    request_id: str  # for the evidence, should the worker die

    @property
    def announce(self) -> bool:
        """Whether `began` is wanted."""

    @property
    def holds_up(self) -> bool:
        """Whether its consumer may pause the channel."""

    def begins(self) -> None:
        """The worker was sent it, and runs no other. Must not raise."""

    def turned_away(self, cause: Cause) -> None:
        """It will not begin: the plugin has left service. Must not raise."""

    def replied(self, reply: Reply) -> None:
        """It is over, having begun. Called once, on the event loop; must not raise."""

    def began(self) -> None:
        """The arguments were accepted; plugin code runs now."""

    def progress(self, done: float, total: float) -> None:
        """The tool said how far it is."""

    def item(self, value: Any, size_bytes: int, channel: Channel) -> None:
        """One item of a stream. May pause the channel, to resume it once the consumer has caught up."""

    def take_held_s(self) -> float:
        """Seconds for which the consumer held the worker up since the last time this was asked."""
