"""The only way to run a tool: admit, lease a worker, call, judge, publish."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

from engine.call import Call, Collected, OnProgress, Stream
from engine.errors import Cause, ReasonCode, UnknownPlugin
from engine.lifecycle.states import IN_SERVICE, State
from engine.loader.manifest import Manifest
from engine.outcome import Broke, Completed, Outcome, Refused, new_request_id
from engine.registry import Incarnation, PluginRegistry, did_you_mean
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
        self._calls: set[Call] = set()
        self._drained = asyncio.Event()  # set once there is none, while draining
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

        A caller that is cancelled goes away alone: a call that has begun finishes, and its outcome is dropped.
        """
        consumer = stream or Collected(self._settings.max_result_bytes)
        call = Call(plugin, tool, arguments, request_id or new_request_id(), consumer, on_progress)
        try:
            refused = self._submit(call)
        except Exception as exc:  # the engine's own fault: named, counted, and the caller is told
            refused = self._own_fault(call, exc)
        if refused is not None:
            await asyncio.sleep(0)  # a caller that loops on a broken plugin must not starve the others
            return _finished(consumer, refused)
        try:
            return await call.outcome
        except asyncio.CancelledError:
            if call.incarnation.pool is not None and call.incarnation.pool.withdraw(call):
                self._forget(call)
            raise

    async def drain(self, timeout_s: float) -> int:
        """Admit nothing more; wait for the calls that run. Returns how many did not finish in time."""
        self._stopping = True
        if self._calls:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._drained.wait(), timeout_s)
        return len(self._calls)

    def _own_fault(self, call: Call, exc: Exception) -> Refused:
        self._on_fault("runner", exc)
        text = f"the engine itself failed on this call ({type(exc).__name__}); see its log, call again"
        return _refused(call.request_id, ReasonCode.ENGINE_FAULT, "EngineFault", text)

    def refusal(self, plugin: str, tool: str, request_id: str) -> Refused | None:
        """Why a call would be refused now, whatever its arguments; None where it would be admitted."""
        admitted = self._admit(plugin, tool, request_id)
        return admitted if isinstance(admitted, Refused) else None

    def _submit(self, call: Call) -> Refused | None:
        """Get it a worker, or a place in the queue. Returns why there is none."""
        admitted = self._admit(call.plugin, call.tool, call.request_id)
        if isinstance(admitted, Refused):
            return admitted
        incarnation, manifest, pool = admitted
        call.admitted(incarnation, manifest.timeout_s(call.tool), self._bus, self._conclude)
        self._calls.add(call)
        try:
            pool.submit(call)
        except QueueFull:
            self._forget(call)
            text = f"`{call.plugin}` is busy and {pool.waiting} calls wait already; call again later"
            return _refused(call.request_id, ReasonCode.QUEUE_FULL, "QueueFull", text, incarnation.status.state)
        except PoolClosed as exc:
            self._forget(call)
            return _turned_away(call, exc.cause)
        return None

    def _conclude(self, call: Call, ended: Reply | Cause) -> None:
        """A call is over. Runs in the callback that brought the answer, so that the next call begins at once."""
        try:
            outcome = self._outcome(call, ended)
        except Exception as exc:  # the engine's own fault, as above
            outcome = self._own_fault(call, exc)
        try:
            call.finish(_finished(call.consumer, outcome))
        except Exception as exc:
            outcome = self._own_fault(call, exc)
            if not call.outcome.done():
                call.outcome.set_result(outcome)
        self._forget(call)
        if call.worker is not None and call.incarnation.pool is not None:
            call.incarnation.pool.give_back(call.worker)

    def _forget(self, call: Call) -> None:
        self._calls.discard(call)
        if self._stopping and not self._calls:
            self._drained.set()

    def _admit(self, plugin: str, tool: str, request_id: str) -> tuple[Incarnation, Manifest, Pool] | Refused:
        """Known? In service?"""
        try:
            incarnation = self._registry.get(plugin)
        except UnknownPlugin as exc:
            return _refused(request_id, ReasonCode.UNKNOWN_PLUGIN, "UnknownPlugin", str(exc))
        state, manifest, pool = incarnation.status.state, incarnation.manifest, incarnation.pool
        if manifest is not None and tool not in manifest.tools:
            text = f"`{plugin}` has no tool `{tool}`{did_you_mean(tool, manifest.tools)}"
            return _refused(request_id, ReasonCode.UNKNOWN_TOOL, "UnknownTool", text, state)
        if self._stopping:
            text = "the engine is stopping; call another one"
            return _refused(request_id, ReasonCode.ENGINE_STOPPING, "EngineStopping", text, state)
        if state not in IN_SERVICE or pool is None or manifest is None:
            return _not_in_service(incarnation, request_id)
        return incarnation, manifest, pool

    def _outcome(self, call: Call, ended: Reply | Cause) -> Outcome:
        if isinstance(ended, Cause):
            return _turned_away(call, ended)
        incarnation, request_id = call.incarnation, call.request_id
        duration_ms = call.duration_ms
        if isinstance(ended, Broken) and ended.cause.reason_code is not ReasonCode.RESTARTED:
            self._fail(incarnation, ended.cause)
        state = incarnation.status.state
        match ended:
            case Value(value=value):
                if call.tool in incarnation.tools and incarnation.tools[call.tool].streams:
                    consumer = call.consumer
                    value = consumer.items if isinstance(consumer, Collected) else None
                    if isinstance(consumer, Collected) and consumer.too_large:
                        text = "its items are too many to collect; ask for a stream"
                        return _refused(
                            request_id, ReasonCode.RESULT_TOO_LARGE, "ResultTooLarge", text, state, duration_ms
                        )
                return Completed(value=value, duration_ms=duration_ms, request_id=request_id)
            case Rejected(error_type=kind, message=text, reason_code=code):
                return _refused(request_id, code, kind, text, state, duration_ms)
            case Broken(cause=Cause(reason_code=ReasonCode.RESTARTED, reason=text)):
                if incarnation.status.cause is not None:  # another worker of the plugin broke
                    return _not_in_service(incarnation, request_id, duration_ms)
                return _refused(request_id, ReasonCode.RESTARTED, "Restarted", text, state, duration_ms)
            case Broken(cause=Cause(reason_code=code, reason=text), error_type=kind):
                return Broke(
                    error=text,
                    error_type=kind or _kind_of(code),
                    reason_code=code,
                    state=state,
                    duration_ms=duration_ms,
                    request_id=request_id,
                )


def _finished(consumer: Collected | Stream, outcome: Outcome) -> Outcome:
    """The outcome, told to a stream as well."""
    if isinstance(consumer, Stream):
        consumer.finish(outcome)
    return outcome


def _turned_away(call: Call, cause: Cause) -> Refused:
    """It got no worker: by a restart or a stop, or because the plugin broke meanwhile."""
    if cause.reason_code in (ReasonCode.RESTARTED, ReasonCode.ENGINE_STOPPING):
        state, code = call.incarnation.status.state, cause.reason_code
        return _refused(call.request_id, code, _kind_of(code), cause.reason, state)
    return _not_in_service(call.incarnation, call.request_id)


def _kind_of(code: ReasonCode) -> str:
    """The error type where there was no exception: `tool_timeout`: ToolTimeout."""
    return code.value.title().replace("_", "")


def _refused(
    request_id: str,
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
        request_id=request_id,
    )


def _not_in_service(incarnation: Incarnation, request_id: str, duration_ms: float = 0.0) -> Refused:
    """With the plugin's own reason: the caller should learn what its operator would."""
    status = incarnation.status
    if status.cause is None:
        text = f"`{incarnation.name}` is {status.state.value}, not in service yet; call again in a moment"
        return _refused(request_id, ReasonCode.NOT_IN_SERVICE, "NotInService", text, status.state)
    text = f"`{incarnation.name}` is {status.state.value}: {status.cause.reason}"
    return _refused(request_id, status.cause.reason_code, "NotInService", text, status.state, duration_ms)
