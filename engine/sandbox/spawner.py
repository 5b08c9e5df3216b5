"""The engine's side of the fork server: ask for workers, be told how they died.

The fork server is the one process below the engine that is started by executing Python; everything else is
forked from it. If it is lost (somebody killed it), all workers are lost with it and the next start brings up
another.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import structlog

from engine.errors import HoldfastError
from engine.sandbox import wire

log = structlog.get_logger(__name__)

_MAIN = Path(__file__).resolve().parents[1] / "worker" / "__main__.py"
_FORK_TIMEOUT_S = 20.0  # it takes a millisecond; a fork server that takes this long was stopped, or starves
_END_TIMEOUT_S = 10.0

# What a plugin may see of the engine's environment: how to find programs, libraries, GPUs and the locale.
_ENVIRONMENT = (
    "HOME",
    "LANG",
    "LANGUAGE",
    "LD_LIBRARY_PATH",
    "PATH",
    "PYTHONPATH",
    "TZ",
    "USER",
    "VIRTUAL_ENV",
)
_ENVIRONMENT_PREFIXES = ("CUDA_", "LC_", "NVIDIA_", "TORCH_")
_THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMEXPR_NUM_THREADS")


class SpawnFailed(HoldfastError):
    """No worker could be made; an engine-side trouble, not the plugin's."""


class Spawned(NamedTuple):
    """A new process. Whoever gets it closes `pidfd`; `status` ends with its wait status, None if unknown."""

    pid: int
    pidfd: int
    status: asyncio.Future[int | None]


def worker_environment() -> dict[str, str]:
    """The minimal environment of every worker, with the BLAS libraries' threads capped at the core count."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if name in _ENVIRONMENT or name.startswith(_ENVIRONMENT_PREFIXES)
    }
    threads = str(min(4, os.cpu_count() or 1))
    return {**kept, **dict.fromkeys(_THREADS, threads), "PYTHONUNBUFFERED": "1"}


class Spawner:
    """Starts the fork server on first use, and again after it was lost.

    Args:
        scratch_root: a folder of its own, for the workers' scratch folders.
        private: files and folders that no plugin is to see, the scratch root's parent excepted.
    """

    def __init__(self, scratch_root: Path, private: Sequence[Path] = ()) -> None:
        self.scratch_root = scratch_root
        self.exposed: str | None = None  # why `private` is not hidden; "" if it is; None: not known yet
        self._private = private
        self._process: subprocess.Popen[bytes] | None = None
        self._burial: asyncio.Task[None] | None = None  # waits for one that was lost
        self._control: socket.socket | None = None
        self._starting = asyncio.Lock()
        self._sending = asyncio.Lock()
        self._next_token = 0
        # Invariant: a token is in `_forking` until its `Forked` came, then in `_exits` until its `Exited` came.
        self._forking: dict[int, asyncio.Future[tuple[int, int]]] = {}
        self._exits: dict[int, asyncio.Future[int | None]] = {}

    async def spawn(self, fds: Sequence[int], scratch: Path) -> Spawned:
        """A new worker process that holds copies of `fds` and works in `scratch`.

        Raises:
            SpawnFailed: the fork server does not start, or was lost meanwhile.
        """
        control = await self._ensure()
        loop = asyncio.get_running_loop()
        self._next_token += 1
        token = self._next_token
        forked = self._forking[token] = loop.create_future()
        try:
            await self._send(control, wire.Fork(token, str(scratch)), fds)
            pid, pidfd = await asyncio.wait_for(asyncio.shield(forked), _FORK_TIMEOUT_S)
        except TimeoutError:
            self._on_lost(control, "it does not answer")
            raise SpawnFailed("the fork server does not answer") from None
        except asyncio.CancelledError:
            if forked.done() and not forked.cancelled() and forked.exception() is None:
                _discard(forked.result()[1])  # it came in the very moment of the cancellation
            forked.cancel()
            raise
        except OSError as exc:
            raise SpawnFailed(f"the fork server does not answer: {exc}") from exc
        finally:
            self._forking.pop(token, None)
        return Spawned(pid, pidfd, self._exits[token])

    async def close(self) -> None:
        """End the fork server, which ends all that is left below it and removes the scratch folders."""
        control, self._control = self._control, None
        process, self._process = self._process, None
        if control is not None:
            asyncio.get_running_loop().remove_reader(control.fileno())
            control.close()
        if process is not None:
            await asyncio.to_thread(_wait, process)
        await self._buried()
        self._lose_all()
        # A fork server removes them itself, unless it was lost.
        await asyncio.to_thread(shutil.rmtree, self.scratch_root, ignore_errors=True)

    async def _buried(self) -> None:
        if self._burial is not None:
            await asyncio.wait([self._burial])

    async def _ensure(self) -> socket.socket:
        async with self._starting:
            if self._control is None:
                await self._buried()
                ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
                try:
                    self._process = await asyncio.to_thread(_launch, theirs, self.scratch_root, self._private)
                except OSError as exc:
                    ours.close()
                    raise SpawnFailed(f"the fork server does not start: {exc}") from exc
                finally:
                    theirs.close()
                ours.setblocking(False)
                asyncio.get_running_loop().add_reader(ours.fileno(), self._on_readable, ours)
                self._control = ours
            return self._control

    async def _send(self, control: socket.socket, message: wire.Message, fds: Sequence[int]) -> None:
        loop = asyncio.get_running_loop()
        data = wire.encode(message)
        async with self._sending:
            while True:
                try:
                    socket.send_fds(control, [data], fds)
                except BlockingIOError:
                    writable = loop.create_future()
                    loop.add_writer(control.fileno(), _resolve, writable)
                    try:
                        await writable
                    finally:
                        loop.remove_writer(control.fileno())
                else:
                    return

    def _on_readable(self, control: socket.socket) -> None:
        while True:
            try:
                data, fds, _, _ = socket.recv_fds(control, 65536, 1)
            except BlockingIOError:
                return
            except OSError as exc:
                self._on_lost(control, str(exc))
                return
            if not data:
                self._on_lost(control, "it ended")
                return
            message = wire.from_fork_server.decode(data)
            if isinstance(message, wire.Isolated):
                self.exposed = message.exposed
                if self.exposed:
                    log.warning("private_files_exposed", why=self.exposed)
            elif isinstance(message, wire.Forked):
                self._on_forked(message, fds)
            elif (exit_status := self._exits.pop(message.token, None)) and not exit_status.done():
                exit_status.set_result(message.status)

    def _on_forked(self, message: wire.Forked, fds: list[int]) -> None:
        self._exits[message.token] = asyncio.get_running_loop().create_future()
        waiting = self._forking.get(message.token)
        if not fds:  # this process has no descriptor left; without its channel the worker ends by itself
            if waiting is not None and not waiting.done():
                waiting.set_exception(
                    SpawnFailed("the engine has no file descriptor left; raise its limit (ulimit -n)")
                )
        elif waiting is None or waiting.done():  # whoever asked was cancelled: nobody will use this worker
            _discard(fds[0])
        else:
            waiting.set_result((message.pid, fds[0]))

    def _on_lost(self, control: socket.socket, why: str) -> None:
        log.error("fork_server_lost", why=why, workers=len(self._exits))
        asyncio.get_running_loop().remove_reader(control.fileno())
        control.close()
        self._control = None
        if self._process is not None:
            self._process.kill()  # without its end of the socket it is of no use, if it lives at all
            self._burial = asyncio.get_running_loop().create_task(asyncio.to_thread(_wait, self._process))
            self._process = None
        self._lose_all()

    def _lose_all(self) -> None:
        """Nobody is left to tell how a worker ended; the kernel kills them with their parent."""
        for forked in self._forking.values():
            if not forked.done():
                forked.set_exception(SpawnFailed("the fork server was lost"))
        for exit_status in self._exits.values():
            if not exit_status.done():
                exit_status.set_result(None)
        self._exits.clear()


def _launch(control: socket.socket, scratch_root: Path, private: Sequence[Path]) -> subprocess.Popen[bytes]:
    folders = [str(path.absolute()) for path in (scratch_root, *private)]  # its working directory is not ours
    command = [sys.executable, "-P", str(_MAIN), str(control.fileno()), *folders]
    return subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        env=worker_environment(),
        cwd="/",
        pass_fds=[control.fileno()],
        start_new_session=True,  # a Ctrl-C in the terminal is for the engine alone
    )


def _wait(process: subprocess.Popen[bytes]) -> None:
    try:
        process.wait(_END_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        log.error("fork_server_stuck", pid=process.pid)
        process.kill()
        process.wait()


def _discard(pidfd: int) -> None:
    """End a worker that nobody has, and let go of it."""
    with contextlib.suppress(ProcessLookupError):
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)
    os.close(pidfd)


def _resolve(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)
