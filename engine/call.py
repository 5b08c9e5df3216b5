"""A call in progress: its events, its items, and the consumer that may be slower than the tool."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeAlias

import structlog

from engine.errors import StreamStalled
from engine.lifecycle.states import Trigger
from engine.outcome import CallFailed, Completed, Outcome
from engine.registry import Incarnation
from engine.sandbox.channel import Channel
from engine.sandbox.wire import Encoded
from events.bus import EventBus
from events.envelope import CallFinished, CallProgress, CallStarted

log = structlog.get_logger(__name__)

OnProgress: TypeAlias = Callable[[float, float], None]

_BUFFER_BYTES = 8 * 1024 * 1024  # of items, as they were encoded, that a consumer has not taken yet


class Collected:
    """Takes all items of a streaming tool, for a caller that wants one value.

    Args:
        max_bytes: of all items together, as they were encoded; what they take in memory may be much more.
    """

    def __init__(self, max_bytes: int) -> None:
        self.items: list[Any] = []
        self.too_large = False
        self._left_bytes = max_bytes

    def item(self, value: Any, size_bytes: int, _channel: Channel) -> None:
        """Keep one item; past the limit all are dropped, and the caller is told in the end."""
        self._left_bytes -= size_bytes
        if self._left_bytes < 0:
            self.too_large = True
            self.items.clear()
        else:
            self.items.append(value)

    def take_held_s(self) -> float:
        """A list holds nobody up."""
        return 0.0


class Stream:
    """The items of a streaming call, as an async iterator; `outcome` is set at its end.

    A consumer that lags holds the worker up (that time does not count against the deadline), and one that takes
    nothing for `stall_s` while items wait, or calls `aclose`, has gone away: the call goes on and its items are
    dropped.

    Args:
        max_items: kept for the consumer before the worker has to wait.
        stall_s: seconds.

    Raises (from iterating):
        CallFailed: after the items that came, where the outcome is not `Completed`.
        StreamStalled: the consumer came back after it had counted as gone; items are missing.
    """

    def __init__(self, max_items: int, stall_s: float) -> None:
        self.outcome: Outcome | None = None
        self._max_items = max_items
        self._stall_s = stall_s
        self._loop = asyncio.get_running_loop()
        self._items: deque[tuple[Any, int]] = deque()
        self._bytes = 0
        self._wake = asyncio.Event()
        self._gone = False
        self._stalled = False
        self._channel: Channel | None = None  # paused, iff not None
        self._held_since_s = 0.0
        self._held_s = 0.0
        self._stall: asyncio.TimerHandle | None = None
        self._ended = asyncio.Event()

    def __aiter__(self) -> Stream:
        return self

    async def __anext__(self) -> Any:
        while not self._items:
            if self._stalled:
                raise StreamStalled(
                    f"nothing was taken for {self._stall_s:g} s, so items were dropped; call again"
                )
            if self.outcome is not None:
                if isinstance(self.outcome, Completed):
                    raise StopAsyncIteration
                raise CallFailed(self.outcome)
            self._wake.clear()
            await self._wake.wait()
        value, size_bytes = self._items.popleft()
        self._bytes -= size_bytes
        if self._channel is not None:
            if self._is_full(half=True):
                self._watch_for_stall()
            else:
                self._release()
        return value

    async def aclose(self) -> None:
        """Take nothing more; the call goes on."""
        self._abandon()

    async def ended(self) -> None:
        """Returns once the call has ended, for whoever does not iterate to its end."""
        await self._ended.wait()

    def finish(self, outcome: Outcome) -> None:
        """No more items."""
        self.outcome = outcome
        if self._channel is not None:
            self._release()
        self._wake.set()
        self._ended.set()

    def item(self, value: Any, size_bytes: int, channel: Channel) -> None:
        """Keep one item for the consumer."""
        if self._gone:
            return
        self._items.append((value, size_bytes))
        self._bytes += size_bytes
        self._wake.set()
        if self._channel is None and self._is_full():
            self._channel = channel
            channel.pause()
            self._held_since_s = self._loop.time()
            self._watch_for_stall()

    def take_held_s(self) -> float:
        """Seconds for which the consumer held the worker up since this was last asked."""
        held_s, self._held_s = self._held_s, 0.0
        if self._channel is not None:
            now_s = self._loop.time()
            held_s += now_s - self._held_since_s
            self._held_since_s = now_s
        return held_s

    def _is_full(self, *, half: bool = False) -> bool:
        share = 2 if half else 1
        return len(self._items) * share >= self._max_items or self._bytes * share >= _BUFFER_BYTES

    def _release(self) -> None:
        channel, self._channel = self._channel, None
        if self._stall is not None:
            self._stall.cancel()
        if channel is not None:
            self._held_s += self._loop.time() - self._held_since_s
            channel.resume()

    def _watch_for_stall(self) -> None:
        """From now on: every item that is taken shows that the consumer is there."""
        if self._stall is not None:
            self._stall.cancel()
        self._stall = self._loop.call_later(self._stall_s, self._give_up)

    def _give_up(self) -> None:
        self._stalled = True
        self._abandon()
        self._wake.set()

    def _abandon(self) -> None:
        self._gone = True
        self._items.clear()
        self._bytes = 0
        self._release()


class Request(NamedTuple):
    """What a caller asked for."""

    plugin: str
    tool: str
    arguments: Mapping[str, Any] | Encoded
    request_id: str
    consumer: Collected | Stream
    on_progress: OnProgress | None


class Call:
    """One call's sink: publishes its events, and hands its items on."""

    def __init__(self, request: Request, incarnation: Incarnation, bus: EventBus) -> None:
        self._incarnation = incarnation
        self._tool = request.tool
        self._request_id = request.request_id
        self._bus = bus
        self._on_progress = request.on_progress
        self._started = False
        self.item = request.consumer.item
        self.take_held_s = request.consumer.take_held_s

    def began(self) -> None:
        """Plugin code runs: the first call of all brings the plugin to RUNNING."""
        self._incarnation.lifecycle.fire_if(Trigger.RUN)
        self.started()

    def started(self) -> None:
        """The call is with the worker."""
        if not self._started:
            self._started = True
            self._bus.publish(CallStarted(self._tool, self._request_id), self._incarnation.name)

    def progress(self, done: float, total: float) -> None:
        """The tool said how far it is."""
        self._bus.publish(CallProgress(self._tool, self._request_id, done, total), self._incarnation.name)
        if self._on_progress is not None:
            try:
                self._on_progress(done, total)
            except Exception as exc:  # the caller's own code: its trouble must not look like the worker's
                error = f"{type(exc).__name__}: {exc}"
                log.warning("on_progress_failed", plugin=self._incarnation.name, tool=self._tool, error=error)
                self._on_progress = None

    def finished(self, outcome: Outcome, *, broke: bool) -> None:
        """The call is over."""
        self.started()  # its arguments may have been refused before anything ran
        code = outcome.reason_code
        finished = CallFinished(
            self._tool,
            self._request_id,
            outcome.ok,
            outcome.duration_ms,
            outcome.error_type,
            None if code is None else code.value,
            broke,
        )
        self._bus.publish(finished, self._incarnation.name)
