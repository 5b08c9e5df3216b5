"""What the watches read of processes and folders, and when: below the verdicts that come of it."""

from __future__ import annotations

import asyncio
import ctypes
import gc
import mmap
import os
import signal
import subprocess
import threading
import time
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, cast

import pytest
from support import until

from engine.sandbox import mappings, proc, scratch
from engine.sandbox.evidence import Process
from engine.sandbox.limits import GROWTH_BYTES_PER_S, MemoryWatch, _Tree, allowance_bytes
from engine.sandbox.memory import Meter

MIB = 1 << 20
SYS_EXIT = {"x86_64": 60, "aarch64": 93}[os.uname().machine]


@contextmanager
def without_a_first_thread() -> Iterator[int]:
    """A process whose second thread holds 32 MiB of a shared mapping, and a memfd."""
    ready, told = os.pipe()
    pid = os.fork()
    if pid == 0:

        def hold() -> None:
            block = mmap.mmap(-1, 32 * MIB)
            block.write(bytes([1]) * (32 * MIB))
            os.memfd_create("held")
            while Path(f"/proc/{os.getpid()}/maps").read_bytes():  # the first thread has not ended
                time.sleep(0.001)
            os.write(told, b"!")
            threading.Event().wait()

        threading.Thread(target=hold).start()
        ctypes.CDLL(None).syscall(SYS_EXIT, 0)  # of this thread alone
    try:
        os.close(told)
        assert os.read(ready, 1) == b"!"
        yield pid
    finally:
        os.close(ready)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def test_a_process_whose_first_thread_has_ended_is_read_by_another() -> None:
    with without_a_first_thread() as pid:
        usage = proc.usage(pid)
        assert usage.threads == 2
        assert usage.resident_bytes > usage.shared_bytes >= 32 * MIB
        private = proc.proportional_private_bytes(pid)
        assert private is not None
        assert private > 0
        assert sum(mappings.resident(pid).values()) >= 32 * MIB
        targets = [target for _, target in mappings.descriptors(pid)]
        assert any(target.startswith("/memfd:held") for target in targets)
        fd = os.memfd_create("probe")
        device = os.fstat(fd).st_dev
        os.close(fd)
        found = [Path(each.path).stat().st_blocks * 512 for each in mappings.mappings(pid, frozenset({device}))]
        assert 32 * MIB in found
        assert proc.task(os.getpid()) == os.getpid()


def test_a_kill_that_was_counted_before_the_death_came_to_be_known_is_found(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The watch looks at 100 and 102 s, the kernel kills in between, and the death is known at 102.1 s."""
    count = 7
    monkeypatch.setattr(proc, "oom_kills", lambda: count)
    watch = MemoryWatch(0.1, lambda what, exc: None)
    watch._note_oom_kills(100.0)
    count = 8
    watch._note_oom_kills(102.0)
    assert watch.oom_kills_since(102.1) == 1
    assert watch.oom_kills_since(103.1) == 0  # another's: a death so long after it is not of it
    watch._note_oom_kills(150.0)  # the watch itself was held up meanwhile
    assert watch.oom_kills_since(150.1) == 0
    count = 9
    watch._note_oom_kills(180.0)
    assert watch.oom_kills_since(180.1) == 1


def test_what_was_killed_while_there_was_no_worker_counts_for_none(monkeypatch: pytest.MonkeyPatch) -> None:
    count = 7
    monkeypatch.setattr(proc, "oom_kills", lambda: count)
    watch = MemoryWatch(0.1, lambda what, exc: None)
    watch._note_oom_kills(100.0)
    count = 8
    watch._idle = True  # the first one has come
    assert watch.oom_kills_since(499.9) == 0
    watch._note_oom_kills(500.0)
    assert watch.oom_kills_since(500.2) == 0
    count = 9
    assert watch.oom_kills_since(500.3) == 1


class Newcomer:
    """A worker that has just begun: this process."""

    def __init__(self, scratch: Path, limit_bytes: int) -> None:
        self.pid, self.pidfd = os.getpid(), os.pidfd_open(os.getpid())
        self.memory_limit_bytes = self.scratch_limit_bytes = limit_bytes
        self.process_limit = 1 << 20
        self.shm_fd: int | None = None
        self.scratch = str(scratch)
        self.memory_bytes = self.memory_peak_bytes = self.memory_shared_bytes = self.process_count = 0
        self.processes: tuple[Process, ...] = ()
        self.over_memory = self.over_processes = False
        self.busy = True
        self.holds = ""

    def on_memory_breach(self) -> None:
        """Not in these tests."""

    def on_process_breach(self) -> None:
        """Not in these tests."""

    def on_scratch_breach(self, what: str) -> None:
        self.holds = what


@pytest.mark.parametrize("limit", [64 * MIB, 1024 * MIB, 1 << 40])
def test_a_new_worker_is_looked_at_before_it_can_be_over_its_limit_and_not_at_once(
    limit: int, tmp_path: Path
) -> None:
    watch = MemoryWatch(0.1, lambda what, exc: None)
    worker = Newcomer(tmp_path, limit)
    before_s = time.monotonic()
    watch.add(worker)
    (tree,) = watch._trees.values()
    could_be_over_s = (limit + allowance_bytes(limit)) / GROWTH_BYTES_PER_S
    assert before_s < tree.due_s <= time.monotonic() + min(0.1, could_be_over_s / 2)
    tree.close()
    os.close(worker.pidfd)


def test_shared_memory_from_before_the_first_look_counts() -> None:
    fd = os.memfd_create("early")
    try:
        known = Meter(os.getpid(), 1 << 40, 1 << 20, proc.machine().shared_bytes)
        os.write(fd, bytes(32 * MIB))
        assert known.read([os.getpid()], None, proc.machine(), afresh=False).shared_bytes >= 32 * MIB
        unknown = Meter(os.getpid(), 1 << 40, 1 << 20)
        assert unknown.read([os.getpid()], None, proc.machine(), afresh=False).shared_bytes >= 32 * MIB
    finally:
        os.close(fd)


def make_folder(folder: Path) -> Path:
    folder.mkdir(parents=True)
    return folder


async def test_what_a_worker_wrote_before_the_first_look_at_its_scratch_folder_counts(
    data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken_bytes = 0  # others write to this file system, and remove things from it
    monkeypatch.setattr(scratch, "_taken_bytes", lambda folder: taken_bytes)
    monkeypatch.setattr(scratch, "_SURE_BUSY_S", 1e9)  # only what grew on the file system leads to a walk
    watch = scratch.ScratchWatch(lambda what, exc: None)
    other, worker = (Newcomer(data_dir / name, 64 * MIB) for name in ("other", "worker"))
    big = make_folder(Path(worker.scratch)) / "big"
    running = asyncio.create_task(watch.run())
    try:
        watch.add(other)
        await until(lambda: watch._taken)
        await asyncio.to_thread(big.write_bytes, b"x" * (65 * MIB))
        taken_bytes += 65 * MIB
        watch.add(worker)
        await until(lambda: worker.holds)
        assert not other.holds
    finally:
        running.cancel()
        await asyncio.wait([running])
        for each in (other, worker):
            os.close(each.pidfd)


def wide(folder: Path, depth: int, folders: int) -> str:
    """A path of `depth` long names with so many empty folders at its end."""
    folder.mkdir()
    at = os.open(folder, os.O_RDONLY)
    for _ in range(depth):
        os.mkdir("d" * 240, dir_fd=at)
        below = os.open("d" * 240, os.O_RDONLY, dir_fd=at)
        os.close(at)
        at = below
    for number in range(folders):
        os.mkdir(f"{number:04}", dir_fd=at)
    os.close(at)
    return str(folder)


def walked(folder: str) -> int:
    walk = scratch.held(folder, os.getpid(), 1 << 40)
    while True:
        try:
            next(walk)
        except StopIteration as found:
            held_bytes: int = found.value
            return held_bytes


def test_a_walk_does_not_keep_the_whole_path_of_each_folder(tmp_path: Path) -> None:
    folder = wide(tmp_path / "scratch", 14, 3000)
    gc.collect()
    tracemalloc.start()
    try:
        assert walked(folder) >= 3014 * scratch.ENTRY_BYTES
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak_bytes < 2 * MIB  # 3,000 paths of 3,400 bytes are ten


def test_more_folders_than_a_walk_can_keep_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = wide(tmp_path / "scratch", 1, 1000)
    assert walked(folder) >= 1001 * scratch.ENTRY_BYTES
    monkeypatch.setattr(scratch, "_MAX_PENDING_BYTES", 100_000)
    with pytest.raises(scratch.Unmeasurable, match="folders side by side"):
        walked(folder)


@pytest.mark.parametrize("dead", [True, False], ids=["dead", "alive"])
def test_what_was_closed_with_a_dead_worker_is_no_fault_of_a_look(dead: bool, tmp_path: Path) -> None:
    worker = Newcomer(tmp_path, 256 * MIB)
    os.close(worker.pidfd)
    child = subprocess.Popen(["sleep", "0" if dead else "60"])
    try:
        worker.pid, worker.pidfd = child.pid, os.pidfd_open(child.pid)
        if dead:
            child.wait()
        worker.shm_fd = 1 << 20  # closed
        watch, tree = MemoryWatch(0.1, lambda what, exc: None), _Tree(worker, None, 0.1)
        look = partial(watch._look_at, tree, [worker.pid], proc.machine(), cast(Any, None))
        if dead:
            look()
        else:
            with pytest.raises(OSError, match="Bad file descriptor"):
                look()
        assert tree.ended is dead
        tree.close()
    finally:
        os.close(worker.pidfd)
        child.kill()
        child.wait()
