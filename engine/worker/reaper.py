"""The reaper: the parent of the fork server, for the day on which somebody kills that one.

    engine ── reaper ── fork server ── workers ── whatever plugins start

Orphans go to their nearest ancestor that is a child subreaper. While the fork server lives it gets them; after it,
a daemon in a session of its own would go to init and live on, so the reaper gets them, ends all of them, and tells
the engine how the fork server ended. It does nothing else, and there is nothing that it could break on. Should
the reaper be the one that is killed, the fork server ends everything below it, and itself.

Both hold the worker's side of the control socket: when the engine sees its end, nothing is left below it.
"""

from __future__ import annotations

import contextlib
import gc
import os
import select
import signal
import socket
import time
import traceback
from collections.abc import Callable
from pathlib import Path

from engine.sandbox import proc, trees, wire
from engine.worker import confine

_END_S = 8.0  # for a fork server to leave nothing behind, once the engine is gone
_SWEEP_S = 5.0  # for processes that were killed to be dead
_COLLECT_S = 0.005  # at a time: while the dead come without pause, the living are killed all the same


def watch_over(control_fd: int, scratch_root: Path, serve: Callable[[], None]) -> None:
    """Fork the fork server and stay until it is gone, and everything that was below it.

    Args:
        control_fd: the socket to the engine; the fork server's as well.
        scratch_root: removed in the end if the engine is gone too.
        serve: the fork server's life.
    """
    confine.become_subreaper()
    for ignored in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(ignored, signal.SIG_IGN)  # only the engine's end, and the fork server's, ends us
    gc.collect()
    gc.freeze()
    pid = os.fork()
    if pid == 0:
        _become_fork_server(serve)
    control = socket.socket(fileno=control_fd)
    pidfd = os.pidfd_open(pid)
    _tell(control, wire.Serving(pid), [pidfd])
    status = _wait(pid, pidfd, control)
    end_orphans(lambda _: False, _SWEEP_S, lambda *_: None)
    if peer_is_gone(control):
        trees.remove_tree(scratch_root)
    else:
        _tell(control, wire.Lost(status), [])


def _become_fork_server(serve: Callable[[], None]) -> None:
    """In the child. Never returns."""
    code = 1
    try:
        os.setsid()  # a signal to one's process group is not one to the other's
        serve()
        code = 0
    except BaseException:  # the last line of defence: this child must never run the reaper's part
        traceback.print_exc()
    finally:
        os._exit(code)


def _tell(control: socket.socket, message: wire.Message, fds: list[int]) -> None:
    with contextlib.suppress(OSError):  # the engine is gone
        socket.send_fds(control, [wire.encode(message)], fds)


def _wait(pid: int, pidfd: int, control: socket.socket) -> int:
    """Until the fork server is dead; its wait status. One that outlives the engine, being stopped, is ended."""
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    poll.register(control, 0)  # the other side's end is told unasked
    timeout_ms = None
    while True:
        ready = {fd for fd, _ in poll.poll(timeout_ms)}
        if pidfd in ready:
            return os.waitpid(pid, 0)[1]
        if ready:
            poll.unregister(control)
            timeout_ms = _END_S * 1000
        else:
            os.kill(pid, signal.SIGKILL)


def readable(end: socket.socket) -> bool:
    """Whether something waits there to be read."""
    return _has(end, select.POLLIN)


def peer_is_gone(control: socket.socket) -> bool:
    """Whether the engine has closed its end of the control socket."""
    return _has(control, 0)


def _has(end: socket.socket, events: int) -> bool:
    """Whether one of these events, or the end of the other side, is there now."""
    poll = select.poll()
    poll.register(end, events)
    return bool(poll.poll(0))


def end_orphans(spared: Callable[[int], bool], within_s: float, on_end: Callable[[int, int], None]) -> bool:
    """Kill every child of this process, and what lands here when those die, until there is none.

    A process that forks and exits without pause has another number by the time that a pass over all of /proc
    comes to it. So the kernel's list of our children is worked through.

    Args:
        spared: whether a child stays.
        within_s: about how long to try.
        on_end: told of each child that ended, spared or not: its pid and its wait status.

    Returns:
        Whether none is left, be it a zombie.
    """
    deadline = time.monotonic() + within_s
    killed: set[int] = set()
    while (now := time.monotonic()) < deadline:
        collected = collect(min(now + _COLLECT_S, deadline), on_end)
        orphans = [pid for pid in _children() if not spared(pid)]
        if collected and not orphans:
            return True
        for pid in orphans:  # whoever ended meanwhile keeps its number until it is collected
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if killed.issuperset(orphans):
            time.sleep(0.0005)
        killed.update(orphans)
    return False


def collect(deadline_s: float, on_end: Callable[[int, int], None]) -> bool:
    """Collect the children that ended; whether that was all of them before a time of the monotonic clock."""
    while time.monotonic() < deadline_s:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return True
        if pid == 0:
            return True
        on_end(pid, status)
    return False


def _children() -> list[int]:
    """Of this process, which has one thread.

    The kernel's list may leave one out while others leave it (proc(5)). None of ours does: a child that ended
    stays in it until it is collected, which nobody else does, and a new one comes last.
    """
    try:
        fd = os.open("/proc/thread-self/children", os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:  # a kernel that keeps no such lists
        return proc.children(os.getpid())
    try:
        return [int(pid) for part in iter(lambda: os.read(fd, 65536), b"") for pid in part.split()]
    finally:
        os.close(fd)
