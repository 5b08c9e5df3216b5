"""A call in progress: its events, its items, and the consumer that may be slower than the tool."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import structlog

from engine.errors import Cause, StreamStalled
from engine.lifecycle.states import State, Trigger
from engine.outcome import Broke, CallFailed, Completed, Outcome
from engine.registry import Incarnation
from engine.sandbox.channel import Channel
from engine.sandbox.host import Worker
from engine.sandbox.replies import Reply
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

    __slots__ = ("_left_bytes", "items", "too_large")

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


class Call:
    """One call, from a caller's request to its outcome: it publishes its events and hands on its items.

    Args:
        plugin: its name.
        tool: its name.
        arguments: by parameter name, or encoded.
        request_id: stands in its events and its outcome.
        consumer: where its items go.
        on_progress: the caller's own.
    """

    __slots__ = (
        *("plugin", "tool", "arguments", "request_id", "consumer", "item", "take_held_s"),
        *("incarnation", "timeout_s", "worker", "outcome"),
        *("_on_progress", "_bus", "_conclude", "_started", "_began_s"),
    )

    incarnation: Incarnation
    timeout_s: float
    _bus: EventBus
    _conclude: Callable[[Call, Reply | Cause], None]

    def __init__(
        self,
        plugin: str,
        tool: str,
        arguments: Mapping[str, Any] | Encoded,
        request_id: str,
        consumer: Collected | Stream,
        on_progress: OnProgress | None,
    ) -> None:
        self.plugin = plugin
        self.tool = tool
        self.arguments = arguments
        self.request_id = request_id
        self.consumer = consumer
        self.item = consumer.item
        self.take_held_s = consumer.take_held_s
        self.worker: Worker | None = None
        # Cancelled with the caller that waits for it; the call itself then goes on and nobody is told.
        self.outcome: asyncio.Future[Outcome] = asyncio.get_running_loop().create_future()
        self._on_progress = on_progress
        self._started = False
        self._began_s: float | None = None

    def admitted(
        self,
        incarnation: Incarnation,
        timeout_s: float,
        bus: EventBus,
        conclude: Callable[[Call, Reply | Cause], None],
    ) -> None:
        """It is to get a worker.

        Args:
            incarnation: of the plugin.
            timeout_s: its deadline, from when its turn begins.
            bus: where its events go.
            conclude: makes the outcome of a worker's reply, or of the cause why it got no turn.
        """
        self.incarnation = incarnation
        self.timeout_s = timeout_s
        self._bus = bus
        self._conclude = conclude

    @property
    def announce(self) -> bool:
        """Whether the worker is to say when it has accepted the arguments."""
        # Until its first call begins a plugin is INITIALIZED, and bad input must leave it so.
        return self.incarnation.status.state is State.INITIALIZED

    @property
    def holds_up(self) -> bool:
        """Whether its consumer may pause the channel."""
        return isinstance(self.consumer, Stream)

    def sent_to(self, worker: Worker) -> None:
        """It has a worker; others may run there before."""
        self.worker = worker

    def begins(self) -> None:
        """Its turn."""
        self._began_s = time.perf_counter()
        if not self.announce:
            self._start()

    def turned_away(self, cause: Cause) -> None:
        """It gets no turn."""
        self._conclude(self, cause)

    def replied(self, reply: Reply) -> None:
        """The worker answered, or broke."""
        self._conclude(self, reply)

    @property
    def duration_ms(self) -> float:
        """Since its turn began."""
        return 0.0 if self._began_s is None else (time.perf_counter() - self._began_s) * 1000

    def began(self) -> None:
        """Plugin code runs: the first call of all brings the plugin to RUNNING."""
        self.incarnation.lifecycle.fire_if(Trigger.RUN)
        self._start()

    def _start(self) -> None:
        if not self._started:
            self._started = True
            self._bus.publish(CallStarted(self.tool, self.request_id), self.plugin)

    def progress(self, done: float, total: float) -> None:
        """The tool said how far it is."""
        self._bus.publish(CallProgress(self.tool, self.request_id, done, total), self.plugin)
        if self._on_progress is not None:
            try:
                self._on_progress(done, total)
            except Exception as exc:  # the caller's own code: its trouble must not look like the worker's
                error = f"{type(exc).__name__}: {exc}"
                log.warning("on_progress_failed", plugin=self.plugin, tool=self.tool, error=error)
                self._on_progress = None

    def finish(self, outcome: Outcome) -> None:
        """It is over: publish that, if it had its turn, and tell the caller."""
        if self._began_s is not None:
            self._start()  # its arguments may have been refused before anything ran
            code = outcome.reason_code
            finished = CallFinished(
                self.tool,
                self.request_id,
                outcome.ok,
                outcome.duration_ms,
                outcome.error_type,
                None if code is None else code.value,
                isinstance(outcome, Broke),
            )
            self._bus.publish(finished, self.plugin)
        if not self.outcome.done():
            self.outcome.set_result(outcome)
