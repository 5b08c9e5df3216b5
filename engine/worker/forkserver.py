"""The fork server: the parent of every worker.

    engine ──control (SEQPACKET)── fork server ──fork── worker ── whatever the plugin starts
       └───────────────── channel, output, stack dump, arenas ──────┘

Its own parent is the reaper. It is warm (everything a worker needs is imported), single-threaded (so forking is
safe), and it runs no plugin code. Its three duties:

- fork a worker when the engine asks, and hand back a pidfd. After that, another one is forked in advance as soon
  as there is nothing else to do: the fork, and what follows whatever the plugin is, are half of a short start;
- tell how a worker died, once everything the worker had started is dead too. It is the child subreaper, so
  orphans land here, and any child of ours that is not a worker is such an orphan;
- when the engine goes away, however that happens, leave nothing behind: no process, no scratch folder. When the
  reaper does, no process: nobody would be left to end them if the fork server were lost, too.
"""

from __future__ import annotations

import contextlib
import errno
import gc
import os
import select
import signal
import socket
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from engine.sandbox import trees, wire
from engine.worker import confine, contain, mounts, native, reaper, rehearsal, serve

_SPARE, _WORKER = b"holdfast-spare", b"holdfast-worker"  # as `ps` shows them
_SWEEP_S = 1.0  # how long a killed orphan may take to die before we go on without it
_SLICE_S = 0.02  # of that at a time: who asks for a fork waits for one
_AGAIN_MS = 100  # until we come back to those that were left
_MAX_FDS = 16
# Blocked, not ignored or handled: a worker then has Python's own dispositions by unblocking them. Of these, only
# the death of a child is anything to us; only the engine's end ends us.
_BLOCKED = (signal.SIGCHLD, signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class _Ended(NamedTuple):
    """A worker that was collected, and that the engine does not know of yet."""

    token: int
    status: int
    scratch: Path
    told_by_s: float  # of the monotonic clock, whatever is left of what it had started


class _Spare(NamedTuple):
    """A worker that was forked in advance, and waits for what it is to be."""

    pid: int
    socket: socket.socket


class ForkServer:
    """Serves one engine, which holds the other end of the control socket.

    Args:
        control_fd: our end.
        reaper_pid: our parent.
        scratch_root: below it, and only there, lie the workers' scratch folders.
        private: files and folders of the engine that no plugin is to see.
    """

    def __init__(self, control_fd: int, reaper_pid: int, scratch_root: Path, private: Sequence[Path]) -> None:
        self._control = socket.socket(fileno=control_fd)
        self._control.setblocking(True)
        self._reaper_pid = reaper_pid
        self._scratch_root = scratch_root
        self._private = private
        self._workers: dict[int, tuple[int, Path]] = {}  # pid: (token, scratch folder)
        self._removers: set[int] = set()  # children of ours that delete a scratch folder
        self._littered: deque[Path] = deque()  # scratch folders that nobody deletes yet
        self._ended: deque[_Ended] = deque()
        self._swept = True  # there are no orphans, as far as we know
        self._spare: _Spare | None = None
        self._lacks_spare = False  # since the last request; one that was killed is not replaced before the next

    def run(self) -> None:
        """Serve until the engine or the reaper is gone, then clean up, whatever happened."""
        # Made by who removes it: an engine that was killed right after making it would leave it behind.
        with contextlib.suppress(OSError):  # a worker that cannot make its own folder in there says why
            self._scratch_root.mkdir(mode=0o700, parents=True, exist_ok=True)
            (self._scratch_root / wire.UPLOADS).mkdir(mode=0o700, exist_ok=True)
        try:
            self._serve()
        finally:
            self._leave_nothing()

    def _serve(self) -> None:
        reaper_fd = os.pidfd_open(self._reaper_pid)
        if os.getppid() != self._reaper_pid:
            return
        if self._private:
            # The parent of the scratch root, so that the root can still be removed: a mount point cannot.
            self._tell(wire.Isolated(mounts.hide(self._private, self._scratch_root.parent)), [])
        signal.pthread_sigmask(signal.SIG_BLOCK, _BLOCKED)
        for number in (signal.SIGTERM, signal.SIGHUP):  # which the reaper ignores
            signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        deaths = native.signal_fd([signal.SIGCHLD])
        confine.become_subreaper()
        contain.prepare()
        serve.prepare()
        gc.collect()
        gc.freeze()  # a worker's collections then leave our pages shared
        poll = select.poll()
        poll.register(self._control, select.POLLIN)
        poll.register(deaths, select.POLLIN)
        poll.register(reaper_fd, select.POLLIN)
        while True:
            ready = {fd for fd, _ in poll.poll(self._pause_ms())}
            if deaths in ready:
                with contextlib.suppress(BlockingIOError):
                    os.read(deaths, 4096)
                self._reap()
            if not self._swept:
                self._sweep()
            self._tidy()
            if reaper_fd in ready:
                return
            if self._control.fileno() in ready:
                if not self._serve_request():
                    return
                self._lacks_spare = self._spare is None
            elif not ready and self._lacks_spare:
                self._fork_spare()

    def _serve_request(self) -> bool:
        """Fork one worker. False once the engine is gone."""
        try:
            data, fds, _, _ = socket.recv_fds(self._control, 65536, _MAX_FDS)
        except OSError:
            return False
        if not data:
            return False
        request = wire.fork_request.decode(data)
        try:
            pid = self._worker_for(data, fds)
        except OSError as exc:  # a plugin has taken the machine's last process, or its memory
            self._tell(wire.NotForked(request.token, exc.errno or 0), [])
            return True
        finally:
            for fd in fds:
                os.close(fd)
        self._workers[pid] = (request.token, Path(request.scratch))
        pidfd = os.pidfd_open(pid)
        self._tell(wire.Forked(request.token, pid), [pidfd])
        os.close(pidfd)
        return True

    def _worker_for(self, data: bytes, fds: list[int]) -> int:
        """The pid of a worker that was told to serve this request. Raises OSError: there is no process for it."""
        for _ in range(2):
            if self._spare is None:
                self._spare = self._fork()
            spare, self._spare = self._spare, None
            with contextlib.suppress(ProcessLookupError):  # stopped, it would not have been noticed until now
                os.kill(spare.pid, signal.SIGCONT)
            with spare.socket, contextlib.suppress(BrokenPipeError, ConnectionResetError):  # it was killed
                socket.send_fds(spare.socket, [data], fds)
                return spare.pid
        raise BlockingIOError(errno.EAGAIN, "its processes die at once")

    def _fork_spare(self) -> None:
        self._lacks_spare = False
        with contextlib.suppress(OSError):  # as above: whoever asks is told
            self._spare = self._fork()

    def _fork(self) -> _Spare:
        """A process that waits to be told which plugin it serves. Raises OSError."""
        parent = os.getpid()
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            try:
                pid = os.fork()
            except OSError:
                ours.close()
                raise
            if pid == 0:
                _become_worker(parent, theirs)
        return _Spare(pid, ours)

    def _tell(self, message: wire.Message, fds: list[int]) -> None:
        """Send to the engine; if it is gone, the poll loop finds out by itself."""
        with contextlib.suppress(OSError):
            socket.send_fds(self._control, [wire.encode(message)], fds)

    def _pause_ms(self) -> int | None:
        """How long to wait for something to happen."""
        if self._ended or self._lacks_spare:
            return 0
        return None if self._swept and not self._littered else _AGAIN_MS

    def _reap(self) -> None:
        """Collect the dead children."""
        if not reaper.collect(time.monotonic() + _SLICE_S, self._on_end):
            self._swept = False

    def _on_end(self, pid: int, status: int) -> None:
        self._removers.discard(pid)
        if self._spare is not None and self._spare.pid == pid:
            self._spare.socket.close()
            self._spare = None
        if (worker := self._workers.pop(pid, None)) is not None:
            self._ended.append(_Ended(worker[0], status, worker[1], time.monotonic() + _SWEEP_S))
            self._swept = False

    def _sweep(self) -> None:
        """Kill orphans for a slice of time, and report the workers of which nothing is left."""
        self._swept = reaper.end_orphans(self._is_ours, _SLICE_S, self._on_end)
        while self._ended and (self._swept or self._ended[0].told_by_s <= time.monotonic()):
            worker = self._ended.popleft()
            self._tell(wire.Exited(worker.token, worker.status), [])
            self._littered.append(worker.scratch)

    def _is_ours(self, pid: int) -> bool:
        spare = self._spare is not None and self._spare.pid == pid
        return spare or pid in self._workers or pid in self._removers

    def _tidy(self) -> None:
        """Delete scratch folders; those that are not empty each in a child: a plugin may have put a million files
        there."""
        while self._littered:
            if _removed(self._littered[0]):
                self._littered.popleft()
                continue
            try:
                pid = os.fork()
            except OSError:  # as above: there will be one again
                return
            if pid == 0:
                try:
                    trees.remove_tree(self._littered[0])  # the engine tells what stays
                finally:
                    os._exit(0)
            self._removers.add(pid)
            self._littered.popleft()

    def _leave_nothing(self) -> None:
        """Every process below us ends; the scratch folders go with the engine, which else removes them."""
        reaper.end_orphans(lambda _: False, _SWEEP_S, lambda *_: None)
        if reaper.peer_is_gone(self._control):
            trees.remove_tree(self._scratch_root)


def _become_worker(parent: int, orders: socket.socket) -> None:
    """In the child: forget that we were a fork server; serve a plugin once we are told which. Never returns."""
    code = wire.EXIT_BROKEN
    try:
        native.unblock_signals()
        (kept,) = serve.keep_only([orders.detach()])
        with socket.socket(fileno=kept) as orders:
            shm_problem, refused = _settle_in(parent)
            problem = rehearsal.rehearse(lambda: reaper.readable(orders))
            data, fds, _, _ = socket.recv_fds(orders, 65536, _MAX_FDS)
        if not data:  # the fork server has no use for us
            os._exit(0)
        request = wire.fork_request.decode(data)
        if request.cgroup:
            refused = _enter_cgroup(fds.pop()) or refused
        descriptors = serve.Descriptors.adopt(fds)
        confine.rename(_WORKER)
        if refused is not None:  # said only now, since now there is somebody to hear it
            raise refused
        code = serve.run(descriptors, request.scratch, shm_problem, problem)
    except MemoryError:
        code = wire.EXIT_NO_MEMORY
    except BaseException as exc:  # the last line of defence: a child must never run the parent's loop
        with contextlib.suppress(OSError):
            os.write(2, f"holdfast worker: {type(exc).__name__}: {exc}\n".encode())
    finally:
        os._exit(code)


def _settle_in(parent: int) -> tuple[str, OSError | None]:
    """All that does not depend on the plugin: why there is no /dev/shm of our own, and what the kernel refused."""
    try:
        confine.rename(_SPARE)
        confine.detach(parent)
        confine.volunteer()
        if not (shm_problem := mounts.own_shm()):
            mounts.seal_proc()
    except OSError as exc:
        return "", exc
    return shm_problem, None


def _removed(folder: Path) -> bool:
    """Whether it was empty, and is gone. Looks at nothing in it."""
    try:
        folder.rmdir()
    except OSError:  # not empty; or no folder any more, whatever the plugin made of it
        return False
    return True


def _enter_cgroup(procs_fd: int) -> OSError | None:
    """Move this process, and so everything it will start. Why the kernel refused, if it did."""
    try:
        os.write(procs_fd, b"0\n")  # whoever writes it
    except OSError as exc:
        return OSError(exc.errno, f"it may not enter its cgroup: {exc.strerror}")
    return None
