"""The calls of one worker, in the order in which they were sent: encoded, timed, answered.

The first one runs. Those behind it were sent ahead, so that the worker has the next one at hand when it has
answered: two ways over the socket and two wake-ups of a process, which cost more than a short call. They have not
begun: their time does not run, no event tells of them, and if the first one breaks the plugin they are turned away
as if they had waited here.
"""

from __future__ import annotations

import asyncio
import math
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol

import msgspec

from engine.errors import Cause, ReasonCode
from engine.outcome import Array
from engine.sandbox import arena, values, wire
from engine.sandbox.channel import Channel, ProtocolBreach
from engine.sandbox.output import RateLimit
from engine.sandbox.replies import Broken, Invocation, Rejected, Reply, Value
from engine.sandbox.untrusted import Unpacker

# Arguments of this size take a while to decode, and that time is not the tool's.
_LARGE_BYTES = 1024 * 1024
_ARGUMENTS_S = 60.0  # for a worker to accept or refuse them
_PROGRESS_PER_S = 20.0  # twice what an honest worker sends; each is an event
_READ_S = 0.002  # for what came before the deadline to be read
_SENT = 8  # at most, with the one that runs
# Calls are sent ahead where the last one was as short, and the present one has not run for longer: nothing is won
# otherwise, and what was sent cannot be taken back, should its caller go away.
_SHORT_S = 0.005


class Sent(msgspec.Struct):
    """A call that the worker has been sent."""

    call_id: int
    call: Invocation
    arguments: wire.Encoded
    large: bool  # its arguments take a while to decode: the deadline counts from `Began`
    since_s: float = math.nan  # of the loop's clock; NaN as long as it has not begun
    due_s: float = math.inf
    late: bool = False


class Owner(Protocol):
    """The worker whose calls they are."""

    def overdue(self, timeout_s: float) -> None:
        """The call that runs has had its time."""

    def broke(self, sent: Sent, failed: wire.Failed) -> Cause:
        """A call failed in a way that takes the plugin out of service. Returns the cause."""


class _Rousing:
    """The arena of the call that is to run. A long copy takes as long as waking up: `rouse` comes before."""

    def __init__(self, arena_in: arena.Arena, rouse: Callable[[], None]) -> None:
        self._arena = arena_in
        self._rouse = rouse
        self._roused = False

    def reset(self, held: Iterable[arena.Span]) -> None:
        """Begin a call; `held` is not overwritten."""
        self._roused = False
        self._arena.reset(held)

    def write(self, data: memoryview | bytes | bytearray) -> tuple[int, int]:
        """Raises ArenaFull."""
        if len(data) >= _LARGE_BYTES and not self._roused:
            self._roused = True
            self._rouse()
        return self._arena.write(data)


class _NoArena:
    """For a call that is sent ahead: the arena belongs to the one that runs."""

    def write(self, _data: memoryview | bytes | bytearray) -> tuple[int, int]:
        """Raises _NotAhead."""
        raise _NotAhead


class _NotAhead(Exception):
    pass


_ahead_encoder = values.Encoder(_NoArena())
_inline_encoder = values.Encoder(None)


class Calls:
    """Sends calls and hands on what comes of them. Lives on the event loop.

    Args:
        owner: the worker.
        channel: to it.
        arena_in: for the arguments; its content belongs to the call that runs.
        arena_out: of the results.
    """

    def __init__(self, owner: Owner, channel: Channel, arena_in: arena.Arena, arena_out: arena.Arena) -> None:
        self._owner = owner
        self._channel = channel
        self._arena_in_bytes = arena_in.size
        self._arena_out = arena_out
        self._payloads = _Rousing(arena_in, self._rouse)
        self._encoder = values.Encoder(self._payloads)
        self._decoder = values.Decoder(arena_out, _make_array, unpacker=Unpacker)
        self._loop = asyncio.get_running_loop()
        self._sent: deque[Sent] = deque()
        self._last_id = 0
        self._begun = 0  # the last call that the worker is known to have begun, once it is dead
        self._held: tuple[tuple[int, int], ...] = ()  # of the arena, by the plugin
        self._short = False  # the last call was
        self._timer: asyncio.TimerHandle | None = None
        self._timer_s = math.inf
        self._progress_rate = RateLimit(_PROGRESS_PER_S)

    @property
    def running(self) -> Sent | None:
        """The call that runs."""
        return self._sent[0] if self._sent else None

    @property
    def free(self) -> bool:
        """Whether there is none. From any thread."""
        return not self._sent

    @property
    def ahead(self) -> int:
        """How many were sent that have not begun."""
        return max(0, len(self._sent) - 1)

    @property
    def takes_ahead(self) -> bool:
        """Whether a call may be sent ahead now."""
        if not self._short or not 0 < len(self._sent) < _SENT:
            return False
        if self._sent[-1].call.holds_up:  # while nothing is read, nobody could tell which of them runs
            return False
        # Not `<`: one that is about to begin has run for no time, which is NaN.
        return not self._loop.time() - self._sent[0].since_s >= _SHORT_S

    # To the worker.

    def begin(self, call: Invocation) -> None:
        """Run one tool; `call.replied` is told later what came of it. None may be running."""
        self._payloads.reset(self._held)
        try:
            sent, frame = self._encoded(call, self._encoder, announce=call.announce)
        except arena.ArenaFull as exc:
            text = f"the arguments are too large: {exc}; send less, or raise arena_bytes and [limits] memory_mib"
            self._refuse(call, Rejected("InputTooLarge", text, ReasonCode.INPUT_TOO_LARGE))
            return
        except Exception as exc:  # a caller's objects may raise anything while they are encoded
            self._refuse(call, Rejected("BadInput", _unsendable(call.arguments, exc)))
            return
        self._sent.append(sent)
        self._channel.write(frame)
        self._begins(sent, self._loop.time())

    def _rouse(self) -> None:
        """Tell the worker what it knows, so that it is awake when the call comes."""
        self._channel.send(wire.Taken(self._last_id))

    def _refuse(self, call: Invocation, rejected: Rejected) -> None:
        call.begins()
        self._loop.call_soon(call.replied, rejected)  # not now: a thousand refusals would nest

    def send_ahead(self, call: Invocation) -> bool:
        """Send a call while another one runs, where `takes_ahead`. False: this one has to wait for its turn."""
        if call.announce:
            return False
        try:
            sent, frame = self._encoded(call, _ahead_encoder, announce=False)
        except Exception:  # its caller is told why when its turn has come
            return False
        if sent.large:
            return False
        self._sent.append(sent)
        self._channel.write_soon(frame)
        return True

    def _encoded(self, call: Invocation, encoder: values.Encoder, *, announce: bool) -> tuple[Sent, bytes]:
        """Raises ArenaFull, and whatever the caller's objects raise."""
        arguments = call.arguments
        if not isinstance(arguments, wire.Encoded):
            arguments = wire.Encoded("python", encoder.encode(dict(arguments)))
        large = len(arguments.data) >= _LARGE_BYTES
        # Those that run are not over: what they put into the arena has not been taken out of it.
        taken = self._sent[0].call_id - 1 if self._sent else self._last_id
        number = self._last_id + 1
        message = wire.Call(number, call.tool, arguments.encoding, arguments.data, announce or large, taken)
        frame = wire.frame(message)
        self._last_id = number
        return Sent(number, call, arguments, large), frame

    def _begins(self, sent: Sent, now_s: float) -> None:
        sent.since_s = now_s
        self._grant(sent, _ARGUMENTS_S if sent.large else sent.call.timeout_s, now_s)
        sent.call.begins()

    # Deadlines. One timer for all calls, set anew only where a call is due before it: most calls are over long
    # before it fires, and a timer for each would cost more than the rest of its bookkeeping.

    def _grant(self, sent: Sent, time_s: float, now_s: float) -> None:
        """From now on the call has so much time."""
        sent.due_s = now_s + time_s
        if sent.due_s < self._timer_s:
            if self._timer is not None:
                self._timer.cancel()
            self._set_timer(sent.due_s)

    def _set_timer(self, due_s: float) -> None:
        self._timer_s = due_s
        self._timer = self._loop.call_at(due_s, self._on_timer)

    def _on_timer(self) -> None:
        self._timer, self._timer_s = None, math.inf
        running, now_s = self.running, self._loop.time()
        if running is None:
            return
        if running.due_s > now_s:
            self._set_timer(running.due_s)
        elif running.large:
            self._large_accepted(running)
        elif (held_s := running.call.take_held_s()) > 0:  # what its caller held the worker up for is left of it
            self._grant(running, held_s, now_s)
        elif not running.late:  # its answer may be there, and the loop was too busy to read it
            running.late = True
            self._grant(running, _READ_S, now_s)
        else:
            self._owner.overdue(running.call.timeout_s)

    def _large_accepted(self, sent: Sent) -> None:
        sent.large = False
        self._grant(sent, sent.call.timeout_s, self._loop.time())

    # From the worker.

    def on_message(self, message: wire.Result | wire.Failed | wire.Item | wire.Progress | wire.Began) -> None:
        """What it said of the call that runs.

        Raises:
            ProtocolBreach: it speaks of another one, or says what cannot be.
        """
        running = self.running
        if running is None or running.call_id != message.call_id:
            raise ProtocolBreach(f"it spoke of call {message.call_id}, which does not run")
        try:
            self._on_word(running, message)
        except (values.TooManyValues, values.NoJsonForm) as exc:  # a worker does not look into dataclasses
            self._on_failed(running, _unfit(message.call_id, exc))

    def _on_word(
        self, running: Sent, message: wire.Result | wire.Failed | wire.Item | wire.Progress | wire.Began
    ) -> None:
        match message:
            case wire.Result(value=value):
                self._keep_held(message.held)
                decoded = self._decode(value)
                if len(self._sent) > 1 and self._decoder.used_arena:
                    self._channel.write_soon(wire.frame(wire.Taken(message.call_id)))
                self._conclude(running, Value(decoded))
            case wire.Failed():
                self._keep_held(message.held)
                self._on_failed(running, message)
            case wire.Item(value=value):
                running.call.item(self._decode(value), memoryview(value).nbytes, self._channel)
            case wire.Progress(done=done, total=total):
                if math.isfinite(done) and math.isfinite(total) and self._progress_rate.admit() is not None:
                    running.call.progress(done, total)
            case _:  # Began
                running.call.began()
                if running.large:
                    self._large_accepted(running)

    def _keep_held(self, held: wire.Held) -> None:
        size = self._arena_in_bytes
        if held and any(offset < 0 or length < 0 or offset + length > size for offset, length in held):
            raise ProtocolBreach("it holds on to parts of the arena that there are not")
        self._held = held

    def _on_failed(self, running: Sent, failed: wire.Failed) -> None:
        if failed.kind not in wire.HARMLESS:
            self.broken(Broken(self._owner.broke(running, failed), failed.error_type))
        elif failed.kind == "input_too_large":
            reply = Rejected(failed.error_type, failed.message, ReasonCode.INPUT_TOO_LARGE)
            self._conclude(running, reply)
        else:
            self._conclude(running, Rejected(failed.error_type, failed.message))

    def _decode(self, value: msgspec.Raw) -> Any:
        if memoryview(value).nbytes > values.MAX_VALUE_BYTES:
            raise ProtocolBreach(f"it sent more than {values.MAX_VALUE_BYTES} bytes of plain values at once")
        try:
            return self._decoder.decode(value)
        except (values.TooManyValues, values.NoJsonForm):
            raise
        except Exception as exc:  # a worker may send anything; what does not decode is its breach
            raise ProtocolBreach(f"it sent a value that does not decode ({type(exc).__name__}: {exc})") from exc

    # The end of a call, and of all.

    def _conclude(self, running: Sent, reply: Reply) -> None:
        self._sent.popleft()
        now_s = self._loop.time()
        self._short = now_s - running.since_s < _SHORT_S
        running.call.replied(reply)  # which may begin the next one, or send some ahead
        if self._sent and math.isnan(self._sent[0].since_s):
            self._begins(self._sent[0], now_s)  # which the worker did when it had answered this one

    def ended(self) -> None:
        """The process has died, and its arena is about to be released: see how far it came."""
        # Its answers are not read to the end where it was ended for a call that had taken too long.
        if len(self._sent) > 1:
            note = self._arena_out.note
            self._begun = note if wire.noted_stage(note) is None else 0

    def broken(self, broken: Broken) -> None:
        """The plugin is no longer in service: the call that runs is told so, and those behind it."""
        if self._timer is not None:
            self._timer.cancel()
        sent, self._sent = self._sent, deque()
        self._short = False
        for number, each in enumerate(sent):
            if number > 0 and each.call_id > self._begun:
                each.call.turned_away(broken.cause)
                continue
            if number > 0:
                each.call.begins()
            each.call.replied(broken)


def _unfit(call_id: int, exc: values.TooManyValues | values.NoJsonForm) -> wire.Failed:
    """What a worker should have said of its result."""
    if isinstance(exc, values.TooManyValues):
        return wire.Failed(call_id, "too_large", "ResultTooLarge", f"{exc}; bytes and arrays may be longer")
    return wire.Failed(call_id, "invalid", "TypeError", str(exc))


def _unsendable(arguments: Mapping[str, Any] | wire.Encoded, exc: Exception) -> str:
    """Which of the arguments it is, and why."""
    for name, value in () if isinstance(arguments, wire.Encoded) else arguments.items():
        try:
            _inline_encoder.encode(value)
        except Exception as own:  # as before
            return f"argument `{name}` cannot be sent: {type(own).__name__}: {own}"
    return f"the arguments cannot be sent: {type(exc).__name__}: {exc}"


def _make_array(typestr: str, shape: tuple[int, ...], data: memoryview, _span: arena.Span | None) -> Array:
    return Array(typestr, shape, bytes(data))
