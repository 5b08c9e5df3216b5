"""The engine's side of the fork server: ask for workers, be told how they died.

The reaper is the one process below the engine that is started by executing Python; the fork server is forked from
it, and everything else from that. If the fork server is lost (somebody killed it), all workers are lost with it:
the reaper ends what is left of them, we remove their scratch folders, and the next start brings up another.
"""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import structlog

from engine.errors import HoldfastError
from engine.sandbox import launcher, wire
from engine.sandbox.cgroup import Cgroups, Leaf

log = structlog.get_logger(__name__)

_FORK_TIMEOUT_S = 20.0  # it takes a millisecond; a fork server that takes this long was stopped, or starves


class SpawnFailed(HoldfastError):
    """No worker could be made; an engine-side trouble, not the plugin's."""


class Loss(NamedTuple):
    """The end of a fork server that nobody asked for."""

    how: str  # "the fork server was killed by SIGKILL"


class ForkServerLost(SpawnFailed):
    """The fork server was lost before there was a worker; `loss` says how."""

    def __init__(self, loss: Loss) -> None:
        super().__init__(loss.how)
        self.loss = loss


class Spawned(NamedTuple):
    """A new process. Whoever gets it closes `pidfd`.

    `status` ends with its wait status; where nobody is left to tell it, with the loss of the fork server, or with
    None where we ended that ourselves.
    """

    pid: int
    pidfd: int
    status: asyncio.Future[int | Loss | None]
    leaf: Leaf | None  # its cgroup, which whoever gets it ends


class Spawner:
    """Starts the fork server on first use, and again after it was lost.

    Args:
        scratch_root: a folder of its own, for the workers' scratch folders.
        on_fault: counts and names an exception of our own that nobody waits for.
        private: files and folders that no plugin is to see, the scratch root's parent excepted.
        cgroups: where each worker gets a leaf of its own, if there is such a place.
    """

    def __init__(
        self,
        scratch_root: Path,
        on_fault: Callable[[str, BaseException], None],
        private: Sequence[Path] = (),
        cgroups: Cgroups | None = None,
    ) -> None:
        self.scratch_root = scratch_root
        self._on_fault = on_fault
        self.exposed: str | None = None  # why `private` is not hidden; "" if it is; None: not known yet
        self._private = private
        self._cgroups = cgroups
        self._removals: set[asyncio.Task[None]] = set()  # of leaves that nobody got
        self.fork_server_pid: int | None = None  # as the reaper told it
        self._process: subprocess.Popen[bytes] | None = None  # the reaper
        self._fork_server: int | None = None  # its pidfd
        self._burial: asyncio.Task[None] | None = None  # waits for one that was lost
        self._control: socket.socket | None = None
        self._starting = asyncio.Lock()
        self._sending = asyncio.Lock()
        self._writable: asyncio.Future[None] | None = None  # what a message that does not fit yet waits for
        self._stuck = ""  # why we killed the fork server ourselves
        self._next_token = 0
        # Invariant: a token is in `_forking` until its `Forked` came, then in `_exits` until its `Exited` came.
        self._forking: dict[int, asyncio.Future[tuple[int, int, asyncio.Future[int | Loss | None]]]] = {}
        self._exits: dict[int, asyncio.Future[int | Loss | None]] = {}

    @property
    def reaper_pid(self) -> int | None:
        """The process that the fork server was forked from; None where there is none now."""
        return None if self._process is None else self._process.pid

    async def spawn(
        self, fds: Sequence[int], scratch: Path, *, memory_bytes: int = 0, processes: int = 0
    ) -> Spawned:
        """A new worker process that holds copies of `fds` and works in `scratch`.

        Args:
            fds: what `wire.Fork` carries.
            scratch: its folder.
            memory_bytes: the limit of its cgroup, where it gets one.
            processes: likewise; threads count.

        Raises:
            SpawnFailed: the fork server does not start, or no cgroup can be made.
            ForkServerLost: it was lost meanwhile.
        """
        if self._cgroups is None:
            return await self._spawn(fds, scratch, None)
        making = asyncio.ensure_future(asyncio.to_thread(self._cgroups.leaf, memory_bytes, processes))
        leaf = None
        try:
            leaf = await asyncio.shield(making)
            return await self._spawn(fds, scratch, leaf)
        except BaseException as exc:
            self._end_unused(making)
            if leaf is None and isinstance(exc, OSError):
                raise SpawnFailed(f"no cgroup can be made for it: {exc}") from exc
            raise
        finally:
            if leaf is not None:
                leaf.close()

    def _end_unused(self, making: asyncio.Future[Leaf]) -> None:
        async def end() -> None:
            try:
                leaf = await making
                await asyncio.to_thread(leaf.end)
            except OSError as exc:  # where it was not made, `spawn` says so
                log.warning("cgroup_not_removed", why=str(exc))

        task = asyncio.get_running_loop().create_task(end())
        self._removals.add(task)
        task.add_done_callback(self._removals.discard)

    async def _spawn(self, fds: Sequence[int], scratch: Path, leaf: Leaf | None) -> Spawned:
        if leaf is not None and leaf.procs_fd is not None:
            fds = [*fds, leaf.procs_fd]
        control = await self._ensure()
        loop = asyncio.get_running_loop()
        self._next_token += 1
        token = self._next_token
        forked = self._forking[token] = loop.create_future()
        late = loop.call_later(_FORK_TIMEOUT_S, self._give_up, control)
        try:
            await self._send(control, wire.Fork(token, str(scratch), leaf is not None), fds)
            pid, pidfd, status = await asyncio.shield(forked)
        except asyncio.CancelledError:
            if forked.done() and not forked.cancelled() and forked.exception() is None:
                _discard(forked.result()[1])  # it came in the very moment of the cancellation
            forked.cancel()
            raise
        except OSError as exc:
            raise SpawnFailed(f"the fork server cannot be asked: {exc}") from exc
        finally:
            late.cancel()
            self._forking.pop(token, None)
        return Spawned(pid, pidfd, status, leaf)

    async def close(self) -> None:
        """End the fork server, which ends all that is left below it and removes the scratch folders."""
        process, pidfd = self._hang_up()
        if process is not None:
            await asyncio.to_thread(launcher.see_off, process, pidfd)
        await self._buried()
        self._lose_all(None)
        if self._removals:
            await asyncio.wait(self._removals)
        # A fork server removes them itself, unless it was lost.
        await asyncio.to_thread(launcher.remove, self.scratch_root)

    async def _buried(self) -> None:
        if self._burial is not None:
            await asyncio.wait([self._burial])

    async def _ensure(self) -> socket.socket:
        async with self._starting:
            if self._control is not None:
                return self._control
            # A start that is cancelled leaves a fork server for the next one, not half of one.
            launching = asyncio.ensure_future(self._launch())
            try:
                return await asyncio.shield(launching)
            except asyncio.CancelledError:
                await asyncio.wait([launching])
                raise

    async def _launch(self) -> socket.socket:
        await self._buried()
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            self._process = await asyncio.to_thread(launcher.launch, theirs, self.scratch_root, self._private)
        except (OSError, RuntimeError) as exc:  # RuntimeError: no thread can be started
            ours.close()
            raise SpawnFailed(f"the fork server does not start: {exc}") from exc
        finally:
            theirs.close()
        ours.setblocking(False)
        asyncio.get_running_loop().add_reader(ours.fileno(), self._on_readable, ours)
        self._control = ours
        return ours

    async def _send(self, control: socket.socket, message: wire.Message, fds: Sequence[int]) -> None:
        """Returns once it is sent, or can no longer be: whoever waits for the answer is then told why."""
        data = wire.encode(message)
        async with self._sending:
            while self._control is control:
                try:
                    socket.send_fds(control, [data], fds)
                except BlockingIOError:
                    await self._until_writable(control)
                except BrokenPipeError:  # its end is about to be read
                    return
                else:
                    return

    async def _until_writable(self, control: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        self._writable = loop.create_future()
        loop.add_writer(control.fileno(), _resolve, self._writable)
        try:
            await self._writable
        finally:
            if self._control is control:
                loop.remove_writer(control.fileno())

    def _on_readable(self, control: socket.socket) -> None:
        while True:
            try:
                data, fds, _, _ = socket.recv_fds(control, 65536, 1)
            except BlockingIOError:
                return
            except ConnectionResetError:  # told once, where it left a request unread; its last words come after it
                continue
            except OSError as exc:
                self._on_lost(control, Loss(f"the fork server cannot be heard ({exc})"))
                return
            if not data:
                self._on_lost(control, Loss(self._how_the_reaper_ended()))
                return
            message = wire.from_fork_server.decode(data)
            if isinstance(message, wire.Isolated):
                self.exposed = message.exposed
                if self.exposed:
                    log.warning("private_files_exposed", why=self.exposed)
            elif isinstance(message, wire.Serving):
                self.fork_server_pid = message.pid
                self._fork_server = fds[0] if fds else None
            elif isinstance(message, wire.Forked):
                self._on_forked(message, fds)
            elif isinstance(message, wire.NotForked):
                self._on_not_forked(message)
            elif isinstance(message, wire.Lost):
                how = self._stuck or f"the fork server {launcher.ended(os.waitstatus_to_exitcode(message.status))}"
                self._on_lost(control, Loss(how))
                return
            elif (exit_status := self._exits.pop(message.token, None)) and not exit_status.done():
                exit_status.set_result(message.status)

    def _on_forked(self, message: wire.Forked, fds: list[int]) -> None:
        status = self._exits[message.token] = asyncio.get_running_loop().create_future()
        waiting = self._forking.get(message.token)
        if not fds:  # this process has no descriptor left; without its channel the worker ends by itself
            if waiting is not None and not waiting.done():
                waiting.set_exception(
                    SpawnFailed("the engine has no file descriptor left; raise its limit (ulimit -n)")
                )
        elif waiting is None or waiting.done():  # whoever asked was cancelled: nobody will use this worker
            _discard(fds[0])
        else:
            # With its status, which may come before whoever waits here is woken.
            waiting.set_result((message.pid, fds[0], status))

    def _on_not_forked(self, message: wire.NotForked) -> None:
        waiting = self._forking.get(message.token)
        if waiting is not None and not waiting.done():
            why = f"the kernel gives no process ({os.strerror(message.errno)})"
            waiting.set_exception(SpawnFailed(f"{why}; end some, or raise the limit (ulimit -u, pids.max)"))

    def _give_up(self, control: socket.socket) -> None:
        """It did not answer in time: kill it. The reaper then tells us of its end, as of any other."""
        if self._control is not control:
            return
        self._stuck = f"the fork server did not answer for {_FORK_TIMEOUT_S:g} s, so the engine ended it"
        loss, loop = Loss(self._stuck), asyncio.get_running_loop()
        if self._fork_server is None:
            self._on_lost(control, loss)
            return
        launcher.kill(self._fork_server)
        loop.call_later(launcher.END_TIMEOUT_S, self._on_lost, control, loss)  # should the reaper be stopped, too

    def _how_the_reaper_ended(self) -> str:
        """The control socket has ended without a word from the reaper."""
        code = None if self._process is None else self._process.poll()
        if code is None:
            return "the fork server ended"
        return f"the reaper, the fork server's parent, {launcher.ended(code)}"

    def _on_lost(self, control: socket.socket, loss: Loss) -> None:
        if self._control is not control:
            return
        log.error("fork_server_lost", how=loss.how, workers=len(self._exits))
        process, pidfd = self._hang_up()
        self._burial = asyncio.get_running_loop().create_task(self._bury(process, pidfd))
        self._lose_all(loss)

    async def _bury(self, process: subprocess.Popen[bytes] | None, pidfd: int | None) -> None:
        try:
            await asyncio.to_thread(launcher.bury, process, pidfd, self.scratch_root)
        except Exception as exc:  # the next start goes on; what is left goes with the scratch root, in `close`
            self._on_fault("fork server burial", exc)

    def _hang_up(self) -> tuple[subprocess.Popen[bytes] | None, int | None]:
        """Close the control socket, and let go of the reaper and of the fork server's pidfd."""
        control, self._control = self._control, None
        process, self._process = self._process, None
        pidfd, self._fork_server = self._fork_server, None
        self.fork_server_pid, self._stuck = None, ""
        if control is not None:
            loop = asyncio.get_running_loop()
            loop.remove_reader(control.fileno())
            loop.remove_writer(control.fileno())
            control.close()
        if self._writable is not None:
            _resolve(self._writable)
        return process, pidfd

    def _lose_all(self, loss: Loss | None) -> None:
        """Nobody is left to tell how a worker ended."""
        for forked in self._forking.values():
            if not forked.done():
                forked.set_exception(ForkServerLost(loss or Loss("the engine ended the fork server")))
        for exit_status in self._exits.values():
            if not exit_status.done():
                exit_status.set_result(loss)
        self._exits.clear()


def _discard(pidfd: int) -> None:
    """End a worker that nobody has, and let go of it."""
    launcher.kill(pidfd)
    os.close(pidfd)


def _resolve(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)
