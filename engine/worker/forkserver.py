"""The fork server: the parent of every worker.

    engine ──control (SEQPACKET)── fork server ──fork── worker ── whatever the plugin starts
       └───────────────── channel, output, stack dump, arenas ──────┘

It is warm (everything a worker needs is imported), single-threaded (so forking is safe), and it runs no plugin
code. Its three duties:

- fork a worker when the engine asks, and hand back a pidfd;
- tell how a worker died, once everything the worker had started is dead too. It is the child subreaper, so
  orphans land here, and any child of ours that is not a worker is such an orphan;
- when the engine goes away, however that happens, leave nothing behind: no process, no scratch folder.
"""

from __future__ import annotations

import contextlib
import gc
import os
import select
import shutil
import signal
import socket
import time
from collections.abc import Sequence
from pathlib import Path

from engine.sandbox import proc, wire
from engine.worker import confine, contain, mounts, serve

_SWEEP_S = 1.0  # how long a killed orphan may take to die before we go on without it
_AGAIN_MS = 100  # until we come back to those that were left
_MAX_FDS = 16


class ForkServer:
    """Serves one engine, which holds the other end of the control socket.

    Args:
        control_fd: our end.
        scratch_root: below it, and only there, lie the workers' scratch folders.
        private: files and folders of the engine that no plugin is to see.
    """

    def __init__(self, control_fd: int, scratch_root: Path, private: Sequence[Path]) -> None:
        self._control = socket.socket(fileno=control_fd)
        self._control.setblocking(True)
        self._scratch_root = scratch_root
        self._private = private
        self._workers: dict[int, tuple[int, Path]] = {}  # pid: (token, scratch folder)
        self._removers: set[int] = set()  # children of ours that delete a scratch folder
        self._swept = True  # no orphan outlived its sweep

    def run(self) -> None:
        """Serve until the engine is gone, then clean up, whatever happened."""
        # Made by who removes it: an engine that was killed right after making it would leave it behind.
        with contextlib.suppress(OSError):  # a worker that cannot make its own folder in there says why
            self._scratch_root.mkdir(mode=0o700, parents=True, exist_ok=True)
            (self._scratch_root / wire.UPLOADS).mkdir(mode=0o700, exist_ok=True)
        try:
            self._serve()
        finally:
            self._leave_nothing()

    def _serve(self) -> None:
        if self._private:
            # The parent of the scratch root, so that the root can still be removed: a mount point cannot.
            self._tell(wire.Isolated(mounts.hide(self._private, self._scratch_root.parent)), [])
        wake_in, wake_out = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(wake_out, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)  # wakes the poll below
        for ignored in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(ignored, signal.SIG_IGN)  # only the engine's end ends us
        confine.become_subreaper()
        contain.prepare()
        gc.collect()
        gc.freeze()  # a worker's collections then leave our pages shared
        poll = select.poll()
        poll.register(self._control, select.POLLIN)
        poll.register(wake_in, select.POLLIN)
        while True:
            ready = {fd for fd, _ in poll.poll(None if self._swept else _AGAIN_MS)}
            if not self._swept:
                self._kill_orphans()
            if wake_in in ready:
                with contextlib.suppress(BlockingIOError):
                    os.read(wake_in, 4096)
                self._reap()
            if self._control.fileno() in ready and not self._serve_request():
                return

    def _serve_request(self) -> bool:
        """Fork one worker. False once the engine is gone."""
        try:
            data, fds, _, _ = socket.recv_fds(self._control, 65536, _MAX_FDS)
        except OSError:
            return False
        if not data:
            return False
        request = wire.fork_request.decode(data)
        parent = os.getpid()
        pid = os.fork()
        if pid == 0:
            self._become_worker(parent, request, fds)
        for fd in fds:
            os.close(fd)
        self._workers[pid] = (request.token, Path(request.scratch))
        pidfd = os.pidfd_open(pid)
        self._tell(wire.Forked(request.token, pid), [pidfd])
        os.close(pidfd)
        return True

    def _become_worker(self, parent: int, request: wire.Fork, fds: list[int]) -> None:
        """In the child: forget that we were a fork server, and serve a plugin. Never returns."""
        code = wire.EXIT_BROKEN
        try:
            signal.set_wakeup_fd(-1)
            for number in (signal.SIGCHLD, signal.SIGTERM, signal.SIGHUP):
                signal.signal(number, signal.SIG_DFL)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            descriptors = serve.Descriptors.adopt(fds)
            confine.detach(parent)
            code = serve.run(descriptors, Path(request.scratch))
        except MemoryError:
            code = wire.EXIT_NO_MEMORY
        except BaseException as exc:  # the last line of defence: a child must never run the parent's loop
            with contextlib.suppress(OSError):
                os.write(2, f"holdfast worker: {type(exc).__name__}: {exc}\n".encode())
        finally:
            os._exit(code)

    def _tell(self, message: wire.Message, fds: list[int]) -> None:
        """Send to the engine; if it is gone, the poll loop finds out by itself."""
        with contextlib.suppress(OSError):
            socket.send_fds(self._control, [wire.encode(message)], fds)

    def _reap(self) -> None:
        """Collect every dead child; report the workers among them."""
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            self._removers.discard(pid)
            if (worker := self._workers.pop(pid, None)) is not None:
                token, scratch = worker
                self._kill_orphans()
                self._tell(wire.Exited(token, status), [])
                self._remove(scratch)

    def _kill_orphans(self) -> None:
        """Kill every child that is not a worker, and what lands here when those die, until there is none."""
        deadline = time.monotonic() + _SWEEP_S
        while time.monotonic() < deadline:
            orphans = [
                pid for pid in proc.children(os.getpid()) if pid not in self._workers and pid not in self._removers
            ]
            if not orphans:
                self._swept = True
                return
            for pid in orphans:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            for pid in orphans:
                with contextlib.suppress(ChildProcessError):
                    while os.waitpid(pid, os.WNOHANG) == (0, 0) and time.monotonic() < deadline:
                        time.sleep(0.0005)
        self._swept = False

    def _remove(self, folder: Path) -> None:
        """Delete a scratch folder in a child, because a plugin may have put a million files there."""
        pid = os.fork()
        if pid:
            self._removers.add(pid)
            return
        try:
            shutil.rmtree(folder, ignore_errors=True)
        finally:
            os._exit(0)

    def _leave_nothing(self) -> None:
        """The engine is gone: so must be every process below us and every scratch folder."""
        self._workers.clear()
        self._kill_orphans()
        shutil.rmtree(self._scratch_root, ignore_errors=True)
