"""An engine of our own, in this process, for one call: only the plugin that is asked for is started."""

from __future__ import annotations

import asyncio
import tempfile
from pathlib import Path
from types import TracebackType

import msgspec
from msgspec.structs import replace

from engine.api.answers import no_json, tell
from engine.cli.arguments import Form
from engine.cli.client import Answer, Sink, decode_reply
from engine.cli.console import ExitCode, Failure
from engine.cli.logs import log_to_stderr
from engine.engine import Engine
from engine.loader.discovery import Candidate, discover
from engine.outcome import CallFailed, Outcome, encode_hook
from engine.registry import did_you_mean
from engine.sandbox import values
from engine.sandbox.wire import Encoded
from engine.settings import Settings, bundled_dir

_encoder = msgspec.json.Encoder(enc_hook=encode_hook)


class LocalClient:
    """Runs tools in this process's own engine, with a temporary data folder.

    Args:
        settings: where plugins are looked for.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings

    async def __aenter__(self) -> LocalClient:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass

    async def call(self, plugin: str, tool: str, form: Form, sink: Sink) -> Answer:
        """Run a tool to its end; its files are read where they are."""
        log_to_stderr("error")
        candidate = await asyncio.to_thread(self._find, plugin)
        with tempfile.TemporaryDirectory(prefix="holdfast-", ignore_cleanup_errors=True) as data_dir:
            async with Engine(one_shot(self._settings, (candidate.folder,), Path(data_dir))) as engine:
                return await _call(engine, plugin, tool, form, sink)

    def _find(self, plugin: str) -> Candidate:
        settings = self._settings
        bundled = bundled_dir() if settings.bundled else None
        found = discover(settings.plugin_dirs, bundled=bundled, entry_points=settings.entry_points)
        for candidate in found:
            if candidate.name == plugin:
                if candidate.problem is not None:
                    raise Failure(ExitCode.PLUGIN_FAILED, f"`{plugin}` is FAILED: {candidate.problem.reason}")
                return candidate
        near = did_you_mean(plugin, [candidate.name for candidate in found])
        raise Failure(ExitCode.WRONG_USE, f"there is no plugin `{plugin}`{near}")


def one_shot(settings: Settings, plugin_dirs: tuple[Path, ...], data_dir: Path) -> Settings:
    """The settings of an engine that hosts these plugins and no others, and waits for nobody when it ends."""
    return replace(
        settings,
        plugin_dirs=plugin_dirs,
        bundled=False,
        entry_points=False,
        data_dir=data_dir,
        drain_s=0.0,
        stream_stall_s=86_400.0,  # who reads our stdout may take as long as it likes
        stop_grace_s=min(settings.stop_grace_s, 0.5),
    )


async def _call(engine: Engine, plugin: str, tool: str, form: Form, sink: Sink) -> Answer:
    parts = {name: text if isinstance(text, str) else values.FilePart(str(text)) for name, text in form.items()}
    arguments = Encoded("form", values.Encoder(None).encode(parts))
    streamed = any(known.name == tool and known.streams for known in engine.describe(plugin).tools)
    stream = engine.stream(plugin, tool, arguments, on_progress=sink.progress)
    try:
        async for item in stream:
            try:
                data = _encoder.encode(item)
            except Exception as exc:  # a worker's value may be anything that MessagePack can hold
                return _answer(engine, plugin, no_json(exc, None, ""), streamed)
            await sink.item(data)
    except CallFailed as failed:
        return _answer(engine, plugin, failed.outcome, streamed)
    assert stream.outcome is not None  # noqa: S101 - what ends the iteration
    return _answer(engine, plugin, stream.outcome, streamed)


def _answer(engine: Engine, plugin: str, outcome: Outcome, streamed: bool) -> Answer:
    reply = decode_reply(tell(outcome, engine, plugin).body)
    return Answer(reply, streamed, outcome.value if isinstance(outcome.value, bytes) else None)
