"""The least that starting a worker comes to: a fork of a warm process, which then imports the plugin.

    python -m benchmarks.forks FILE CLASS SINCE_S        # prints figures as JSON

The process has imported what any worker needs that checks arguments by type hints and runs coroutines. Its child
imports the file, makes an instance, calls `validate`, says that it is ready, and waits. Nothing else is there: no
containment, no memory to share, no tools that are looked at, nobody that would learn of its end.
"""

from __future__ import annotations

import asyncio  # noqa: F401 - imported before the fork, like the others, so that no child pays for it
import gc
import importlib.util
import inspect  # noqa: F401
import json
import logging
import os
import socket
import statistics
import sys
import time
import traceback
import typing  # noqa: F401
from pathlib import Path
from types import SimpleNamespace

import msgspec  # noqa: F401

_ALONE = 50  # starts that are timed one after another
_TOGETHER = 100


def start(file: str, plugin: str) -> tuple[int, socket.socket]:
    """The pid of a worker, and the socket on which it says that it is ready, and is told to end."""
    ours, theirs = socket.socketpair()
    pid = os.fork()
    if pid == 0:
        try:
            ours.close()
            made = getattr(importlib.import_module(Path(file).stem), plugin)
            made(SimpleNamespace(log=logging.getLogger())).validate()
            theirs.send(b"r")
            theirs.recv(1)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(0)
    theirs.close()
    return pid, ours


def _ready(end: socket.socket) -> None:
    if not end.recv(1):
        raise RuntimeError("a worker did not start")


def _end(pid: int, end: socket.socket) -> None:
    end.send(b"e")  # others that were forked meanwhile have the socket, too: to close ours would say nothing
    end.close()
    os.waitpid(pid, 0)


def alone_ms(file: str, plugin: str) -> float:
    """The median from before the fork until it is ready, in milliseconds."""
    found = []
    for _ in range(_ALONE):
        started_s = time.perf_counter()
        pid, end = start(file, plugin)
        _ready(end)
        found.append(time.perf_counter() - started_s)
        _end(pid, end)
    return statistics.median(found) * 1e3


def together(file: str, plugin: str, since_s: float) -> dict[str, float]:
    """Seconds until a hundred are ready, and what the median one weighs; `since_s`: of `time.perf_counter`."""
    workers = [start(file, plugin) for _ in range(_TOGETHER)]
    for _, end in workers:
        _ready(end)
    took_s = time.perf_counter() - since_s
    weights = [pss_mib(pid) for pid, _ in workers]
    for pid, end in workers:
        _end(pid, end)
    return {"hundred_s": took_s, "worker_mib": statistics.median(weights)}


def pss_mib(pid: int) -> float:
    """Proportional set size: memory of its own, and its share of what it shares (proc(5))."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("Pss:")) / 1024


if __name__ == "__main__":
    sys.dont_write_bytecode = True
    sys.path.insert(0, str(Path(sys.argv[1]).parent))
    importlib.util.find_spec("nothing")  # so that no child has to look into the folders of the path
    gc.collect()
    gc.freeze()
    _what = (sys.argv[1], sys.argv[2])
    _hundred = together(*_what, float(sys.argv[3]))
    print(json.dumps({"p50_ms": alone_ms(*_what), **_hundred}))
