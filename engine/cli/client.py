"""One seam for both ways to reach a plugin: an engine of our own, or a server.

`LocalClient` and `HttpClient` make the same `Answer` of a call and hand its items and progress to the same sink,
so that what a person sees does not depend on where the plugin runs.
"""

from __future__ import annotations

from typing import Protocol

import msgspec
from msgspec import UNSET, UnsetType

from engine.cli.arguments import Form
from engine.cli.console import ExitCode
from engine.errors import ReasonCode

_WRONG_USE = frozenset(
    {ReasonCode.UNKNOWN_PLUGIN, ReasonCode.UNKNOWN_TOOL, ReasonCode.BAD_INPUT, ReasonCode.INPUT_TOO_LARGE}
)


class Reply(msgspec.Struct, frozen=True, omit_defaults=True):
    """A call's outcome, in the form of the HTTP API; its error answers fit too, and are not `ok`."""

    ok: bool | UnsetType = UNSET
    value: msgspec.Raw | UnsetType = UNSET  # JSON
    error: str | None = None
    error_type: str | None = None
    reason_code: str | None = None
    state: str | None = None
    duration_ms: float | None = None
    request_id: str | None = None

    @property
    def exit_code(self) -> ExitCode:
        """What the process ends with after this outcome."""
        if self.ok is True:
            return ExitCode.FINE
        if self.reason_code == ReasonCode.ENGINE_STOPPING:
            return ExitCode.NO_SERVER
        return ExitCode.WRONG_USE if self.reason_code in _WRONG_USE else ExitCode.PLUGIN_FAILED


class Answer(msgspec.Struct, frozen=True):
    """What a call came to. `content` is set where the tool is known to have returned bytes."""

    reply: Reply
    streamed: bool
    content: bytes | None = None


class Sink(Protocol):
    """Takes what comes while a call runs."""

    async def item(self, data: bytes) -> None:
        """One item of a streaming tool, as JSON; returns when the next may come."""

    def progress(self, done: float, total: float) -> None:
        """How far the tool is."""


class Client(Protocol):
    """Runs tools."""

    async def call(self, plugin: str, tool: str, form: Form, sink: Sink) -> Answer:
        """Run a tool to its end.

        Raises:
            Failure: there is nobody to run it.
        """


decode_reply = msgspec.json.Decoder(Reply).decode
