"""A worker's life: from the fork to the last call.

One thread reads the channel, runs the tool and answers. Nothing else of Holdfast runs in here, so a plugin
that hangs, hangs only itself: the deadline and the kill are the engine's.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import faulthandler
import importlib
import inspect
import math
import os
import socket
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from engine.sandbox import values, wire
from engine.sandbox.arena import Arena, ArenaFull, Span
from engine.sandbox.frames import Frames
from engine.worker import bytecode, confine, contain, failure, lending, load, mounts, tools

_PROGRESS_INTERVAL_S = 0.1  # a tool may report each of a million steps; a person reads ten a second
# To be woken up takes as long as all the rest of a short call, on virtual machines above all. So a worker that was
# called again soon after its last answer stays awake for a moment after the next one; others sleep at once.
_AWAKE_S = 200e-6
_SOON_S = 1e-3
_ROUSED_S = 2e-3  # a call is on its way, as soon as its arguments are copied: some 10 MB take that long
_FIRST_FD = 100  # our descriptors start here, so that a plugin that closes 3 to 99 does not hit them


_MAX_FD = os.sysconf("SC_OPEN_MAX")


def prepare() -> None:
    """In the fork server, once everything is imported: have ready what every worker would do again.

    A page that a worker writes to is its own from then on, and to look at a Python object is to write to it. So
    this is as much about a worker's memory as about its time.
    """
    tools.prepare()
    # A worker's first import looks into every folder anew, however fresh their times may be.
    importlib.invalidate_caches()
    _make_streams()
    # Out of the plugin's sight. Nothing of Holdfast is imported from here on.
    for name in [name for name in sys.modules if name == "engine" or name.startswith("engine.")]:
        del sys.modules[name]


def _make_streams() -> None:
    """`sys.stdin` to `sys.stderr`, as workers have them: over a pipe, because they ask what they are made for."""
    kept = [os.dup(fd) for fd in (1, 2)]
    reading, writing = os.pipe2(os.O_CLOEXEC)
    for fd in (1, 2):
        os.dup2(writing, fd)
    sys.stdin = open(0, closefd=False)  # noqa: SIM115
    sys.stdout, sys.stderr = _writer(1), _writer(2)
    for fd, old in zip((1, 2), kept, strict=True):
        os.dup2(old, fd)
    for fd in (*kept, reading, writing):
        os.close(fd)


def _writer(fd: int) -> TextIO:
    """A line is handed over when it is whole."""
    return open(fd, "w", buffering=1, encoding="utf-8", errors="backslashreplace", closefd=False)


class Descriptors(NamedTuple):
    """What a worker is given, in the order in which it travels."""

    channel: int
    output: int
    stack: int
    arena_in: int
    arena_out: int

    @classmethod
    def adopt(cls, fds: list[int]) -> Descriptors:
        """Move the descriptors to their places, and close every other one."""
        own = cls(*keep_only(fds))
        os.dup2(own.output, 1)  # 0 is /dev/null, as it is the fork server's
        os.dup2(own.output, 2)
        return own


class Channel:
    """Frames over the socketpair, blocking. Any thread may send; one receives."""

    def __init__(self, fd: int) -> None:
        self._socket = socket.socket(fileno=fd)
        self._socket.setblocking(True)
        self._lock = threading.Lock()
        self._frames = Frames()
        self._awake_s = 0.0  # how long to stay awake for what comes next
        self._answered = 0  # the last call that was
        self._over = False  # nobody hears us any more
        self._forked = False

    def send(self, message: wire.Message) -> None:
        """Send one message; a worker that has lost its channel ends here."""
        if self._forked:  # a child of the plugin's: its log lines are part of the output
            if isinstance(message, wire.LogLine):
                with contextlib.suppress(OSError):
                    os.write(2, f"{message.message}\n".encode())
            return
        with self._lock:
            self._put(message)

    def answer(self, message: wire.Result | wire.Failed) -> None:
        """Send the answer to a call."""
        if self._forked:  # by a tool that returned in the child as well
            os._exit(wire.EXIT_CHANNEL_LOST)
        with self._lock:
            self._answered = message.call_id
            self._put(message)

    def progress(self, message: wire.Progress) -> None:
        """Send it if the call is not answered: a thread of the tool may outlive the call."""
        if not self._forked:
            with self._lock:
                if message.call_id > self._answered:
                    self._put(message)

    def _put(self, message: wire.Message) -> None:
        try:
            if not self._over:
                self._socket.sendall(wire.frame(message))
        except OSError:
            os._exit(wire.EXIT_CHANNEL_LOST)

    def receive(self) -> memoryview | None:
        """The next frame, valid until the next call; None once the engine has closed its end."""
        while (frame := self._frames.take()) is None:
            try:
                count = self._wait(self._frames.room())
            except OSError:
                os._exit(wire.EXIT_CHANNEL_LOST)
            if not count:
                self._over = True
                return None
            self._frames.came(count)
        return frame

    def outlive(self) -> None:
        """Take no notice of what still comes: the engine has been told how we failed, and ends us."""
        while self.receive() is not None:
            pass

    def _wait(self, room: memoryview) -> int:
        """Receive something; the number of bytes."""
        began_s = time.perf_counter()
        while time.perf_counter() - began_s < self._awake_s:
            try:
                count = self._socket.recv_into(room, 0, socket.MSG_DONTWAIT)
            except BlockingIOError:
                continue
            self._awake_s = _AWAKE_S
            return count
        count = self._socket.recv_into(room)
        self._awake_s = _AWAKE_S if time.perf_counter() - began_s < _SOON_S else 0.0
        return count

    def stay_awake(self) -> None:
        """The engine has let us know that a call is on its way."""
        self._awake_s = _ROUSED_S

    def forget(self) -> None:
        """In a forked child of the plugin: it must not speak in the worker's name."""
        self._forked = True
        with contextlib.suppress(OSError):
            self._socket.close()


def keep_only(fds: list[int]) -> list[int]:
    """Move these descriptors to where ours start, and close every other one; their numbers from now on."""
    kept = [os.dup2(fd, _FIRST_FD + n, inheritable=False) for n, fd in enumerate(fds)]
    os.closerange(3, _FIRST_FD)
    os.closerange(_FIRST_FD + len(kept), _MAX_FD)
    return kept


def run(descriptors: Descriptors, scratch: str, shm_problem: str, problem: str) -> int:
    """Be a worker until the engine closes the channel; returns the exit status.

    Args:
        descriptors: what we were given.
        scratch: the folder to make and to work in.
        shm_problem: why we have no /dev/shm of our own; "" if we have.
        problem: of the time before, to be said; "" if there was none.
    """
    channel = Channel(descriptors.channel)
    # First of all: the engine answers while we contain ourselves.
    channel.send(wire.Hello(wire.PROTOCOL, os.getpid(), threading.get_ident()))
    _watch(descriptors.stack, channel)
    first = channel.receive()  # it is there already, or as much of it as the channel takes
    if first is None:
        return 0
    start = wire.start_request.decode(first)
    _settle_in(scratch)
    confine.limit(start.memory_bytes)
    results = Arena(descriptors.arena_out, writable=True)
    try:
        if problem:
            channel.send(wire.LogLine("warning", problem))
        if shm_problem:
            channel.send(wire.LogLine("warning", shm_problem))
        else:
            mounts.limit_shm(start.memory_bytes + start.memory_bytes // 4)  # the watch is to find it first
        contain.apply(start)
        sys.addaudithook(_suicide_note(descriptors.stack, start.folder))
        if (go := channel.receive()) is None:
            return 0
        wire.go_ahead.decode(go)
        plugin_tools = load.load(start, channel.send, lambda stage: _note(results, wire.note_of(stage)))
    except load.Refused as exc:
        channel.send(exc.report)
        channel.outlive()
        return 0
    payloads = Arena(descriptors.arena_in, writable=False)
    channel.send(wire.Ready({name: tool.info for name, tool in plugin_tools.items()}))
    Caller(channel, start.folder, plugin_tools, start.max_result_bytes, payloads, results).serve()
    bytecode.write()  # now, for nobody waits; a worker that dies keeps nothing
    atexit._run_exitfuncs()  # noqa: SLF001 - we leave by os._exit, which skips the plugin's own clean-up
    return 0


def _note(results: Arena, number: int) -> None:
    """Let the engine find out how far we came, should we die."""
    try:  # noqa: SIM105 - `suppress` takes as long as what it is for
        results.note = number
    except OSError:  # the plugin has closed it: then nobody can tell
        pass


def _watch(stack: int, channel: Channel) -> None:
    """Stack dumps, and forks of the plugin's."""
    faulthandler.enable(stack, all_threads=True)
    faulthandler.register(wire.DUMP_SIGNAL, stack, all_threads=True, chain=False)
    os.register_at_fork(after_in_child=channel.forget)


def _settle_in(scratch: str) -> None:
    """Make the folder to work in."""
    os.mkdir(scratch, 0o700)  # noqa: PTH102 - nothing so far needs a `Path`
    os.chdir(scratch)
    os.environ["TMPDIR"] = tempfile.tempdir = scratch


def _suicide_note(stack_fd: int, folder: str) -> Callable[[str, tuple[Any, ...]], None]:
    """An audit hook that writes down a signal the plugin sends to itself: afterwards nobody could tell."""

    def hook(event: str, args: tuple[Any, ...]) -> None:
        own = event in ("os.kill", "os.killpg") and args[0] in (0, os.getpid(), -os.getpid())
        if own or event == "signal.pthread_kill":  # a thread of another process cannot be named
            at = failure.caller(sys._getframe(1), Path(folder))  # noqa: SLF001 - the documented way to a frame
            with contextlib.suppress(OSError):
                os.write(stack_fd, f"self-signal {int(args[1])} at {at}\n".encode())

    return hook


class Caller:
    """Runs one call after the other, in the order in which they come."""

    def __init__(
        self,
        channel: Channel,
        folder: str,
        plugin_tools: dict[str, tools.BoundTool],
        max_result_bytes: int,
        payloads: Arena,
        results: Arena,
    ) -> None:
        self._channel = channel
        self._calls: deque[wire.Call] = deque()  # that came while we waited for something else
        self._in_arena = 0  # the last call whose result lies in the arena
        self._taken = 0  # up to this call the engine has copied what lay there
        self._folder = folder
        self._tools = plugin_tools
        self._max_result_bytes = max_result_bytes
        self._out = results
        self._encoder = values.Encoder(self._out)
        self._lender = lending.Lender(payloads.size)
        self._decoder = values.Decoder(payloads, self._lender.make, files=True)
        self._runner: asyncio.Runner | None = None

    def serve(self) -> None:
        """Answer calls until the engine closes the channel, or a call has broken the plugin."""
        while (call := self._next()) is not None:
            _note(self._out, call.call_id)
            answer = self._answer(call)
            held = self._lender.held()
            self._channel.answer(_holding(answer, held) if held else answer)
            if isinstance(answer, wire.Failed) and answer.kind not in wire.HARMLESS:
                self._channel.outlive()  # the calls behind it are refused
                return

    def _next(self) -> wire.Call | None:
        if self._calls:
            return self._calls.popleft()
        while (message := self._hear()) is not None:
            if isinstance(message, wire.Call):
                return message
        return None

    def _until_taken(self) -> None:
        """Wait until the engine has copied the last result out of the arena."""
        while self._taken < self._in_arena:
            message = self._hear()
            if message is None:
                os._exit(wire.EXIT_CHANNEL_LOST)
            if isinstance(message, wire.Call):
                self._calls.append(message)

    def _hear(self) -> wire.Call | wire.Taken | None:
        """The next message; either kind says what was taken."""
        frame = self._channel.receive()
        if frame is None:
            return None
        message: wire.Call | wire.Taken = wire.from_engine.decode(frame)
        if isinstance(message, wire.Call):
            self._taken = max(self._taken, message.taken)
        else:
            self._taken = max(self._taken, message.call_id)
            self._channel.stay_awake()
        return message

    def _answer(self, call: wire.Call) -> wire.Result | wire.Failed:
        tool = self._tools[call.tool]
        try:
            arguments = tools.decode(tool, call.encoding, call.arguments, self._decoder)
        except tools.BadInput as exc:
            return wire.Failed(call.call_id, "bad_input", "BadInput", failure.message(exc))
        except MemoryError:  # nothing of the plugin ran: whoever sent that much is to blame, not the plugin
            text = "the arguments do not fit into the memory that the plugin has left; send less"
            return wire.Failed(call.call_id, "input_too_large", "InputTooLarge", text)
        except BaseException as exc:  # a dataclass of the plugin's may have a `__post_init__`
            return self._failed(call.call_id, tool, exc)
        if call.announce:
            self._channel.send(wire.Began(call.call_id))
        if tool.info.progress:
            arguments["progress"] = self._progress(call.call_id)
        try:
            value = self._run(tool, arguments, call.call_id)
        except _Unsendable as exc:
            return exc.failed
        except BaseException as exc:  # plugin code may raise anything
            return self._failed(call.call_id, tool, exc)
        try:
            return wire.Result(call.call_id, self._encode(value, call.call_id, self._encoder))
        except _Unsendable as exc:
            return exc.failed

    def _run(self, tool: tools.BoundTool, arguments: dict[str, Any], call_id: int) -> Any:
        """The tool's value; a stream's items are sent as they come, and its value is None."""
        value = tool.method(**arguments)
        if type(value) in _SETTLED and not tool.info.streams:
            return value
        if inspect.isawaitable(value):
            value = self._await(value)
        if isinstance(value, AsyncIterator):
            for item in self._drive(value):
                self._channel.send(wire.Item(call_id, self._encode(item, call_id, _inline_encoder)))
            return None
        if tool.info.streams:
            for item in value:
                self._channel.send(wire.Item(call_id, self._encode(item, call_id, _inline_encoder)))
            return None
        return value

    def _await(self, value: Awaitable[Any]) -> Any:
        if self._runner is None:
            self._runner = asyncio.Runner()

        async def result() -> Any:
            return await value

        return self._runner.run(result())

    def _drive(self, items: AsyncIterator[Any]) -> Iterator[Any]:
        while True:
            try:
                item = self._await(anext(items))
            except StopAsyncIteration:
                return
            yield item

    def _progress(self, call_id: int) -> Callable[[float, float], None]:
        last_s = 0.0

        def progress(done: float, total: float) -> None:
            nonlocal last_s
            now_s = time.monotonic()
            if not (math.isfinite(done) and math.isfinite(total)):
                return  # there is no such number in JSON
            if now_s - last_s >= _PROGRESS_INTERVAL_S or 0 < total <= done:
                last_s = now_s
                self._channel.progress(wire.Progress(call_id, float(done), float(total)))

        return progress

    def _encode(self, value: Any, call_id: int, encoder: values.Encoder) -> Any:
        """Raises _Unsendable where the value cannot be sent."""
        try:
            self._until_taken()
            self._out.reset()
            encoded = tools.encode_result(value, encoder)
        except ArenaFull:
            raise _Unsendable(self._too_large(call_id)) from None
        except values.TooManyValues as exc:
            text = f"{exc}; bytes and arrays may be longer"
            raise _Unsendable(wire.Failed(call_id, "too_large", "ResultTooLarge", text)) from None
        except MemoryError:
            raise _Unsendable(wire.Failed(call_id, "memory", "MemoryError", "its result does not fit")) from None
        except BaseException as exc:  # a value may have hostile attributes
            kind, text = failure.type_name(type(exc)), failure.message(exc)
            raise _Unsendable(wire.Failed(call_id, "invalid", kind, text)) from None
        if memoryview(encoded).nbytes > min(self._max_result_bytes, wire.MAX_FRAME_BYTES - 1024):
            raise _Unsendable(self._too_large(call_id))
        if self._out.used:
            self._in_arena = call_id
        return encoded

    def _too_large(self, call_id: int) -> wire.Failed:
        text = f"more than {self._max_result_bytes} bytes"
        return wire.Failed(call_id, "too_large", "ResultTooLarge", text)

    def _failed(self, call_id: int, tool: tools.BoundTool, exc: BaseException) -> wire.Failed:
        """What the exception was; there is an answer whatever it does when it is looked at."""
        if isinstance(exc, MemoryError):
            confine.open_reserve()
        try:
            return self._described(call_id, tool, exc)
        except MemoryError:
            confine.open_reserve()
            return wire.Failed(call_id, "memory", "MemoryError", "")
        except BaseException:  # hostile in more than its `__str__`
            return wire.Failed(call_id, "exception", "an exception", "it cannot be described")

    def _described(self, call_id: int, tool: tools.BoundTool, exc: BaseException) -> wire.Failed:
        kind = "exception"
        if failure.is_any(exc, tool.rejects):
            kind = "rejected"
        elif failure.is_memory(exc):
            kind = "memory"
        if kind == "exception":
            self._channel.send(wire.LogLine("error", failure.trace(exc)))
        at = failure.where(exc.__traceback__, Path(self._folder))
        return wire.Failed(call_id, kind, failure.type_name(type(exc)), failure.message(exc), at)


_inline_encoder = values.Encoder(None)
_SETTLED = frozenset({type(None), bool, int, float, str, bytes, list, tuple, dict})  # nothing to wait for


class _Unsendable(Exception):
    def __init__(self, failed: wire.Failed) -> None:
        super().__init__(failed.message)
        self.failed = failed


def _holding(answer: wire.Result | wire.Failed, held: tuple[Span, ...]) -> wire.Result | wire.Failed:
    if isinstance(answer, wire.Result):
        return wire.Result(answer.call_id, answer.value, held)
    return wire.Failed(answer.call_id, answer.kind, answer.error_type, answer.message, answer.where, held)
