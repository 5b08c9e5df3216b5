"""A worker as the engine sees it: started, called, watched, ended.

    engine                                   worker
      ├── Start ──────────────────────────────▶ (waits in the channel)
      │  Fork (fork server) ──────────────────▶ forked, confined
      │◀───────────────────────────── Hello ────┤ then makes its scratch folder, contains itself
      ├── Go, and watched from here on ───────▶ import, __init__, validate
      │◀────────────────── Ready | StartFailed ─┤
      ├── Call ───────────────────────────────▶ check arguments, run the tool
      │◀─ Began? Progress… Item… Result | Failed┤
      └── close ──────────────────────────────▶ atexit, exit

Whatever happens in between, a worker ends exactly once, with one `Verdict`.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import time
from collections.abc import Collection, Coroutine, Mapping
from pathlib import Path
from typing import Any, Protocol

import msgspec
import structlog

from engine.errors import Cause, ReasonCode
from engine.sandbox import arena, shm, wire
from engine.sandbox.calls import Calls, Sent
from engine.sandbox.channel import Channel, ProtocolBreach
from engine.sandbox.evidence import Death, Failure, Process
from engine.sandbox.fingerprint import InFlight
from engine.sandbox.limits import MemoryWatch
from engine.sandbox.output import Output, RateLimit
from engine.sandbox.replies import Broken, Invocation
from engine.sandbox.spawner import ForkServerLost, Loss, Spawned, Spawner
from engine.sandbox.stack import StackPipe
from engine.sandbox.verdict import (
    Ending,
    Evidence,
    ExitStatus,
    Verdict,
    failed_call,
    failed_start,
    lost_with,
    stage_name,
    verdict,
)

log = structlog.get_logger(__name__)

_EXIT_WAIT_S = 0.25  # between the channel's end and the process's, before it counts as a breach
_REAP_WAIT_S = 5.0  # for a killed process to die


class WorkerSpec(msgspec.Struct, frozen=True):
    """What a worker is started with."""

    start: wire.Start
    incarnation: int
    start_timeout_s: float
    processes: int
    scratch_bytes: int
    arena_bytes: int
    log_lines_per_s: float
    stop_grace_s: float


class Observer(Protocol):
    """Is told what goes on in a worker, besides the calls' own answers. Nothing here may block."""

    def worker_started(self, pid: int) -> None:
        """A process exists."""

    def worker_exited(self, worker: Worker, status: ExitStatus, verdict: Verdict) -> None:
        """It is gone, with everything it had started."""

    def worker_died(self, death: Death) -> None:
        """It died for a cause, with this evidence, which is the observer's to close. Before `worker_exited`."""

    def log_line(self, stream: str, level: str, line: str, dropped: int) -> None:
        """The plugin wrote something."""

    def fault(self, name: str, exc: BaseException) -> None:
        """The engine's own part of the worker failed."""


class StartFailed(Exception):
    """The worker did not get as far as Ready; `cause` says why."""

    def __init__(self, cause: Cause) -> None:
        super().__init__(cause.reason)
        self.cause = cause


class Worker:
    """One worker process. Made by `start`; ended by `end`, or by itself."""

    def __init__(
        self,
        spec: WorkerSpec,
        spawned: Spawned,
        observer: Observer,
        watch: MemoryWatch,
        stack: StackPipe,
        opened: contextlib.ExitStack,
    ) -> None:
        self.pid = spawned.pid
        self.memory_limit_bytes = spec.start.memory_bytes
        self.process_limit = spec.processes
        self.pidfd = spawned.pidfd
        self.shm_fd: int | None = None  # the worker's own /dev/shm
        self.scratch = spec.start.scratch
        self.scratch_limit_bytes = spec.scratch_bytes
        self.memory_bytes = 0
        self.memory_peak_bytes = 0
        self.memory_shared_bytes = 0
        self.processes: tuple[Process, ...] = ()
        self.process_count = 0
        self.over_memory = self.over_processes = False
        self.tools: dict[str, wire.ToolInfo] = {}
        self._spec = spec
        self._spawned = spawned
        self._observer = observer
        self._watch = watch
        self._stack = stack
        self._opened = opened  # all that has to be closed in the end
        self._loop = asyncio.get_running_loop()
        self._channel = Channel(self._on_message, self._on_channel_lost)
        self._greeted = False
        self._started: asyncio.Future[wire.Ready | wire.StartFailed | Verdict] = self._loop.create_future()
        self._died = asyncio.Event()  # the process has; the verdict comes later
        self._dead: asyncio.Future[Verdict] = self._loop.create_future()
        self._main_thread = 0
        self._ending: Ending | None = None
        self._breach = ""
        self._scratch_holds = ""
        self._known: Cause | None = None
        self._failure: Failure | None = None
        self._in_flight: InFlight | None = None  # the call that its end belongs to
        self._limit_s = 0.0
        self._log_rate = RateLimit(spec.log_lines_per_s)
        self._tasks: set[asyncio.Task[Any]] = set()

    @property
    def busy(self) -> bool:
        """Whether plugin code may be running."""
        return not self._started.done() or not self.calls.free

    @property
    def gone(self) -> bool:
        """Whether the process has died; the verdict may still be to come."""
        return self._died.is_set()

    @property
    def dead(self) -> bool:
        """Whether it was judged how the process died."""
        return self._dead.done()

    # Start.

    @classmethod
    async def start(
        cls, spec: WorkerSpec, spawner: Spawner, observer: Observer, watch: MemoryWatch, scratch: Path
    ) -> Worker:
        """A worker whose plugin passed `validate()`.

        Raises:
            StartFailed: it did not; the process is gone.
            SpawnFailed: the engine could not make a process.
        """
        with contextlib.ExitStack() as opened:  # closed again unless the worker takes it
            ours, theirs = socket.socketpair()
            with theirs, contextlib.ExitStack() as given:
                try:
                    ours.setblocking(False)
                    unsent = memoryview(wire.frame(spec.start))
                    unsent = unsent[ours.send(unsent) :]  # now: the worker need not wait for it
                    output, output_end = _pipe(given, os.O_CLOEXEC)
                    opened.callback(os.close, output)
                    stack_fd, stack_end = _pipe(given, os.O_CLOEXEC | os.O_NONBLOCK)
                    stack = StackPipe(stack_fd)
                    opened.callback(stack.close)
                    arena_in = arena.create(spec.arena_bytes)
                    opened.callback(os.close, arena_in)
                    arena_out = arena.create(spec.start.max_result_bytes)
                    opened.callback(os.close, arena_out)
                    fds = [theirs.fileno(), output_end, stack_end, arena_in, arena_out]
                    limits = {"memory_bytes": spec.start.memory_bytes, "processes": spec.processes}
                    spawned = await spawner.spawn(fds, scratch, **limits)
                except ForkServerLost as exc:
                    ours.close()
                    raise StartFailed(lost_with(exc.loss.how, " before it began")) from exc
                except BaseException:
                    ours.close()
                    raise
            worker = cls(spec, spawned, observer, watch, stack, opened.pop_all())
        connecting = asyncio.ensure_future(worker._connect(ours, unsent, output, arena_in, arena_out))
        try:
            await asyncio.shield(connecting)
        except asyncio.CancelledError:  # from here on somebody has to reap it
            await connecting
            await worker.end(Ending.STOP)
            raise
        await worker._bring_up()
        return worker

    async def _connect(
        self, channel: socket.socket, unsent: memoryview, output: int, arena_in: int, arena_out: int
    ) -> None:
        opened = self._opened
        opened.callback(os.close, self._spawned.pidfd)
        try:
            await self._channel.connect(channel)
            opened.callback(self._channel.close)
            if unsent:
                self._channel.write(unsent)
            self._arena_in = arena.Arena(arena_in, writable=True)
            opened.callback(self._arena_in.release)
            self._arena_out = arena.Arena(arena_out, writable=False)
            opened.callback(self._arena_out.release)
            self.calls = Calls(self, self._channel, self._arena_in, self._arena_out)
            self._output = Output(output, self._on_output, self._spec.log_lines_per_s)
            opened.callback(self._output.close)
            self._loop.add_reader(self._spawned.pidfd, self._died.set)
            opened.callback(self._loop.remove_reader, self._spawned.pidfd)
        except BaseException:  # nobody would end it, and the fork server collects it
            self._signal(signal.SIGKILL)
            self._release()
            raise
        self._observer.worker_started(self.pid)
        self._spawned.status.add_done_callback(self._on_status)
        self._own(self._reap())
        self._channel.hear()

    async def _bring_up(self) -> None:
        """Hello, Go, Ready, under the start's deadline; or StartFailed."""
        timeout_s = self._spec.start_timeout_s
        try:
            report = await asyncio.wait_for(asyncio.shield(self._started), timeout_s)
        except TimeoutError:
            self._limit_s = timeout_s
            ended = await self.end(Ending.START_TIMEOUT)
            raise StartFailed(_cause_of(ended)) from None
        except BaseException:  # a cancelled start, or a fault of our own: nobody else would end it
            await asyncio.shield(self.end(Ending.STOP))
            raise
        if isinstance(report, wire.Ready):
            self.tools = report.tools
            return
        if isinstance(report, wire.StartFailed):
            self._known = failed_start(report, self.memory_limit_bytes)
            if report.error_type:  # otherwise nothing was raised
                self._failure = Failure(report.error_type, report.message, report.where)
            await self.end(Ending.FAILED)
            raise StartFailed(self._known)
        raise StartFailed(_cause_of(report))

    # Calls.

    def begin(self, call: Invocation) -> None:
        """Run one tool, while none runs (the pool sees to that); `call.replied` is told what came of it."""
        if self.dead:
            call.begins()
            self._loop.call_soon(call.replied, Broken(_cause_of(self._dead.result())))
        else:
            self.calls.begin(call)

    def overdue(self, timeout_s: float) -> None:
        """The call that runs has had its time."""
        self._limit_s = timeout_s
        self._own(self.end(Ending.TIMEOUT))

    def broke(self, sent: Sent, failed: wire.Failed) -> Cause:
        """A call failed in a way that takes the plugin out of service. Returns the cause."""
        self._known = failed_call(failed, sent.call.tool, self.memory_limit_bytes)
        self._failure = Failure(failed.error_type, failed.message, failed.where)
        self._keep_in_flight(sent)  # now: once it is answered, its files may go
        self._own(self.end(Ending.FAILED))
        return self._known

    # The end.

    async def end(self, ending: Ending) -> Verdict:
        """End the process and everything it started; returns once all of it is gone.

        The first reason to end a worker stands; a later one only waits with it.
        """
        if self._ending is None and not self.dead:
            self._ending = ending
            self._own(self._end())
        return await asyncio.shield(self._dead)

    async def cause_of_death(self) -> Cause:
        """Why it died, once it has."""
        return _cause_of(await asyncio.shield(self._dead))

    async def _end(self) -> None:
        if self._ending is Ending.STOP and not self.busy:
            self._channel.close()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(asyncio.shield(self._dead), self._spec.stop_grace_s)
                return
        if self._ending in (Ending.TIMEOUT, Ending.START_TIMEOUT):
            self._signal(wire.DUMP_SIGNAL)
            try:
                if not await self._stack.arrived():
                    log.info("no_stack", pid=self.pid)
            except Exception as exc:  # a stack that cannot be had spares nobody
                self._observer.fault("worker", exc)
        self._signal(signal.SIGKILL)

    def _signal(self, number: int) -> None:
        """By pidfd: a pid may long be somebody else's."""
        if self._died.is_set():
            return
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._spawned.pidfd, number)

    def on_memory_breach(self) -> None:
        """The memory watch found it over its limit."""
        self._own(self.end(Ending.MEMORY))

    def on_process_breach(self) -> None:
        """The watch found more processes and threads than it may have."""
        self._own(self.end(Ending.PROCESSES))

    def on_scratch_breach(self, what: str) -> None:
        """The watch found more in its scratch folder than it may hold."""
        self._scratch_holds = self._scratch_holds or what
        self._own(self.end(Ending.SCRATCH))

    def _on_status(self, status: asyncio.Future[int | Loss | None]) -> None:
        """Nobody else is left to end a worker that outlived the fork server."""
        if not status.cancelled() and not isinstance(status.result(), int):
            self._signal(signal.SIGKILL)

    async def _reap(self) -> None:
        """Wait for the process to die, judge, and tell everybody, once."""
        await self._died.wait()
        died_s = time.monotonic()
        self._loop.remove_reader(self._spawned.pidfd)
        if self._ending is None and (self.over_memory or self.over_processes):  # the watch's word is on its way
            self._ending = Ending.MEMORY if self.over_memory else Ending.PROCESSES
        status, death = ExitStatus.from_wait(None), None
        try:
            raw: int | Loss | None = None
            with contextlib.suppress(TimeoutError):
                raw = await asyncio.wait_for(asyncio.shield(self._spawned.status), _REAP_WAIT_S)
            await self._heard_out()
            lost = raw.how if isinstance(raw, Loss) else ""
            status = ExitStatus.from_wait(raw if isinstance(raw, int) else None)
            oom_kills, at_limit = await self._kernel_kills(status, died_s)
            self._output.close()
            evidence = self._evidence(oom_kills, at_limit, lost)
            judged = verdict(status, evidence)
            death = self._death(status, evidence, judged)
        except Exception as exc:  # the evidence is in part what the plugin wrote, and somebody waits for a verdict
            self._observer.fault("verdict", exc)
            judged = _unjudged(exc)
            if self._in_flight is not None:
                self._in_flight.close()
        try:
            self.calls.ended()
            self._release()
        finally:
            self._dead.set_result(judged)
            if not self._started.done():
                self._started.set_result(judged)
            self._tell_death(status, judged, death)

    async def _heard_out(self) -> None:
        """What it had said before it died is told first: a call that was answered stays answered."""
        if not self._channel.paused and not self._channel.ended.is_set():
            with contextlib.suppress(TimeoutError):  # where a process that does not die holds the other end
                await asyncio.wait_for(self._channel.ended.wait(), _EXIT_WAIT_S)

    def _tell_death(self, status: ExitStatus, judged: Verdict, death: Death | None) -> None:
        """To the observer, and last to the caller, who is told whatever happens to the others."""
        try:
            if death is not None:
                self._observer.worker_died(death)
        except Exception as exc:  # the plugin has to leave service whether its evidence is kept or not
            self._observer.fault("evidence", exc)
            if death is not None and death.in_flight is not None:
                death.in_flight.close()
        try:
            self._observer.worker_exited(self, status, judged)
        finally:
            self.calls.broken(Broken(_cause_of(judged)))

    async def _kernel_kills(self, status: ExitStatus, died_s: float) -> tuple[int, bool]:
        """How many processes the kernel ended for memory, and whether at this worker's limit. Ends its cgroup."""
        leaf = self._spawned.leaf
        try:
            if leaf is not None:
                end = await asyncio.to_thread(leaf.end)
                self.memory_peak_bytes = max(self.memory_peak_bytes, end.peak_bytes)
                if not end.removed:
                    self._observer.fault("cgroup", TimeoutError(f"a process in {leaf.path} does not die"))
                return end.oom_kills, end.at_limit and end.oom_kills > 0
            # Before its hello it was not watched: nobody knows how many there had been.
            if status.signal == signal.SIGKILL and self._ending is None and self._greeted:
                return await asyncio.to_thread(self._watch.oom_kills_since, died_s), False
        except (OSError, RuntimeError) as exc:  # RuntimeError: no thread can be started
            self._observer.fault("memory evidence", exc)
        return 0, False

    def _evidence(self, oom_kills: int, at_limit: bool, lost: str) -> Evidence:
        full_bytes = shm.full_bytes(self.shm_fd)
        self.memory_peak_bytes = max(self.memory_peak_bytes, full_bytes)
        self.memory_shared_bytes = max(self.memory_shared_bytes, full_bytes)
        return Evidence(
            folder=self._spec.start.folder,
            doing=self._doing(),
            ending=self._ending,
            known=self._known,
            breach=self._breach,
            limit_s=self._limit_s,
            memory_limit_bytes=self.memory_limit_bytes,
            process_count=self.process_count,
            process_limit=self.process_limit,
            memory_peak_bytes=self.memory_peak_bytes,
            memory_shared_bytes=self.memory_shared_bytes,
            scratch_holds=self._scratch_holds,
            scratch_limit_bytes=self.scratch_limit_bytes,
            oom_kills=oom_kills,
            cgroup_limit=at_limit,
            lost=lost,
            stack=self._stack.text(),
            main_thread=self._main_thread,
            output_tail=self._output.tail(),
        )

    def _doing(self) -> str:
        if (running := self.calls.running) is not None:
            return f"`{running.call.tool}`"
        if self._started.done():
            return ""
        entered = wire.noted_stage(self._arena_out.note)
        return "its start" if entered is None else stage_name(entered)

    def _death(self, status: ExitStatus, evidence: Evidence, judged: Verdict) -> Death | None:
        """What is kept of it; None where the plugin is not to blame."""
        if (running := self.calls.running) is not None:
            self._keep_in_flight(running)
        in_flight, self._in_flight = self._in_flight, None
        if judged.cause is None:
            if in_flight is not None:
                in_flight.close()
            return None
        return Death(
            incarnation=self._spec.incarnation,
            pid=self.pid,
            time_ns=time.time_ns(),
            status=status,
            evidence=evidence,
            cause=judged.cause,
            failure=self._failure,
            in_flight=in_flight,
            processes=self.processes,
        )

    def _keep_in_flight(self, sent: Sent) -> None:
        ran_s, call = self._loop.time() - sent.since_s, sent.call
        info = self.tools.get(call.tool)
        parameters = "{}" if info is None else info.parameters
        arguments, arena_fd = sent.arguments, self._arena_in.fd
        self._in_flight = InFlight(call.tool, call.request_id, ran_s, arguments, parameters, arena_fd)

    def _release(self) -> None:
        self._opened.close()
        if self.shm_fd is not None:
            shm_fd, self.shm_fd = self.shm_fd, None
            os.close(shm_fd)

    # What the worker says.

    def _on_message(self, message: Any) -> None:
        if self._ending in (Ending.TIMEOUT, Ending.START_TIMEOUT):
            return  # too late: the deadline has passed, and the verdict answers
        match message:
            case wire.Result() | wire.Failed() | wire.Item() | wire.Progress() | wire.Began():
                self.calls.on_message(message)
            case wire.LogLine(level=level, message=line):
                if (dropped := self._log_rate.admit()) is not None:
                    self._observer.log_line("log", level, line, dropped)
            case wire.Hello() if not self._greeted:
                self._on_hello(message)
            case wire.Ready() | wire.StartFailed() if self._greeted and not self._started.done():
                if isinstance(message, wire.Ready):
                    _check_tools(message.tools, self._spec.start.tools)
                self._started.set_result(message)
            case _:
                raise ProtocolBreach(f"it sent {type(message).__name__} out of turn")

    def _on_hello(self, hello: wire.Hello) -> None:
        if hello.protocol != wire.PROTOCOL:
            raise ProtocolBreach(f"it speaks protocol {hello.protocol}, the engine {wire.PROTOCOL}")
        self._greeted = True
        self._main_thread = hello.main_thread
        if self._ending is not None:
            return
        try:
            self.shm_fd = shm.of(self.pid)  # before the plugin is touched
            self._channel.send(wire.Go())
            self._opened.callback(self._watch.discard, self)
            # Not before: the watch takes the interpreter for its first look, and a contained worker waits for Go.
            self._watch.add(self)
        except Exception as exc:  # which the start is told of
            self._started.set_exception(exc)

    def _on_channel_lost(self, breach: str | None) -> None:
        """The channel is over: by a breach, by the worker's death, or because the plugin closed it."""
        if self._ending is None and not self.dead:
            self._own(self._after_channel_lost(breach))

    async def _after_channel_lost(self, breach: str | None) -> None:
        if breach is None:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._died.wait(), _EXIT_WAIT_S)
                return  # it died, and its exit status says how
            breach = "it closed the descriptors that connect it with the engine"
        self._breach = breach
        await self.end(Ending.PROTOCOL)

    def _on_output(self, line: str, dropped: int) -> None:
        self._observer.log_line("output", "info", line, dropped)

    def _own(self, work: Coroutine[Any, Any, object]) -> None:
        """Run a coroutine that belongs to this worker."""
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._forget)

    def _forget(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (exc := task.exception()) is not None:
            self._observer.fault("worker", exc)


def _pipe(theirs: contextlib.ExitStack, flags: int) -> tuple[int, int]:
    """The reading end, whose caller closes it, and the other one."""
    reading, writing = os.pipe2(flags)
    theirs.callback(os.close, writing)
    return reading, writing


def _check_tools(tools: Mapping[str, wire.ToolInfo], wanted: Collection[str]) -> None:
    """A worker's tools are those of the manifest, and their schemas are shown to callers: they have to be JSON."""
    if tools.keys() != set(wanted):
        raise ProtocolBreach("it has other tools than its manifest")
    try:
        schemas = [msgspec.json.decode(info.parameters) for info in tools.values()]
    except (msgspec.DecodeError, RecursionError) as exc:
        raise ProtocolBreach(f"the schema of a tool is no JSON ({exc})") from exc
    if not all(isinstance(schema, dict) for schema in schemas):
        raise ProtocolBreach("the schema of a tool is no object")


def _unjudged(exc: Exception) -> Verdict:
    text = f"it died, and the engine failed to judge how ({type(exc).__name__}); see its log, restart the plugin"
    return Verdict(Cause(ReasonCode.ENGINE_FAULT, text))


def _cause_of(judged: Verdict) -> Cause:
    """The cause for a caller; a healthy worker that we ended under a call was ended by a restart or a stop."""
    if judged.cause is not None:
        return judged.cause
    return Cause(ReasonCode.RESTARTED, "the plugin was stopped or restarted while the call ran; call again")
