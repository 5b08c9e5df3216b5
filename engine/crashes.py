"""A crash bundle: how and why a worker died, with the evidence, as one JSON document of at most 64 KiB."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import msgspec

from engine.errors import ReasonCode
from engine.sandbox import evidence
from engine.sandbox.evidence import By, Death, Failure, Process, Sender
from engine.sandbox.fingerprint import Argument

MAX_BYTES = 64 * 1024
_STACK_CHARS = 24_000
_OUTPUT_CHARS = 16_000
_REASON_CHARS = 2_000
_NAME_CHARS = 200
_MAX_PROCESSES = 16
_MAX_MODULES = 200


class CrashMemory(msgspec.Struct, frozen=True, kw_only=True):
    """Memory when it held the most, as far as was looked: looks are `memory_interval_s` apart."""

    limit: str | None  # the one that was met: "tree" | "process" | "machine"; null: it did not die of memory
    limit_bytes: int
    peak_bytes: int  # resident, the worker and everything it started; 0: never looked at
    # Whose it was, the largest first; the worker itself is the one with its pid. Empty below half of the limit.
    processes: tuple[Process, ...]


class Crash(msgspec.Struct, frozen=True, kw_only=True):
    """How and why a worker died, with the evidence. Never the contents of a call's arguments.

    What the plugin itself printed or put into an exception stands here as it came.
    """

    plugin: str
    incarnation: int
    pid: int
    time: str  # RFC 3339, UTC
    reason_code: ReasonCode
    reason: str
    by: By
    exit_code: int | None
    signal: str | None
    signal_sender: Sender | None
    signal_sent_at: str  # where in the plugin, if it sent the signal itself
    memory: CrashMemory
    error: Failure | None  # the exception, where there was one
    stack: str  # of all threads, as faulthandler wrote it; "" where it did not
    native_library: str | None  # null: not known
    extension_modules: tuple[str, ...]  # the native modules that were loaded when it crashed
    output: str  # its last lines
    doing: str  # "`detect`", "import", "__init__", "validate()"; "" when idle
    tool: str | None
    request_id: str | None
    ran_ms: float | None  # how long the call had run
    arguments: tuple[Argument, ...]  # sizes and SHA-256
    truncated: tuple[str, ...]  # names of the fields above that were cut


_encoder = msgspec.json.Encoder()
decode = msgspec.json.Decoder(Crash).decode


def encode(crash: Crash) -> bytes:
    """Its JSON, in at most `MAX_BYTES`: what is long is cut in the middle, and `truncated` names it."""
    for share in (1.0, 0.5, 0.25, 0.01):
        data = _encoder.encode(_cut(crash, share))
        if len(data) <= MAX_BYTES:
            break
    return data


def describe(plugin: str, death: Death) -> Crash:
    """The bundle of a death. Blocking: it hashes the arguments."""
    known, call = death.evidence, death.in_flight
    sender, sent_at = evidence.signal_sender(death)
    return Crash(
        plugin=plugin,
        incarnation=death.incarnation,
        pid=death.pid,
        time=f"{moment(death):%Y-%m-%dT%H:%M:%S.%fZ}",
        reason_code=death.cause.reason_code,
        reason=death.cause.reason,
        by=evidence.ended_by(death),
        exit_code=death.status.code,
        signal=death.status.signal_name,
        signal_sender=sender,
        signal_sent_at=sent_at,
        memory=CrashMemory(
            limit=evidence.memory_limit(death),
            limit_bytes=known.memory_limit_bytes,
            peak_bytes=known.memory_peak_bytes,
            processes=death.processes[:_MAX_PROCESSES],
        ),
        error=death.failure,
        stack=known.stack,
        native_library=evidence.native_library(death),
        extension_modules=evidence.extension_modules(known.stack),
        output=known.output_tail,
        doing=known.doing if call is None else f"`{call.tool}`",
        tool=None if call is None else call.tool,
        request_id=None if call is None else call.request_id,
        ran_ms=None if call is None else call.ran_s * 1000,
        arguments=() if call is None else call.fingerprints(),
        truncated=(),
    )


def _cut(crash: Crash, share: float) -> Crash:
    long: dict[str, int] = {
        "stack": int(_STACK_CHARS * share),
        "output": int(_OUTPUT_CHARS * share),
        **dict.fromkeys(
            ("reason", "doing", "signal_sent_at", "tool", "request_id", "native_library"), _NAME_CHARS
        ),
        "reason": _REASON_CHARS,
    }
    changed: dict[str, Any] = {
        name: _shortened(text, limit)
        for name, limit in long.items()
        if (text := getattr(crash, name)) is not None and len(text) > limit
    }
    modules = crash.extension_modules[: int(_MAX_MODULES * share)]
    shown = tuple(_shortened(name, _NAME_CHARS) for name in modules)
    if shown != crash.extension_modules:
        changed["extension_modules"] = shown
    if (error := crash.error) is not None:
        cut = Failure(
            _shortened(error.error_type, _NAME_CHARS),
            _shortened(error.message, _REASON_CHARS),
            _shortened(error.where, _NAME_CHARS),
        )
        if cut != error:
            changed["error"] = cut
    return msgspec.structs.replace(crash, **changed, truncated=tuple(changed))


def _shortened(text: str, limit: int) -> str:
    """Both ends: the first lines say what happened, and the main thread is the last in a stack."""
    half = limit // 2
    return text if len(text) <= limit else f"{text[:half]}\n… {len(text) - 2 * half} characters …\n{text[-half:]}"


def moment(death: Death) -> datetime:
    """When it died, by the clock."""
    return datetime.fromtimestamp(death.time_ns / 1e9, UTC)
