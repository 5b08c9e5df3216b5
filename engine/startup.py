"""From LOADED to where a plugin settles: checks, workers, INITIALIZED; or the reason why not."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Callable, Coroutine
from pathlib import Path
from typing import Any

from msgspec import msgpack

from engine.crash_store import CrashStore
from engine.errors import Cause, ReasonCode
from engine.lifecycle.states import Trigger
from engine.loader.checks import check
from engine.loader.containment import resolve_sandbox
from engine.loader.findings import combine
from engine.loader.gpu import GpuCheck
from engine.loader.manifest import Manifest
from engine.loader.model_files import resolve_models
from engine.registry import Incarnation
from engine.sandbox import wire
from engine.sandbox.evidence import Death
from engine.sandbox.host import StartFailed, Worker, WorkerSpec
from engine.sandbox.limits import MemoryWatch
from engine.sandbox.pool import Pool
from engine.sandbox.spawner import Spawner, SpawnFailed
from engine.sandbox.verdict import Ending, ExitStatus, Verdict
from engine.settings import Settings
from events.bus import EventBus
from events.envelope import PluginLog, WorkerExited, WorkerStarted

_MIB = 1024 * 1024
_SLOT_WAIT_S = 5.0


class _Observer:
    """Publishes what happens in a worker of one incarnation, and takes the plugin out of service when one dies."""

    def __init__(
        self,
        incarnation: Incarnation,
        bus: EventBus,
        crashes: CrashStore,
        fail: Callable[[Incarnation, Cause], None],
        on_fault: Callable[[str, BaseException], None],
    ) -> None:
        self._incarnation = incarnation
        self._bus = bus
        self._crashes = crashes
        self._fail = fail
        self._on_fault = on_fault

    def worker_started(self, pid: int) -> None:
        self._bus.publish(WorkerStarted(pid, self._incarnation.status.incarnation), self._incarnation.name)

    def worker_died(self, death: Death) -> None:
        self._crashes.note(self._incarnation.name, death)

    def worker_exited(self, worker: Worker, status: ExitStatus, verdict: Verdict) -> None:
        cause = verdict.cause
        exited = WorkerExited(
            worker.pid,
            self._incarnation.status.incarnation,
            verdict.code,
            None if cause is None else cause.reason,
            status.code,
            status.signal_name,
        )
        self._bus.publish(exited, self._incarnation.name)
        # While it starts, the start decides: a missing package makes it UNAVAILABLE, not FAILED.
        if cause is not None and self._incarnation.pool is not None:
            self._fail(self._incarnation, cause)

    def fault(self, name: str, exc: BaseException) -> None:
        self._on_fault(f"{name} {self._incarnation.name}", exc)

    def log_line(self, stream: str, level: str, line: str, dropped: int) -> None:
        self._bus.publish(PluginLog(stream, level, line, dropped), self._incarnation.name)


class Starter:
    """Starts incarnations, a few at a time.

    Args:
        fail: takes an incarnation out of service and ends its workers.
        on_fault: counts and logs an exception of our own.
    """

    def __init__(
        self,
        settings: Settings,
        bus: EventBus,
        spawner: Spawner,
        watch: MemoryWatch,
        gpu: GpuCheck,
        crashes: CrashStore,
        fail: Callable[[Incarnation, Cause], None],
        on_fault: Callable[[str, BaseException], None],
    ) -> None:
        self._settings = settings
        self._bus = bus
        self._spawner = spawner
        self._watch = watch
        self._gpu = gpu
        self._crashes = crashes
        self._fail = fail
        self._on_fault = on_fault
        self._slots = asyncio.Semaphore(settings.start_concurrency or max(2, len(os.sched_getaffinity(0))))
        self._scratches = 0

    async def settle(self, incarnation: Incarnation, *, refresh_gpu: bool = False) -> None:
        """Bring a LOADED incarnation to INITIALIZED, FAILED or UNAVAILABLE. Never raises for a plugin's sake."""
        candidate = incarnation.candidate
        if candidate.problem is not None or candidate.manifest is None:
            problem = candidate.problem or Cause(ReasonCode.MANIFEST_INVALID, "it has no manifest")
            incarnation.leave_service(Trigger.FAIL, problem)
            return
        async with self._slot():
            try:
                await self._settle(incarnation, candidate.manifest, refresh_gpu)
            except SpawnFailed as exc:
                text = f"the engine could not start a worker: {exc}; restart the plugin"
                incarnation.leave_service(Trigger.FAIL, Cause(ReasonCode.ENGINE_FAULT, text))
            except Exception as exc:  # our own fault, but no plugin may be left LOADED for ever
                text = (
                    f"the engine's own start failed ({type(exc).__name__}: {exc}); see its log, restart the plugin"
                )
                incarnation.leave_service(Trigger.FAIL, Cause(ReasonCode.ENGINE_FAULT, text))
                self._on_fault(f"start {incarnation.name}", exc)

    @contextlib.asynccontextmanager
    async def _slot(self) -> AsyncIterator[None]:
        """A place among the few that start at once; plugins that hang there delay the others only so long."""
        try:
            async with asyncio.timeout(_SLOT_WAIT_S):  # `wait_for` would make a task of its own
                await self._slots.acquire()
        except TimeoutError:
            yield
            return
        try:
            yield
        finally:
            self._slots.release()

    async def _settle(self, incarnation: Incarnation, manifest: Manifest, refresh_gpu: bool) -> None:
        folder = incarnation.candidate.folder
        incarnation.findings = await check(manifest, folder, self._gpu, refresh_gpu=refresh_gpu)
        if incarnation.findings:
            incarnation.leave_service(Trigger.BECOME_UNAVAILABLE, combine(incarnation.findings))
            return
        # Neither reads a file: they put paths together.
        models = resolve_models(manifest, folder)
        sandbox = resolve_sandbox(manifest, folder, self._spawner.scratch_root / wire.UPLOADS)
        observer = _Observer(incarnation, self._bus, self._crashes, self._fail, self._on_fault)
        starts = [
            self._start_worker(self._spec(incarnation, manifest, models, sandbox), observer)
            for _ in range(manifest.limits.workers)
        ]
        workers, failures = await _gather(starts)
        if failures:
            await asyncio.gather(*(_end(worker) for worker in workers))
            cause = failures[0].cause
            missing = cause.reason_code in (ReasonCode.PACKAGE_MISSING, ReasonCode.SANDBOX_UNSUPPORTED)
            incarnation.leave_service(Trigger.BECOME_UNAVAILABLE if missing else Trigger.FAIL, cause)
            return
        incarnation.tools = workers[0].tools
        incarnation.pool = Pool(workers, manifest.limits.queue)
        for worker in workers:
            if worker.dead:  # between Ready and here
                self._fail(incarnation, await worker.cause_of_death())
                return
        incarnation.lifecycle.fire(Trigger.INITIALIZE)

    async def _start_worker(self, spec: WorkerSpec, observer: _Observer) -> Worker:
        scratch = Path(spec.start.scratch)
        return await Worker.start(spec, self._spawner, observer, self._watch, scratch)

    def _spec(
        self, incarnation: Incarnation, manifest: Manifest, models: dict[str, Path], sandbox: wire.Sandbox
    ) -> WorkerSpec:
        self._scratches += 1
        scratch = self._spawner.scratch_root / f"{incarnation.name}-{self._scratches}"
        start = wire.Start(
            name=manifest.name,
            folder=str(incarnation.candidate.folder),
            entry=manifest.entry,
            models={name: str(path) for name, path in models.items()},
            settings=msgpack.encode(manifest.settings),
            scratch=str(scratch),
            tools={name: tool.rejects for name, tool in manifest.tools.items()},
            memory_bytes=manifest.limits.memory_mib * _MIB,
            max_result_bytes=self._settings.max_result_bytes,
            sandbox=sandbox,
        )
        return WorkerSpec(
            start=start,
            incarnation=incarnation.status.incarnation,
            start_timeout_s=manifest.limits.start_timeout_s,
            processes=manifest.limits.processes,
            scratch_bytes=manifest.limits.scratch_mib * _MIB,
            # What a caller sends must not bring a plugin over its limit: there may be a view and a copy of it.
            arena_bytes=min(self._settings.arena_bytes, manifest.limits.memory_mib * _MIB // 4),
            log_lines_per_s=self._settings.log_lines_per_s,
            stop_grace_s=self._settings.stop_grace_s,
        )


async def _gather(starts: list[Coroutine[Any, Any, Worker]]) -> tuple[list[Worker], list[StartFailed]]:
    """Start all; the workers that came up, and why the others did not. Any other exception ends all of them."""
    tasks = [asyncio.ensure_future(start) for start in starts]
    try:
        results = await asyncio.gather(*tasks, return_exceptions=True)
    except asyncio.CancelledError:  # the others were cancelled too; those that had come up must not outlive this
        await asyncio.wait(tasks)
        came_up = [task.result() for task in tasks if not task.cancelled() and task.exception() is None]
        await asyncio.gather(*(_end(worker) for worker in came_up))
        raise
    workers = [result for result in results if isinstance(result, Worker)]
    for result in results:
        if isinstance(result, BaseException) and not isinstance(result, StartFailed):
            await asyncio.gather(*(_end(worker) for worker in workers))
            raise result
    return workers, [result for result in results if isinstance(result, StartFailed)]


async def _end(worker: Worker) -> None:
    await worker.end(Ending.STOP)
