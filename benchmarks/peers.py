"""The peers, each used as its documentation shows, with one worker and its own defaults otherwise."""

from __future__ import annotations

import asyncio
import concurrent.futures
import shutil
import threading
import time
from collections.abc import Callable, Coroutine
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol, TypeVar

from benchmarks import misbehave
from benchmarks.cells import GRACE_S, MEMORY_LIMIT_MIB, NEXT_CALL_S, Answer
from engine import Engine, Settings

T = TypeVar("T")

_MANIFEST = """\
name = "{name}"
version = "1.0.0"
entry = "misbehave:Plugin"
[limits]
timeout_s = {limit_s}
memory_mib = {memory_mib}
[tools.work]
[tools.misbehave]
"""


class Peer(Protocol):
    """What is measured."""

    def start(self) -> None:
        """Ready to be called."""

    def call(self, fault: str) -> Answer:
        """The call that breaks."""

    def work(self) -> Answer:
        """An honest call: on the same pool, or of another plugin of the same engine."""

    def close(self) -> None:
        """As its documentation has it."""


class Pool:
    """A pool of processes with the interface of `concurrent.futures`."""

    def __init__(self, limit_s: float, _folder: Path) -> None:
        self.limit_s = limit_s

    def start(self) -> None:
        """Make the pool."""
        self.pool = self.make()

    def make(self) -> Any:
        """A pool with one worker."""
        return concurrent.futures.ProcessPoolExecutor(max_workers=1)

    def submit(self, limit_s: float, function: Callable[..., object], *args: object) -> Any:
        """A future. These pools have no limit for a call: `limit_s` is only the caller's own patience."""
        del limit_s
        return self.pool.submit(function, *args)

    def call(self, fault: str) -> Answer:
        """The call that breaks."""
        return self._ask(self.limit_s, self.limit_s + GRACE_S, misbehave.misbehave, fault)

    def work(self) -> Answer:
        """The next call, on the same pool."""
        answer = self._ask(self.limit_s, NEXT_CALL_S, misbehave.work)
        return answer if answer.text == misbehave.WORKED else _but(answer)

    def close(self) -> None:
        """Wait for the workers, as leaving its `with` block does."""
        self.pool.shutdown()

    def _ask(self, limit_s: float, patience_s: float, function: Callable[..., object], *args: object) -> Answer:
        started_s = time.monotonic()
        future = None
        try:
            future = self.submit(limit_s, function, *args)
            value = future.result(timeout=patience_s)
        except BaseException as exc:  # the pools hand the worker's exception over, SystemExit too
            after_s = time.monotonic() - started_s
            if future is not None and not future.done():
                return Answer(False, "", f"nothing: still running after {patience_s:g} s", after_s, ended=False)
            return Answer(False, type(exc).__name__, _text(exc), after_s)
        return Answer(True, "", str(value), time.monotonic() - started_s)


class Loky(Pool):
    """loky's reusable executor: asking for it again replaces one that is broken."""

    def make(self) -> Any:
        """The executor, remade if it has to be."""
        return import_module("loky").get_reusable_executor(max_workers=1)

    def submit(self, limit_s: float, function: Callable[..., object], *args: object) -> Any:
        """Asked for anew before each call: that is how it is meant to be used."""
        self.pool = self.make()
        return super().submit(limit_s, function, *args)


class Pebble(Pool):
    """pebble's pool, which ends a call at its timeout."""

    def make(self) -> Any:
        """A pool with one worker."""
        return import_module("pebble").ProcessPool(max_workers=1)

    def submit(self, limit_s: float, function: Callable[..., object], *args: object) -> Any:
        """With pebble's own limit."""
        return self.pool.schedule(function, args=args, timeout=limit_s)

    def close(self) -> None:
        """As leaving its `with` block does."""
        self.pool.close()
        self.pool.join()


class Holdfast:
    """An engine on a thread of its own, hosting the same plugin twice: one breaks, the other stays honest."""

    def __init__(self, limit_s: float, folder: Path) -> None:
        self.limit_s = limit_s
        self.folder = folder
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)

    def start(self) -> None:
        """Start both plugins."""
        for name in ("broken", "honest"):
            plugin = self.folder / "plugins" / name
            plugin.mkdir(parents=True)
            manifest = _MANIFEST.format(name=name, limit_s=self.limit_s, memory_mib=MEMORY_LIMIT_MIB)
            (plugin / "plugin.toml").write_text(manifest)
            shutil.copy(misbehave.__file__, plugin / "misbehave.py")
        settings = Settings(
            plugin_dirs=(self.folder / "plugins",),
            bundled=False,
            entry_points=False,
            data_dir=self.folder / "data",
        )
        self._engine = Engine(settings)
        self._thread.start()
        self._wait(self._engine.__aenter__(), GRACE_S * 4)

    def call(self, fault: str) -> Answer:
        """The call that breaks."""
        return self._ask("broken", "misbehave", {"fault": fault}, self.limit_s + GRACE_S)

    def work(self) -> Answer:
        """The other plugin's next call."""
        return self._honest("honest")

    def work_of_broken(self) -> Answer:
        """The next call of the plugin that broke."""
        return self._honest("broken")

    def work_after_restart(self) -> Answer:
        """The same after an operator's `restart`."""
        self._wait(self._engine.restart("broken"), GRACE_S)
        return self._honest("broken")

    def close(self) -> None:
        """Stop the engine and its thread."""
        self._wait(self._engine.close(), GRACE_S * 4)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _honest(self, plugin: str) -> Answer:
        answer = self._ask(plugin, "work", {}, NEXT_CALL_S)
        return answer if not answer.ok or answer.text == misbehave.WORKED else _but(answer)

    def _ask(self, plugin: str, tool: str, arguments: dict[str, object], patience_s: float) -> Answer:
        started_s = time.monotonic()
        try:
            outcome = self._wait(self._engine.run(plugin, tool, arguments), patience_s)
        except TimeoutError:
            after_s = time.monotonic() - started_s
            return Answer(False, "", f"nothing: still running after {patience_s:g} s", after_s, ended=False)
        after_s = time.monotonic() - started_s
        if outcome.ok:
            return Answer(True, "", str(outcome.value), after_s)
        return Answer(False, outcome.error_type or "", outcome.error or "", after_s)

    def _wait(self, work: Coroutine[Any, Any, T], patience_s: float) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(patience_s)


MAKE: dict[str, Callable[[float, Path], Peer]] = {
    "holdfast": Holdfast,
    "pebble": Pebble,
    "loky": Loky,
    "executor": Pool,
}


def _text(exc: BaseException) -> str:
    try:
        return str(exc)
    except Exception as inner:  # the caller was handed an exception that it cannot print
        return f"<its __str__ raises {type(inner).__name__} in the caller's process>"


def _but(answer: Answer) -> Answer:
    return answer if not answer.ok else Answer(False, "WrongValue", answer.text, answer.after_s)
