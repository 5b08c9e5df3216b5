"""The only way to run a tool: admit, lease a worker, call, judge, publish."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

from engine.call import Call, Collected, OnProgress, Request, Stream
from engine.errors import Cause, ReasonCode, UnknownPlugin
from engine.lifecycle.states import IN_SERVICE, State
from engine.loader.manifest import Manifest
from engine.outcome import Broke, Completed, Outcome, Refused
from engine.registry import Incarnation, PluginRegistry, did_you_mean
from engine.sandbox.host import Worker
from engine.sandbox.pool import Pool, PoolClosed, QueueFull
from engine.sandbox.replies import Broken, Rejected, Reply, Value
from engine.sandbox.wire import Encoded
from engine.settings import Settings
from events.bus import EventBus

Arguments: TypeAlias = Mapping[str, Any] | Encoded


class ToolRunner:
    """Runs tools. Whatever a plugin does, the answer is an `Outcome`.

    Args:
        fail: takes an incarnation out of service and ends its workers.
        on_fault: counts an exception of our own.
    """

    def __init__(
        self,
        settings: Settings,
        registry: PluginRegistry,
        bus: EventBus,
        fail: Callable[[Incarnation, Cause], None],
        on_fault: Callable[[str, BaseException], None],
    ) -> None:
        self._settings = settings
        self._registry = registry
        self._bus = bus
        self._fail = fail
        self._on_fault = on_fault
        self._calls: set[asyncio.Task[Outcome]] = set()
        self._stopping = False

    async def run(
        self,
        plugin: str,
        tool: str,
        arguments: Arguments,
        *,
        request_id: str | None = None,
        stream: Stream | None = None,
        on_progress: OnProgress | None = None,
    ) -> Outcome:
        """Run a tool and wait for its outcome.

        A caller that is cancelled meanwhile goes away alone: the call finishes and its outcome is dropped.
        """
        consumer = stream or Collected(self._settings.max_result_bytes)
        request = Request(plugin, tool, arguments, request_id or uuid.uuid4().hex, consumer, on_progress)
        task = asyncio.get_running_loop().create_task(self._run(request))
        self._calls.add(task)
        task.add_done_callback(self._calls.discard)
        return await asyncio.shield(task)

    async def drain(self, timeout_s: float) -> int:
        """Admit nothing more; wait for the calls that run. Returns how many did not finish in time."""
        self._stopping = True
        if not self._calls:
            return 0
        _, left = await asyncio.wait(self._calls, timeout=timeout_s)
        return len(left)

    async def _run(self, request: Request) -> Outcome:
        try:
            outcome = await self._admitted(request)
        except Exception as exc:  # the engine's own fault: named, counted, and the caller is told
            self._on_fault("runner", exc)
            text = f"the engine itself failed on this call ({type(exc).__name__}); see its log, call again"
            outcome = _refused(request, ReasonCode.ENGINE_FAULT, "EngineFault", text)
        if isinstance(request.consumer, Stream):
            request.consumer.finish(outcome)
        return outcome

    def refusal(self, plugin: str, tool: str, request_id: str) -> Refused | None:
        """Why a call would be refused now, whatever its arguments; None where it would be admitted."""
        admitted = self._admit(Request(plugin, tool, {}, request_id, Collected(0), None))
        return admitted if isinstance(admitted, Refused) else None

    async def _admitted(self, request: Request) -> Outcome:
        """A place in the queue? Then the call."""
        admitted = self._admit(request)
        if isinstance(admitted, Refused):
            return admitted
        incarnation, manifest, pool = admitted
        state = incarnation.status.state
        try:
            worker = await pool.lease()
        except QueueFull:
            text = f"`{request.plugin}` is busy and {pool.waiting} calls wait already; call again later"
            return _refused(request, ReasonCode.QUEUE_FULL, "QueueFull", text, state)
        except PoolClosed as exc:
            if exc.cause.reason_code in (ReasonCode.RESTARTED, ReasonCode.ENGINE_STOPPING):
                kind = exc.cause.reason_code.value.title().replace("_", "")
                return _refused(request, exc.cause.reason_code, kind, exc.cause.reason, state)
            return _not_in_service(request, incarnation)
        try:
            return await self._call(request, incarnation, worker, manifest.timeout_s(request.tool))
        finally:
            pool.give_back(worker)

    def _admit(self, request: Request) -> tuple[Incarnation, Manifest, Pool] | Refused:
        """Known? In service?"""
        try:
            incarnation = self._registry.get(request.plugin)
        except UnknownPlugin as exc:
            return _refused(request, ReasonCode.UNKNOWN_PLUGIN, "UnknownPlugin", str(exc))
        state, manifest, pool = incarnation.status.state, incarnation.manifest, incarnation.pool
        if manifest is not None and request.tool not in manifest.tools:
            text = f"`{request.plugin}` has no tool `{request.tool}`{did_you_mean(request.tool, manifest.tools)}"
            return _refused(request, ReasonCode.UNKNOWN_TOOL, "UnknownTool", text, state)
        if self._stopping:
            text = "the engine is stopping; call another one"
            return _refused(request, ReasonCode.ENGINE_STOPPING, "EngineStopping", text, state)
        if state not in IN_SERVICE or pool is None or manifest is None:
            return _not_in_service(request, incarnation)
        return incarnation, manifest, pool

    async def _call(self, request: Request, incarnation: Incarnation, worker: Worker, timeout_s: float) -> Outcome:
        call = Call(request, incarnation, self._bus)
        # Until its first call begins a plugin is INITIALIZED, and bad input must leave it so: the worker then
        # says when it has accepted the arguments.
        announce = incarnation.status.state is State.INITIALIZED
        if not announce:
            call.started()
        started_s = time.perf_counter()
        reply = await worker.call(request.tool, request.arguments, timeout_s, call, announce, request.request_id)
        duration_ms = (time.perf_counter() - started_s) * 1000
        if isinstance(reply, Broken) and reply.cause.reason_code is not ReasonCode.RESTARTED:
            self._fail(incarnation, reply.cause)
        outcome = self._outcome(request, incarnation, reply, duration_ms)
        call.finished(outcome, broke=isinstance(outcome, Broke))
        return outcome

    def _outcome(self, request: Request, incarnation: Incarnation, reply: Reply, duration_ms: float) -> Outcome:
        state = incarnation.status.state
        match reply:
            case Value(value=value):
                if request.tool in incarnation.tools and incarnation.tools[request.tool].streams:
                    consumer = request.consumer
                    value = consumer.items if isinstance(consumer, Collected) else None
                    if isinstance(consumer, Collected) and consumer.too_large:
                        text = "its items are too many to collect; ask for a stream"
                        return _refused(
                            request, ReasonCode.RESULT_TOO_LARGE, "ResultTooLarge", text, state, duration_ms
                        )
                return Completed(value=value, duration_ms=duration_ms, request_id=request.request_id)
            case Rejected(error_type=kind, message=text, reason_code=code):
                return _refused(request, code, kind, text, state, duration_ms)
            case Broken(cause=Cause(reason_code=ReasonCode.RESTARTED, reason=text)):
                if incarnation.status.cause is not None:  # another worker of the plugin broke
                    return _not_in_service(request, incarnation, duration_ms)
                return _refused(request, ReasonCode.RESTARTED, "Restarted", text, state, duration_ms)
            case Broken(cause=Cause(reason_code=code, reason=text), error_type=kind):
                return Broke(
                    error=text,
                    error_type=kind or code.value.title().replace("_", ""),
                    reason_code=code,
                    state=state,
                    duration_ms=duration_ms,
                    request_id=request.request_id,
                )


def _refused(
    request: Request,
    code: ReasonCode,
    kind: str,
    text: str,
    state: State | None = None,
    duration_ms: float = 0.0,
) -> Refused:
    return Refused(
        error=text,
        error_type=kind,
        reason_code=code,
        state=state,
        duration_ms=duration_ms,
        request_id=request.request_id,
    )


def _not_in_service(request: Request, incarnation: Incarnation, duration_ms: float = 0.0) -> Refused:
    """With the plugin's own reason: the caller should learn what its operator would."""
    status = incarnation.status
    if status.cause is None:
        text = f"`{request.plugin}` is {status.state.value}, not in service yet; call again in a moment"
        return _refused(request, ReasonCode.NOT_IN_SERVICE, "NotInService", text, status.state)
    text = f"`{request.plugin}` is {status.state.value}: {status.cause.reason}"
    return _refused(request, status.cause.reason_code, "NotInService", text, status.state, duration_ms)
