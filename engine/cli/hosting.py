"""The commands that host plugins themselves: `serve` and `check`."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from engine.cli.console import ExitCode, Failure, note, say, write_json
from engine.cli.logs import log_line, log_to_stderr
from engine.cli.look import show_plugins
from engine.cli.streams import lossy_streams
from engine.engine import VERSION, Engine
from engine.errors import SetupError
from engine.lifecycle.states import State
from engine.settings import Settings, bundled_dir, load
from events.envelope import Event, PluginLog
from events.log import CorruptLog

_WARNINGS = 200  # different ones; beyond, the event log has them


async def serve(settings: Settings) -> ExitCode:
    """Serve until SIGTERM or SIGINT. Prints the address at once, and the plugins once each has settled."""
    from engine.api.app import serve as serve_http

    warnings = _StartWarnings()

    def announce(engine: Engine, url: str) -> None:
        engine.bus.subscribe(warnings)
        say(f"Holdfast {VERSION} serves at {url}")

    def settled(engine: Engine) -> None:
        engine.bus.unsubscribe(warnings)
        plugins = _as_dicts(engine)
        if plugins:
            show_plugins(plugins, brief=True)
        else:
            note("no plugins were found; name a folder of them with --plugins DIR")
        warnings.show()

    with lossy_streams(lambda count: log_line("lines_lost", count=count, why="nobody read them")):
        log_to_stderr("info")
        if sys.stderr.isatty():
            note("starting the plugins; Ctrl-C stops the server")
        try:
            return ExitCode(await serve_http(settings, announce=announce, settled=settled))
        except SetupError as exc:
            raise setup_failure(exc) from exc


class _StartWarnings:
    """What plugins warn of while they start, or are warned of. A subscriber; it keeps the first few hundred."""

    name = "start_warnings"

    def __init__(self) -> None:
        self._plugins: dict[str, list[str]] = {}  # by what is said

    def offer(self, event: Event) -> None:
        """Keep it if it is a warning."""
        if isinstance(event.data, PluginLog) and event.data.level == "warning" and len(self._plugins) < _WARNINGS:
            self._plugins.setdefault(event.data.message, []).append(str(event.subject))

    def show(self) -> None:
        """Each once, with the plugins that it is about."""
        for message, plugins in self._plugins.items():
            note(f"{', '.join(dict.fromkeys(plugins))}: {message}")


async def check(folders: Sequence[Path], *, json: bool) -> ExitCode:
    """Start, validate and stop every plugin in the folders; without any, the bundled ones."""
    from engine.cli.local import one_shot

    log_to_stderr("error")
    settings = load({})
    with tempfile.TemporaryDirectory(prefix="holdfast-", ignore_cleanup_errors=True) as data_dir:
        places = tuple(folder.absolute() for folder in folders) or (bundled_dir(),)
        engine, warnings = Engine(one_shot(settings, places, Path(data_dir))), _StartWarnings()
        try:
            await engine.open()
            engine.bus.subscribe(warnings)
            await engine.settle()
            plugins = _as_dicts(engine)
        except SetupError as exc:
            raise setup_failure(exc) from exc
        finally:
            await engine.close()
    if json:
        write_json(plugins)
    elif plugins:
        show_plugins(plugins, brief=True)
    warnings.show()
    if not plugins:
        raise Failure(
            ExitCode.WRONG_USE, f"no plugin in {', '.join(map(str, places))}; name its folder or the one above"
        )
    unfit = [str(plugin["name"]) for plugin in plugins if plugin["state"] != State.INITIALIZED]
    if unfit:
        note(f"{len(unfit)} of {len(plugins)} not fit: {', '.join(unfit)}; the table says why")
    return ExitCode.PLUGIN_FAILED if unfit else ExitCode.FINE


def _as_dicts(engine: Engine) -> list[dict[str, Any]]:
    return [msgspec.to_builtins(health) for health in engine.plugins()]


def setup_failure(exc: SetupError) -> Failure:
    """Why the engine could not start; for a damaged log, with the flag that helps."""
    corrupt = exc.__cause__
    if isinstance(corrupt, CorruptLog):
        step = "add --repair-log to move it aside and begin a new one"
        return Failure(ExitCode.WRONG_USE, f"{corrupt.path}: {corrupt.why}; {step}")
    return Failure(ExitCode.WRONG_USE, str(exc))
