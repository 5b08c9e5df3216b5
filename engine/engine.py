"""The composition root: starts and stops every part, and owns every task."""

from __future__ import annotations

import asyncio
import os
import time
import traceback
import uuid
from collections.abc import AsyncIterator, Coroutine, Mapping
from contextlib import AsyncExitStack
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import msgspec
import structlog

from engine.call import OnProgress, Stream
from engine.crash_store import CrashStore
from engine.crashes import Crash
from engine.description import PluginDescription, describe
from engine.errors import Cause, HoldfastError, ReasonCode, SetupError, UnknownPlugin
from engine.health_json import HealthJson
from engine.lifecycle.states import Trigger
from engine.loader.discovery import discover, reread
from engine.loader.gpu import GpuCheck
from engine.loader.regular_files import nameable
from engine.loader.toml_source import printable
from engine.outcome import Outcome, Refused
from engine.pulse import Pulse
from engine.registry import Incarnation, PluginRegistry
from engine.runner import ToolRunner
from engine.sandbox import cgroup
from engine.sandbox.containment import supported
from engine.sandbox.host import Worker
from engine.sandbox.launcher import remove
from engine.sandbox.limits import MemoryWatch
from engine.sandbox.spawner import Spawner
from engine.sandbox.wire import UPLOADS, Encoded
from engine.settings import CONFIG_FILE, Settings, bundled_dir
from engine.startup import Starter
from events.audit import AuditLog
from events.bus import EventBus, Fault
from events.envelope import EngineStarted, EngineStopping, Event, decode
from events.log import CorruptLog, EventLog, LogUnavailable
from events.metrics import Metrics
from events.projections import Health, HealthProjection, PluginView, health

log = structlog.get_logger(__name__)

try:
    VERSION = version("holdfast")
except PackageNotFoundError:  # a checkout that is not installed
    VERSION = "0"

_DYING_WAIT_S = 2.0  # for a worker that was killed
_RESTARTED = Cause(ReasonCode.RESTARTED, "the plugin was restarted while the call waited; call again")
_STOPPING = Cause(ReasonCode.ENGINE_STOPPING, "the engine stopped while the call waited; call another one")


class Part(msgspec.Struct, frozen=True):
    """One part of the engine, for `/readyz?verbose`."""

    name: str
    ok: bool
    detail: str


class Engine:
    """Hosts plugins. Use as `async with Engine(settings) as engine`.

    Everything but `health`, `plugins` and `describe`, which any thread may call, belongs to one event loop.

    Raises (from entering):
        SetupError: the data folder, the event log or a plugin folder cannot be used; one line, with what to do.
    """

    def __init__(self, settings: Settings | None = None) -> None:
        self.settings = settings or Settings()
        self.instance = f"holdfast/{uuid.uuid4()}"
        self.faults: dict[str, Fault] = {}
        self._tasks: set[asyncio.Task[Any]] = set()
        self._parts: AsyncExitStack | None = None  # what `close` closes, once there is something
        self._starts: dict[str, asyncio.Task[None]] = {}  # the latest of each plugin
        self._restarting: dict[str, asyncio.Lock] = {}
        self._pulse = Pulse()
        self._health_json = HealthJson(self._workers)
        self._settled = False
        self._stopping = False

    async def __aenter__(self) -> Engine:
        await self.open()
        try:
            await self.settle()
        except BaseException:
            await self.close()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    # Start and stop.

    async def open(self) -> None:
        """Open the log, discover and register the plugins. Health is there from now on, all of it LOADED."""
        settings = self.settings
        async with AsyncExitStack() as stack:
            candidates = await asyncio.to_thread(
                discover,
                settings.plugin_dirs,
                bundled=bundled_dir() if settings.bundled else None,
                entry_points=settings.entry_points,
            )
            data_dir = settings.data_dir.absolute()
            await self._open_events(data_dir, stack)
            # Short: plugins put sockets below it (multiprocessing does), whose paths end at 108 bytes.
            self.scratch_root = data_dir / "scratch" / self.instance.rpartition("/")[2][:8]
            self.uploads = self.scratch_root / UPLOADS
            await asyncio.to_thread(_remove_stale, self.scratch_root.parent)
            self._crashes = CrashStore(data_dir / "crashes", settings.crash_bundles, self.note_fault)
            stack.push_async_callback(self._crashes.close)
            private = (data_dir, Path(CONFIG_FILE), settings.token_file, *settings.hidden)
            hidden = tuple(path for path in private if path is not None)
            adopted = await asyncio.to_thread(cgroup.adopt, self.scratch_root.name)
            cgroups = adopted if isinstance(adopted, cgroup.Cgroups) else None
            if cgroups is not None:
                stack.push_async_callback(asyncio.to_thread, self._close_cgroups, cgroups)
            self._cgroup = adopted.text()
            self._spawner = Spawner(self.scratch_root, self.note_fault, hidden, cgroups)
            stack.push_async_callback(self._spawner.close)
            stack.push_async_callback(self._cancel_tasks)
            self._watch = MemoryWatch(settings.memory_interval_s, self.note_fault)
            self._own("memory_watch", self._watch.run())
            self._own("pulse", self._pulse.run())
            gpu = GpuCheck(timeout_s=settings.gpu_check_timeout_s)
            self.registry = PluginRegistry(self.bus)
            self._starter = Starter(
                settings, self.bus, self._spawner, self._watch, gpu, self._crashes, self._fail, self.note_fault
            )
            self._runner = ToolRunner(settings, self.registry, self.bus, self._fail, self.note_fault)
            for candidate in candidates:
                self.registry.begin(candidate)
            self._parts = stack.pop_all()

    async def settle(self) -> None:
        """Start every plugin; returns when each has settled, in service or not. Called again, it only waits."""
        starts = [self._starts.get(each.name) or self._start(each) for each in self.registry.all()]
        if starts:
            await asyncio.wait(starts)
        self._settled = True

    async def close(self) -> None:
        """Stop: no new calls, `drain_s` for those in flight, then the workers, then the log."""
        if self._stopping or self._parts is None:
            return
        self._stopping = True
        self.bus.publish(EngineStopping())
        left = await self._runner.drain(self.settings.drain_s)
        if left:
            log.warning("calls_not_drained", calls=left, drain_s=self.settings.drain_s)
        pools = [incarnation.pool for incarnation in self.registry.all() if incarnation.pool is not None]
        for pool in pools:
            pool.close(_STOPPING)  # for the calls that still wait
        await asyncio.gather(*(pool.end() for pool in pools))
        await self._parts.aclose()

    async def _open_events(self, data_dir: Path, stack: AsyncExitStack) -> None:
        """The log, what reads it, and the bus that goes on where it ends. Closed in reverse: the log last."""
        token = self.settings.token
        await asyncio.to_thread(_make_folder, data_dir)
        redact = [token] if token else []
        self.audit = await asyncio.to_thread(AuditLog.open, data_dir / "audit.jsonl", redact=redact)
        stack.push_async_callback(asyncio.to_thread, self.audit.close)
        self.log = await asyncio.to_thread(self._open_log, data_dir / "events.db")
        stack.push_async_callback(self._close_log)
        await asyncio.to_thread(self.audit.attach, self.log)
        views, last = self.log.load()
        self.bus = EventBus(HealthProjection(views), last=last)
        self.metrics = Metrics()
        self.metrics.watch(bus=self.bus, log=self.log, audit=self.audit, engine_faults=self._fault_count)
        pulse = self._pulse
        self.metrics.gauge("holdfast_loop_lag_seconds", "How late the event loop is.", lambda: pulse.lag_s)
        self.metrics.counter("holdfast_loop_blocks", "How often the event loop was blocked.", lambda: pulse.blocks)
        self.bus.subscribe(self.log)
        self.bus.subscribe(self.metrics)
        self.bus.publish(EngineStarted(VERSION, os.getpid()))

    async def _close_log(self) -> None:
        state = await asyncio.to_thread(self.log.close)
        if state.backlog:
            log.error("events_not_written", events=state.backlog, error=state.error)

    def _close_cgroups(self, cgroups: cgroup.Cgroups) -> None:
        try:
            if not cgroups.close():
                log.error("cgroup_not_removed", path=str(cgroups.group), why="a process in it does not die")
        except OSError as exc:
            log.error("cgroup_not_removed", path=str(cgroups.group), why=str(exc))

    async def _cancel_tasks(self) -> None:
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _open_log(self, path: Path) -> EventLog:
        settings = self.settings
        open_log = partial(
            EventLog.open,
            path,
            source=self.instance,
            backlog=settings.log_backlog,
            retain_events=settings.retain_events,
            retain_days=settings.retain_days,
        )
        try:
            try:
                return open_log()
            except CorruptLog as exc:
                if not settings.repair_log:
                    raise
                aside = EventLog.repair(path)
                log.warning("log_moved_aside", path=str(path), aside=str(aside), why=str(exc))
                return open_log()
        except (CorruptLog, LogUnavailable) as exc:
            raise SetupError(str(exc)) from exc
        except OSError as exc:
            raise _unusable(path.parent, exc) from exc

    # Calls.

    async def run(
        self,
        plugin: str,
        tool: str,
        arguments: Mapping[str, Any] | Encoded | None = None,
        *,
        request_id: str | None = None,
        on_progress: OnProgress | None = None,
    ) -> Outcome:
        """Run a tool. Never raises for a plugin's sake; see `Outcome`.

        Args:
            plugin: its name.
            tool: its name.
            arguments: by parameter name: JSON values, bytes, arrays, paths.
            request_id: stands in the call's events and its outcome; made up if not given.
            on_progress: takes (done, total) of a tool that reports progress.
        """
        return await self._runner.run(
            plugin, tool, arguments or {}, request_id=request_id, on_progress=on_progress
        )

    def refusal(self, plugin: str, tool: str, request_id: str) -> Refused | None:
        """Why a call would be refused whatever its arguments, or None: asked before a large body is read."""
        return self._runner.refusal(plugin, tool, request_id)

    def stream(
        self,
        plugin: str,
        tool: str,
        arguments: Mapping[str, Any] | Encoded | None = None,
        *,
        request_id: str | None = None,
        on_progress: OnProgress | None = None,
    ) -> Stream:
        """Run a streaming tool; iterate over its items as they come. The call begins at once.

        Raises (from iterating):
            CallFailed: after the items that came, unless the outcome is `Completed`.
        """
        stream = Stream(self.settings.stream_items, self.settings.stream_stall_s)
        self._own(
            "stream",
            self._runner.run(
                plugin, tool, arguments or {}, request_id=request_id, stream=stream, on_progress=on_progress
            ),
        )
        return stream

    async def restart(self, name: str) -> Health:
        """End the plugin's incarnation and begin the next one, read again from disk; returns once it has settled.

        Raises:
            UnknownPlugin: there is none of that name.
            SetupError: the engine is stopping.
        """
        self.registry.get(name)
        # In a task of its own: a caller that goes away must not leave the plugin half restarted.
        return await asyncio.shield(self._own(f"restart {name}", self._restart(name)))

    async def _restart(self, name: str) -> Health:
        async with self._restarting.setdefault(name, asyncio.Lock()):
            if self._stopping:
                raise SetupError("the engine is stopping; restart the plugin at the next one")
            old = self.registry.get(name)
            candidate = await asyncio.to_thread(reread, old.candidate)
            # From here on `settle` finds a start of it, or there is nothing to wait for until there is one.
            if (start := self._starts.get(name)) is not None and not start.done():
                start.cancel()
                await asyncio.wait([start])
            if old.pool is not None:
                old.pool.close(_RESTARTED)
                await old.pool.end()
            await asyncio.wait([self._start(self.registry.begin(candidate), refresh_gpu=True)])
            return self.health(name)

    # Reading. Any thread.

    def health(self, name: str) -> Health:
        """A plugin's health, from the projection.

        Raises:
            UnknownPlugin: with the nearest name there is.
        """
        return health(self._view(name), time.time_ns(), self._memory_bytes(name))

    def plugins(self) -> list[Health]:
        """The health of all plugins, in the order of their discovery."""
        now_ns = time.time_ns()
        return [health(view, now_ns, self._memory_bytes(view.name)) for view in self.bus.projection.views()]

    def health_json(self, name: str) -> bytes:
        """`health`, as JSON.

        Raises:
            UnknownPlugin: with the nearest name there is.
        """
        return self._health_json.one(self._view(name), time.time_ns())

    def plugins_json(self) -> bytes:
        """`plugins`, as JSON."""
        return self._health_json.all(self.bus.projection.views(), time.time_ns())

    def describe(self, name: str) -> PluginDescription:
        """A plugin's manifest, tools and checks.

        Raises:
            UnknownPlugin: with the nearest name there is.
        """
        return describe(self.registry.get(name))

    async def crashes(self, name: str) -> list[Crash]:
        """How the plugin's workers died, in this incarnation and those before it, the newest first.

        Includes a death that is still being told: of a call that was just answered with what broke.

        Raises:
            UnknownPlugin: with the nearest name there is.
        """
        self.registry.get(name)
        if dying := [task for task in self._tasks if task.get_name() == f"end {name}"]:
            await asyncio.wait(dying, timeout=_DYING_WAIT_S)
        return await self._crashes.of(name)

    async def events(self, after: int = 0) -> AsyncIterator[Event]:
        """Every event after number `after`: replayed from the log, then live. Only durable ones."""
        async for batch in self.log.subscribe(after):
            for record in batch:
                yield decode(record.json)

    def parts(self) -> list[Part]:
        """How the engine's own parts are; a plugin's trouble is never among them."""
        state, audit = self.log.state, self.audit.state
        faults = {**self.faults, **self.bus.faults, **self.log.faults}
        plugins = self.bus.projection.views()
        return [
            Part("engine", not self._stopping, "stopping" if self._stopping else "running"),
            Part("plugins", self._settled, f"{len(plugins)} registered" + ("" if self._settled else ", starting")),
            Part("log", state.ok, state.error or f"durable up to {state.durable}, {state.backlog} waiting"),
            Part("audit", audit.ok, audit.error or f"written up to {audit.last}"),
            Part("loop", True, f"{self._pulse.lag_s * 1000:.0f} ms late, blocked {self._pulse.blocks} times"),
            Part("sandbox", True, supported().text(self._spawner.exposed)),
            Part("cgroup", True, self._cgroup),
            Part(
                "faults",
                True,
                "; ".join(f"{name}: {f.count}, last {f.last}" for name, f in faults.items()) or "none",
            ),
        ]

    def ready(self) -> bool:
        """Whether calls are taken and events are kept."""
        return all(part.ok for part in self.parts())

    def _view(self, name: str) -> PluginView:
        view = self.bus.projection.view(name)
        if view is None:
            self.registry.get(name)  # raises, with the nearest name
            raise UnknownPlugin(f"there is no plugin `{name}`")
        return view

    def _memory_bytes(self, name: str) -> int | None:
        return sum(worker.memory_bytes for worker in self._workers(name)) or None

    def _workers(self, name: str) -> list[Worker]:
        """A plugin's live workers."""
        try:
            pool = self.registry.get(name).pool
        except UnknownPlugin:  # another thread is about to register what it has just published
            return []
        return [] if pool is None else [worker for worker in pool.workers if not worker.dead]

    # Faults and tasks.

    def _fail(self, incarnation: Incarnation, cause: Cause) -> None:
        """FAILED, and its workers ended: nothing of a broken plugin goes on."""
        incarnation.leave_service(Trigger.FAIL, cause)
        if incarnation.pool is not None:
            self._own(f"end {incarnation.name}", incarnation.pool.end())

    def _start(self, incarnation: Incarnation, *, refresh_gpu: bool = False) -> asyncio.Task[None]:
        settling = self._starter.settle(incarnation, refresh_gpu=refresh_gpu)
        self._starts[incarnation.name] = task = self._own(f"start {incarnation.name}", settling)
        return task

    def _own(self, name: str, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        task = asyncio.get_running_loop().create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._forget)
        return task

    def _forget(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        exc = None if task.cancelled() else task.exception()
        if exc is not None and not isinstance(exc, HoldfastError):  # those are for whoever waits for the task
            self.note_fault(task.get_name(), exc)

    def _fault_count(self) -> int:
        return sum(fault.count for fault in self.faults.copy().values())

    def note_fault(self, name: str, exc: BaseException) -> None:
        """Count an exception of the engine's own, under the part's name, and log it with its stack.

        Shown by `parts` and the metrics. On the engine's event loop only.
        """
        self.faults[name] = Fault.after(self.faults.get(name), f"{type(exc).__name__}: {exc}")
        # In a thread: to show a stack, its source files are read.
        try:
            asyncio.get_running_loop().run_in_executor(None, _log_fault, name, exc)
        except RuntimeError:  # none can be started; whoever reports a fault must not meet another
            log.error("engine_fault", part=name, error=f"{type(exc).__name__}: {exc}")


def _log_fault(name: str, exc: BaseException) -> None:
    log.error("engine_fault", part=name, stack="".join(traceback.format_exception(exc)))


def _make_folder(folder: Path) -> None:
    if not nameable(folder):
        text = f"the data folder {printable(str(folder), 4096)} has a path that is not UTF-8; choose another one"
        raise SetupError(text)
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as exc:
        raise _unusable(folder, exc) from exc


def _unusable(folder: Path, exc: OSError) -> SetupError:
    return SetupError(f"the data folder {folder} cannot be used: {exc.strerror}; choose another one")


def _remove_stale(folder: Path) -> None:
    """Scratch folders of engines that are gone; their fork servers remove them, unless the machine went down."""
    try:
        stale = list(folder.iterdir())
    except FileNotFoundError:
        return
    except OSError as exc:  # where no scratch folder can be made either, a start says so
        log.error("scratch_not_removed", folder=str(folder), first=[str(exc)])
        return
    for each in stale:
        remove(each)
