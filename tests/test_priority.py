"""The engine goes before what it hosts, where the processors are short."""

from __future__ import annotations

import ctypes
import os
import platform
import struct
import subprocess
import sys
from pathlib import Path

import aiohttp
import psutil
import pytest
from http_support import server_process
from support import write_honest

from engine.sandbox import priority
from engine.sandbox.priority import Priority

_SCHED_GETATTR = {"x86_64": 315, "aarch64": 275}
_RELEASE = tuple(map(int, platform.release().split(".")[:2]))


def slice_ns(thread: int) -> int:
    """How long it may run at a time, as the kernel tells; see sched_getattr(2)."""
    attributes = ctypes.create_string_buffer(48)
    number = ctypes.c_long(_SCHED_GETATTR[platform.machine()])
    assert ctypes.CDLL(None).syscall(number, thread, attributes, len(attributes), 0) == 0
    runtime: int = struct.unpack("=IIQiIQQQ", attributes.raw)[5]
    return runtime


def given(thread: int) -> Priority:
    """What it has; of a kernel on which slices cannot be chosen, nothing is said of those."""
    nice = os.getpriority(os.PRIO_PROCESS, thread)
    return Priority(nice, slice_ns(thread) if _RELEASE >= (6, 12) else 0)


def expected(wanted: Priority) -> Priority:
    """What of it this process could get for itself."""
    probe = "import os, sys; os.setpriority(os.PRIO_PROCESS, 0, int(sys.argv[1]))"
    allowed = subprocess.run([sys.executable, "-c", probe, str(wanted.nice)], stderr=subprocess.DEVNULL)
    nice = wanted.nice if allowed.returncode == 0 else os.getpriority(os.PRIO_PROCESS, 0)
    return Priority(nice, wanted.slice_ns if _RELEASE >= (6, 12) else 0)


async def test_every_thread_of_the_server_goes_before_its_workers(plugins: Path, data_dir: Path) -> None:
    write_honest(plugins)
    server_has, worker_has = expected(priority.SERVER), expected(priority.WORKER)
    async with server_process(plugins, data_dir) as server, aiohttp.ClientSession(server.url) as http:
        async with http.get("/v1/plugins/honest/health") as answer:
            worker = (await answer.json())["pid"]
        threads = psutil.Process(server.process.pid).threads()
        assert {thread.id: given(thread.id) for thread in threads} == dict.fromkeys(
            (thread.id for thread in threads), server_has
        )
        assert given(worker) == worker_has


@pytest.mark.parametrize("refusal", [PermissionError(), OSError(22, "no such flag")])
def test_what_the_kernel_refuses_is_gone_without(monkeypatch: pytest.MonkeyPatch, refusal: OSError) -> None:
    before = given(os.getpid())

    def refuse(*_: object) -> None:
        raise refusal

    if isinstance(refusal, PermissionError):
        monkeypatch.setattr(os, "setpriority", refuse)
    monkeypatch.setattr(priority, "syscall", refuse)
    priority.set_thread(Priority(before.nice, priority.WORKER.slice_ns), os.getpid())
    assert given(os.getpid()) == before
