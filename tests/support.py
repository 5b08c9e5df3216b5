"""Plugins written on the spot, engines that host them, and what must be gone afterwards."""

from __future__ import annotations

import asyncio
import os
import re
import textwrap
from collections import Counter
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import psutil
import pytest

from engine import Engine, Settings
from engine.sandbox.channel import Channel
from engine.sandbox.host import Worker
from events.envelope import Event

# The head of a plugin that speaks on its worker's channel.
FINDS_ITS_CHANNEL = """
import os, struct
CHANNEL = next(
    int(fd) for fd in os.listdir("/proc/self/fd")
    if os.path.lexists(f"/proc/self/fd/{fd}") and os.readlink(f"/proc/self/fd/{fd}").startswith("socket:")
)
"""
HONEST = """
class Plugin:
    def __init__(self, context): pass
    def validate(self): pass
    def echo(self, text: str = "hello") -> str: return text
"""


def import_from(folder: Path, monkeypatch: pytest.MonkeyPatch, **modules: str) -> None:
    """In workers, before all else; a folder that is made, with modules of this source, where there are any."""
    for name, source in modules.items():
        folder.mkdir(exist_ok=True)
        (folder / f"{name}.py").write_text(source)
    paths = [str(folder), os.environ.get("PYTHONPATH", "")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths).rstrip(os.pathsep))


def write_plugin(
    root: Path,
    name: str,
    code: str,
    tools: Iterable[str] | dict[str, str] = (),
    limits: str = "",
    head: str = "",
) -> Path:
    """A plugin folder `root/name` whose class is `Plugin` in plugin.py; returns the folder.

    Args:
        root: a plugins folder.
        name: the plugin's.
        code: of plugin.py.
        tools: their names, or name → the lines of their table.
        limits: lines of `[limits]`.
        head: more top-level lines of the manifest.
    """
    folder = root / name
    folder.mkdir(parents=True, exist_ok=True)
    tables = tools if isinstance(tools, dict) else dict.fromkeys(tools, "")
    manifest = f'name = "{name}"\nversion = "1.0.0"\nentry = "plugin:Plugin"\n{textwrap.dedent(head)}\n'
    if limits:
        manifest += f"[limits]\n{textwrap.dedent(limits)}\n"
    for tool, lines in tables.items():
        manifest += f"[tools.{tool}]\n{textwrap.dedent(lines)}\n"
    (folder / "plugin.toml").write_text(manifest)
    (folder / "plugin.py").write_text(textwrap.dedent(code))
    return folder


def write_honest(root: Path, name: str = "honest") -> Path:
    """A plugin that does nothing wrong, with the tool `echo`."""
    return write_plugin(root, name, HONEST, ["echo"])


def settings_for(root: Path, data_dir: Path, **changes: Any) -> Settings:
    """Settings of an engine that hosts the plugins below `root` and no others."""
    base = Settings(plugin_dirs=(root,), bundled=False, entry_points=False, data_dir=data_dir)
    return msgspec.structs.replace(base, **changes)


@asynccontextmanager
async def hosting(root: Path, data_dir: Path, **changes: Any) -> AsyncIterator[Engine]:
    """An engine hosting `root`; on leaving, nothing it started may be left."""
    async with Engine(settings_for(root, data_dir, **changes)) as engine:
        yield engine
    assert not engine.faults, engine.faults


async def next_event(engine: Engine, kind: str, plugin: str | None = None, after: int = 0) -> Event:
    """The first event of a kind after a number; waits for it."""
    async for event in engine.events(after):
        if event.type == kind and plugin in (None, event.subject):
            return event
    raise AssertionError(f"the log ended without {kind}")


def only_worker(engine: Engine, name: str) -> Worker:
    """Of a plugin that has one and is in service."""
    pool = engine.registry.get(name).pool
    assert pool is not None
    (worker,) = pool.workers
    return worker


async def until(condition: Any, timeout_s: float = 20.0) -> None:
    """Wait for a condition that no event announces (a process or a file being gone).

    Raises:
        TimeoutError: it did not come true.
    """
    async with asyncio.timeout(timeout_s):
        while not condition():  # noqa: ASYNC110 - nothing announces it
            await asyncio.sleep(0.005)


def feed(channel: Channel, data: bytes) -> None:
    """Bytes that arrive on a channel, as a transport hands them over."""
    left = memoryview(data)
    while left:
        room = channel.get_buffer(-1)
        count = min(len(room), len(left))
        room[:count] = left[:count]
        left = left[count:]
        channel.buffer_updated(count)


def descendants(pid: int | None = None) -> set[int]:
    """Every process below this one, zombies too."""
    return {child.pid for child in psutil.Process(pid).children(recursive=True)}


def open_descriptors() -> set[str]:
    """What this process holds open, as `fd → target`, without what reading it opens."""
    held = set()
    for entry in Path("/proc/self/fd").iterdir():
        try:
            held.add(f"{entry.name} → {entry.readlink()}")
        except FileNotFoundError:  # the listing's own descriptor
            continue
    return held


def held() -> Counter[str]:
    """What this process holds open, by kind: how many sockets, pipes, memfds, and of each file.

    But for what lies in /proc, where the watches look now and then; what stays is found at the end of a test.
    """
    kinds = (re.sub(r"^\d+ → ", "", entry) for entry in open_descriptors())
    return Counter(re.sub(r":\[\d+\]$", "", kind) for kind in kinds if not kind.startswith("/proc"))
