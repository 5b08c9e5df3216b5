"""A process of its own that watches a worker take memory, and says how much it took and how long it lived then.

    python tests/memory_sampler.py PID LIMIT_BYTES

Prints a line once it watches, and one of JSON when the worker and all that was seen below it are dead. It sees
what is mapped (as psutil's PSS), memfds behind descriptors, and the files of the worker's /dev/shm.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

GONE = (psutil.NoSuchProcess, FileNotFoundError, ProcessLookupError)


def held_bytes(processes: list[psutil.Process], shm_fd: int) -> int:
    stat = os.fstatvfs(shm_fd)
    files = (stat.f_blocks - stat.f_bfree) * stat.f_frsize
    mapped = memfds = 0
    for process in processes:
        with contextlib.suppress(*GONE):
            mapped += process.memory_full_info().pss
            memfds += sum(unmapped_memfds(process.pid))
    return mapped + memfds + files


def unmapped_memfds(pid: int) -> Iterator[int]:
    """Bytes of each that the plugin made."""
    for path in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(*GONE):
            if str(path.readlink()).startswith("/memfd:hoard"):
                yield path.stat().st_blocks * 512


def dead(process: psutil.Process) -> bool:
    try:
        return process.status() in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
    except psutil.NoSuchProcess:
        return True


def main(pid: int, limit_bytes: int) -> None:
    root = psutil.Process(pid)
    shm_fd = os.open(f"/proc/{pid}/root/dev/shm", os.O_PATH)
    seen = {root}
    peak, over_s, samples = 0, None, 0
    print("watching", flush=True)
    while not all(dead(process) for process in seen):
        with contextlib.suppress(*GONE):
            seen.update(root.children(recursive=True))
        held = held_bytes(list(seen), shm_fd)
        peak, samples = max(peak, held), samples + 1
        if held > limit_bytes and over_s is None:
            over_s = time.monotonic()
    lived_ms = None if over_s is None else (time.monotonic() - over_s) * 1000
    print(json.dumps({"peak_bytes": peak, "lived_ms": lived_ms, "samples": samples}))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
