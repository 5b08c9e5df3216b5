"""Crash bundles on disk: one JSON file for each death of a worker.

    <data_dir>/crashes/<plugin>/<time>-<incarnation>-<pid>.json

At most `crash_bundles` per plugin. Written on a thread of their own, after everybody who waited for the worker
knows its verdict; what cannot be written is a counted fault of the engine, in nobody's way.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import quote

import msgspec
import structlog

from engine.crashes import Crash, decode, describe, encode, moment
from engine.sandbox.evidence import Death

log = structlog.get_logger(__name__)

_MAX_PENDING = 64  # deaths that wait for a slow disk; of more there is no bundle, which is a counted fault
_PENDING_WAIT_S = 2.0  # of a reader
_CLOSE_WAIT_S = 10.0


class CrashStore:
    """The bundles of all plugins. Everything but `read` belongs to the engine's event loop.

    Args:
        folder: for one folder per plugin.
        keep: bundles per plugin; the oldest go first.
        on_fault: counts what could not be kept.
    """

    def __init__(self, folder: Path, keep: int, on_fault: Callable[[str, BaseException], None]) -> None:
        self._folder = folder
        self._keep = keep
        self._on_fault = on_fault
        self._thread = ThreadPoolExecutor(1, "holdfast-crashes")
        self._pending: dict[asyncio.Future[None], tuple[str, Death]] = {}

    def note(self, plugin: str, death: Death) -> None:
        """Keep it; returns at once."""
        if len(self._pending) >= _MAX_PENDING:
            _close(death)
            self._on_fault("crashes", RuntimeError(f"{_MAX_PENDING} crash bundles wait for the disk already"))
            return
        try:
            written = asyncio.get_running_loop().run_in_executor(self._thread, self._write, plugin, death)
        except RuntimeError as exc:  # no thread to be had, or closed
            _close(death)
            self._on_fault("crashes", exc)
            return
        self._pending[written] = plugin, death
        written.add_done_callback(self._written)

    def _written(self, written: asyncio.Future[None]) -> None:
        plugin, death = self._pending.pop(written)
        if written.cancelled():
            _close(death)
        elif (exc := written.exception()) is not None:
            exc.add_note(f"(it was to keep a crash bundle of {plugin})")
            self._on_fault("crashes", exc)

    async def of(self, plugin: str) -> list[Crash]:
        """A plugin's bundles, the newest first, with those of deaths that were noted before."""
        if pending := [written for written, (name, _) in self._pending.items() if name == plugin]:
            await asyncio.wait(pending, timeout=_PENDING_WAIT_S)
        return await asyncio.to_thread(self.read, plugin)

    async def close(self) -> None:
        """Returns once all is written, or the disk was given `_CLOSE_WAIT_S`."""
        if self._pending:
            await asyncio.wait(list(self._pending), timeout=_CLOSE_WAIT_S)
        self._thread.shutdown(wait=False, cancel_futures=True)

    def read(self, plugin: str) -> list[Crash]:
        """A plugin's bundles, the newest first; what is no bundle is left out. Blocking."""
        found = []
        for path in sorted(self._folder_of(plugin).glob("[!.]*.json"), reverse=True):
            try:
                found.append(decode(path.read_bytes()))
            except FileNotFoundError:  # removed meanwhile, for a newer one
                continue
            except (OSError, msgspec.DecodeError) as exc:
                log.warning("crash_unreadable", path=str(path), error=str(exc))
        return found

    def _folder_of(self, plugin: str) -> Path:
        return self._folder / quote(plugin, safe="@").replace(".", "%2E")

    def _write(self, plugin: str, death: Death) -> None:
        try:
            crash = describe(plugin, death)
        finally:
            _close(death)
        folder = self._folder_of(plugin)
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        path = folder / f"{moment(death):%Y%m%dT%H%M%S.%fZ}-{death.incarnation}-{death.pid}.json"
        partial = folder / f".{path.name}"
        try:
            with open(partial, "wb", opener=_private) as file:
                file.write(encode(crash))
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
        self._prune(folder, path)

    def _prune(self, folder: Path, newest: Path) -> None:
        """All but the latest; the one just written stays, even after the clock went backwards."""
        with os.scandir(folder) as entries:
            names = [entry.name for entry in entries if entry.name.endswith(".json")]
        # What begins with a dot was being written when the engine was killed.
        partial = [name for name in names if name.startswith(".")]
        older = sorted(set(names).difference(partial, [newest.name]), reverse=True)
        for name in (*older[self._keep - 1 :], *partial):
            (folder / name).unlink(missing_ok=True)


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def _close(death: Death) -> None:
    if death.in_flight is not None:
        death.in_flight.close()
