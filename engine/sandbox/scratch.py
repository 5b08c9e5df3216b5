"""What each worker's scratch folder holds on disk, watched from outside, as a kubelet does it for an `emptyDir`.

No quota can be had without privileges. So: the file system's free space is cheap to ask, and while it shrinks by
less than a folder has left, that folder cannot be over its limit. When it has shrunk by half of that, the folder
is walked.

Counted are allocated blocks, so a sparse file counts for what it takes and a hard link once; files that were
unlinked, while a process of the worker has them open or mapped; and each entry for 4 KiB at least, so that a limit
bounds their number, and with it the walk. Walks take turns and pauses: who has a million files delays only the
verdict on itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import math
import os
import threading
import time
from collections.abc import Callable, Generator
from typing import Protocol, TypeAlias

from engine.sandbox import mappings, proc

_MIB = 1024 * 1024
_BLOCK_BYTES = 512  # of st_blocks, whatever the file system
ENTRY_BYTES = 4096  # what an empty file counts for: its inode and its name take about that

_GROWTH_BYTES_PER_S = 2048 * _MIB  # what a fast disk, or rather the page cache, takes in
_SHORTEST_S = 0.02  # between two looks at the file system
_LONGEST_S = 0.2
_SURE_BUSY_S = 1.0  # a walk all the same, if the space changed at all: another may have freed what it took
_SURE_S = 30.0
_SLICE_S = 0.005  # of walking at a time
_PAUSE_S = 0.01  # between two slices
_COST = 3  # a walk is followed by this many times as long without one
_MAX_PATH = 4000  # bytes: the kernel takes no path of 4096
_MAX_PENDING_BYTES = 32 * _MIB  # of ours, for folders that were found and not yet walked: above 80,000 of them
_PENDING_BYTES = 128  # what one takes, beside its name

Walk: TypeAlias = Generator[None, None, int]


class Scratched(Protocol):
    """A worker, as far as this watch is concerned."""

    pid: int
    scratch: str
    scratch_limit_bytes: int

    @property
    def busy(self) -> bool:
        """Whether plugin code may be running."""

    def on_scratch_breach(self, what: str) -> None:
        """It holds more than it may, and `what` says how much: end it."""


class Unmeasurable(Exception):
    """The folder was made so that it cannot be walked; the text says how."""


class _Folder:
    """One worker's scratch folder."""

    def __init__(self, worker: Scratched, taken_bytes: int | None) -> None:
        self.worker = worker
        self.walk: Walk | None = None
        self.left_bytes = worker.scratch_limit_bytes
        self.taken_bytes = taken_bytes  # of the file system, when the last walk began; or before it was there
        self.walked_at_s = time.monotonic()  # it is new, and empty
        self.began_s = 0.0
        self.not_before_s = 0.0
        self.ended = False

    def due(self, now_s: float, taken_bytes: int) -> bool:
        """Whether it may be over its limit, for all that the file system tells."""
        if self.taken_bytes is None:
            self.taken_bytes = taken_bytes
        if now_s < self.not_before_s:
            return False
        grown = taken_bytes - self.taken_bytes
        sure_s = _SURE_BUSY_S if self.worker.busy and abs(grown) >= _MIB else _SURE_S
        step = max(self.left_bytes // 2, self.worker.scratch_limit_bytes // 32)
        return grown >= step or now_s - self.walked_at_s >= sure_s

    def begin(self, now_s: float, taken_bytes: int) -> None:
        """A walk."""
        self.walk = held(self.worker.scratch, self.worker.pid, self.worker.scratch_limit_bytes)
        self.taken_bytes = taken_bytes
        self.began_s = now_s

    def close(self) -> None:
        """Let go of a walk that did not come to its end: it holds a descriptor of ours."""
        if self.walk is not None:
            self.walk.close()
            self.walk = None

    def finish(self, now_s: float, held_bytes: int) -> None:
        """The walk: it found this much."""
        self.walk = None
        self.left_bytes = max(0, self.worker.scratch_limit_bytes - held_bytes)
        self.walked_at_s = now_s
        self.not_before_s = now_s + _COST * (now_s - self.began_s)


class ScratchWatch:
    """Looks at all workers' folders.

    Args:
        on_fault: counts a look that failed. Called on the event loop.
    """

    def __init__(self, on_fault: Callable[[str, BaseException], None]) -> None:
        self._on_fault = on_fault
        self._folders: dict[int, _Folder] = {}  # by id(worker)
        self._gone: list[_Folder] = []
        self._taken: dict[str, int | None] = {}  # by folder of folders, what its file system held at the last pass
        self._wakes_at_s = math.inf  # when the watch's thread looks next, unless it is woken
        self._wake = threading.Event()
        self._stopping = False
        self.cpu_s = 0.0  # of this watch's thread

    def add(self, worker: Scratched) -> None:
        """Watch it from now on."""
        # While there are others, the last pass was a moment ago.
        taken = self._taken.get(os.path.dirname(worker.scratch)) if self._folders else None  # noqa: PTH120 - as below
        folder = self._folders[id(worker)] = _Folder(worker, taken)
        if taken is None or time.monotonic() + _soon_s(folder.left_bytes) < self._wakes_at_s:
            self._wake.set()

    def discard(self, worker: Scratched) -> None:
        """Its process is gone."""
        if (folder := self._folders.pop(id(worker), None)) is not None:
            self._gone.append(folder)
            self._wake.set()

    async def run(self) -> None:
        """Watch until cancelled. Does nothing while there is no worker."""
        loop = asyncio.get_running_loop()
        thread = threading.Thread(target=self._work, args=(loop,), name="scratch-watch", daemon=True)
        thread.start()
        try:
            await loop.create_future()
        finally:
            self._stopping = True
            self._wake.set()
            await asyncio.to_thread(thread.join)

    # The watch's thread.

    def _work(self, loop: asyncio.AbstractEventLoop) -> None:
        while not self._stopping:
            wait_s = self._pass(loop)
            self.cpu_s = time.thread_time()
            self._wake.wait(wait_s)
            self._wake.clear()
        for folder in (*self._folders.values(), *self._gone):
            folder.close()

    def _pass(self, loop: asyncio.AbstractEventLoop) -> float | None:
        """Look at all, walk some; returns how long there is nothing to do, or None: until somebody comes."""
        while self._gone:
            self._gone.pop().close()
        self._wakes_at_s = math.inf  # whoever comes from here on is not in the list
        folders = [folder for folder in list(self._folders.values()) if not folder.ended]
        taken: dict[str, int | None] = {}
        for folder in folders:
            try:
                self._advance(folder, taken, loop)
            except Exception as exc:  # a watch that died would be a limit that is gone
                folder.walk, folder.not_before_s = None, time.monotonic() + _SURE_S
                tell(loop, self._on_fault, "scratch_watch", exc)
        self._taken = taken
        if not folders:
            return None
        walking = any(folder.walk is not None for folder in folders)
        wait_s = _PAUSE_S if walking else min(_soon_s(folder.left_bytes) for folder in folders)
        self._wakes_at_s = time.monotonic() + wait_s
        return wait_s

    def _advance(self, folder: _Folder, taken: dict[str, int | None], loop: asyncio.AbstractEventLoop) -> None:
        now_s = time.monotonic()
        worker = folder.worker
        if folder.walk is None:
            root = os.path.dirname(worker.scratch)  # noqa: PTH120 - five times a second, for each worker
            if root not in taken:
                taken[root] = _taken_bytes(root)
            used = taken[root]
            if used is None or not folder.due(now_s, used):
                return
            folder.begin(now_s, used)
        assert folder.walk is not None  # noqa: S101 - just begun
        try:
            while time.monotonic() - now_s < _SLICE_S:
                next(folder.walk)
        except StopIteration as found:
            held_bytes: int = found.value
            folder.finish(time.monotonic(), held_bytes)
            if held_bytes > worker.scratch_limit_bytes:
                folder.ended = True
                tell(loop, worker.on_scratch_breach, f"holds at least {held_bytes / _MIB:.0f} MiB")
        except Unmeasurable as exc:
            folder.ended = True
            tell(loop, worker.on_scratch_breach, f"cannot be measured, {exc}")


def _soon_s(left_bytes: int) -> float:
    """Within which a folder is looked at again that may take so much more."""
    return min(_LONGEST_S, max(_SHORTEST_S, left_bytes / 2 / _GROWTH_BYTES_PER_S))


def held(scratch: str, pid: int, limit_bytes: int) -> Walk:
    """Walk a scratch folder, one entry at a time; the walk's value is the bytes that it holds.

    It ends early once that is over the limit.

    Args:
        scratch: the folder; nothing is held where there is none.
        pid: of the worker, whose tree may have unlinked files open.
        limit_bytes: enough.

    Raises:
        Unmeasurable: it is nested too deep, holds a folder that may not be read, or too many side by side.
    """
    total = 0
    seen: set[int] = set()
    # Invariant: a parent's path is one object for all that are pending in it, and depth first these parents are
    # no more than a path has parts.
    pending = [(os.path.dirname(scratch), os.fsencode(os.path.basename(scratch)))]  # noqa: PTH119, PTH120 - as below
    pending_bytes = _pending_bytes(pending[0][1])
    device = None
    while pending:
        parent, name = pending.pop()
        pending_bytes -= _pending_bytes(name)
        folder = f"{parent}/{os.fsdecode(name)}"
        fd = _open(folder)
        if fd is None:
            continue
        try:
            device = os.fstat(fd).st_dev if device is None else device
            with os.scandir(fd) as entries:
                for entry in entries:
                    with contextlib.suppress(FileNotFoundError):
                        stat = entry.stat(follow_symlinks=False)
                        if stat.st_ino not in seen and stat.st_dev == device:
                            seen.add(stat.st_ino)
                            total += max(ENTRY_BYTES, stat.st_blocks * _BLOCK_BYTES)
                            if entry.is_dir(follow_symlinks=False):
                                pending.append((folder, os.fsencode(entry.name)))
                                pending_bytes += _pending_bytes(pending[-1][1])
                    if pending_bytes > _MAX_PENDING_BYTES:
                        raise Unmeasurable(f"holding {len(pending)} folders side by side")
                    if total > limit_bytes:
                        return total
                    yield
        finally:
            os.close(fd)
    if device is not None:
        with contextlib.closing(_unlinked(pid, device)) as unlinked:
            for nameless in unlinked:
                if nameless is not None and nameless.st_ino not in seen:
                    seen.add(nameless.st_ino)
                    total += nameless.st_blocks * _BLOCK_BYTES
                if total > limit_bytes:
                    return total
                yield
    return total


def _pending_bytes(name: bytes) -> int:
    return _PENDING_BYTES + len(name)


def _open(folder: str) -> int | None:
    """None where it is gone."""
    if len(os.fsencode(folder)) > _MAX_PATH:
        raise Unmeasurable("being nested too deep")
    try:
        return os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except PermissionError:
        raise Unmeasurable(f"holding a folder that may not be read ({os.path.basename(folder)!a:.100})") from None  # noqa: PTH119
    except OSError as exc:
        if exc.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):  # removed, or replaced by something else
            return None
        raise


def _unlinked(pid: int, device: int) -> Generator[os.stat_result | None, None, None]:
    """Files without a name on a file system, that a worker's tree has open or mapped; None for each other."""
    for each in proc.tree(pid):
        descriptors = contextlib.closing(mappings.descriptors(each))
        with contextlib.suppress(PermissionError), descriptors as found:  # it may not let us look
            for path, target in found:
                gone = not target or (target.endswith(" (deleted)") and not target.startswith("/memfd:"))
                yield _file(path, device) if gone else None
        mapped = {m.inode: m.path for m in mappings.mappings(each, frozenset({device})) if m.deleted}
        for path in mapped.values():
            with contextlib.suppress(PermissionError):  # needs a capability
                yield _file(path, device)


def _file(path: str, device: int) -> os.stat_result | None:
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        stat = os.stat(path)  # noqa: PTH116 - hundreds of them, each of them a string
        if stat.st_dev == device and stat.st_nlink == 0:
            return stat
    return None


def _taken_bytes(folder: str) -> int | None:
    """Of the file system that it lies on; None where it does not exist."""
    try:
        stat = os.statvfs(folder)
    except FileNotFoundError:
        return None
    return (stat.f_blocks - stat.f_bfree) * stat.f_frsize + (stat.f_files - stat.f_ffree) * ENTRY_BYTES


def tell(loop: asyncio.AbstractEventLoop, callback: Callable[..., None], *arguments: object) -> None:
    """Call back on the event loop, from a watch's thread."""
    with contextlib.suppress(RuntimeError):  # the loop is closed, and with it the engine
        loop.call_soon_threadsafe(callback, *arguments)
