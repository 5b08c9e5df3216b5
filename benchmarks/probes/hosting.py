"""Engines with some plugins in them, everything on that a real call pays."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, TypeVar

from benchmarks import subjects
from engine import Engine, Outcome, Settings

T = TypeVar("T")

_SOURCES = Path(subjects.__file__).parent
_PLAIN_TOOLS = ("noop", "spin", "spin_in_c", "emit")
_FRAME_TOOLS = ("number", "picture")


def write_plain(folder: Path, count: int, timeout_s: float = 60.0) -> Path:
    """Trivial plugins, `plain-0` and on, into a folder; returns it."""
    for number in range(count):
        _write(folder, f"plain-{number}", "plain", _PLAIN_TOOLS, timeout_s)
    return folder


def write_frames(folder: Path) -> None:
    """The plugin that takes frames, into the same folder."""
    # Its source is copied, never imported here: numpy belongs to its worker.
    _write(folder, "frames", "frames", _FRAME_TOOLS, 60.0)


def settings(folder: Path, **changes: Any) -> Settings:
    """Of an engine that hosts the plugins of `folder`, and keeps its data beside it."""
    data_dir = folder.parent / "data"
    return Settings(plugin_dirs=(folder,), bundled=False, entry_points=False, data_dir=data_dir, **changes)


@asynccontextmanager
async def hosting(folder: Path, **changes: Any) -> AsyncIterator[Engine]:
    """An engine whose plugins are all in service.

    Raises:
        RuntimeError: one of them is not; with its reason.
    """
    async with Engine(settings(folder, **changes)) as engine:
        check_in_service(engine)
        yield engine


def check_in_service(engine: Engine) -> None:
    """Look at every plugin.

    Raises:
        RuntimeError: one of them is not in service; with its reason.
    """
    for health in engine.plugins():
        if health.state != "INITIALIZED":
            raise RuntimeError(f"{health.name} is {health.state}: {health.reason}")


def value_of(outcome: Outcome) -> Any:
    """What a call returned.

    Raises:
        RuntimeError: it did not.
    """
    if not outcome.ok:
        raise RuntimeError(f"{outcome.error_type}: {outcome.error}")
    return outcome.value


def run(work: Coroutine[Any, Any, T], loop: str = "asyncio") -> T:
    """Run to the end on a loop of asyncio's own, or of uvloop's."""
    factory: Callable[[], asyncio.AbstractEventLoop] = asyncio.SelectorEventLoop
    if loop == "uvloop":
        import uvloop

        factory = uvloop.new_event_loop
    with asyncio.Runner(loop_factory=factory) as runner:
        return runner.run(work)


def _write(folder: Path, name: str, module: str, tools: tuple[str, ...], timeout_s: float) -> None:
    plugin = folder / name
    plugin.mkdir(parents=True)
    lines = [f'name = "{name}"', 'version = "1.0.0"', f'entry = "{module}:{module.title()}"']
    lines += ["[limits]", f"timeout_s = {timeout_s}", *(f"[tools.{tool}]" for tool in tools)]
    (plugin / "plugin.toml").write_text("\n".join(lines) + "\n")
    shutil.copy(_SOURCES / f"{module}.py", plugin)
