"""The host process of one cell: starts a peer, makes the call that breaks, and asks again.

    python -m benchmarks.host PEER FAULT FOLDER

What it sees goes to FOLDER/seen.json at every step, so that a host that dies has left what it saw until then.
"""

from __future__ import annotations

import resource
import sys
import time
from contextlib import suppress
from pathlib import Path

import msgspec
import psutil

from benchmarks.cells import CALL_LIMIT_S, GRACE_S, HANG_LIMIT_S, HANGS, Seen
from benchmarks.peers import MAKE, Holdfast

_LOOKS = 20
_LOOK_S = 0.02


def main(peer_name: str, fault: str, folder: Path) -> None:
    """Run one cell."""
    # Dumps of the segfaults that are made here on purpose are of no use; Holdfast's workers never write one.
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    seen = Seen()
    hangs = fault in HANGS
    peer = MAKE[peer_name](HANG_LIMIT_S if hangs else CALL_LIMIT_S, folder)
    peer.start()
    warm = peer.work()
    if not warm.ok:
        sys.exit(f"{peer_name} does not serve: {warm.line()}")
    seen.ready = True
    _write(seen, folder)
    started_s = time.monotonic()
    seen.fault = peer.call(fault)
    if hangs and seen.fault.ended:
        seen.quiet_after_s = _quiet_after_s(started_s)
    _write(seen, folder)
    seen.next_call = peer.work()
    _write(seen, folder)
    if isinstance(peer, Holdfast):
        seen.same_plugin = peer.work_of_broken()
        seen.restarted = peer.work_after_restart()
    seen.done = True
    _write(seen, folder)
    peer.close()


def _quiet_after_s(started_s: float) -> float | None:
    """Seconds since `started_s` at which no process below this one was busy any more; None: one still is."""
    give_up_s = time.monotonic() + GRACE_S
    while (now_s := time.monotonic()) < give_up_s:
        if not _busy():
            return now_s - started_s
    return None


def _busy() -> bool:
    """Whether a process below this one wanted a core at every look; whether it got one depends on the load."""
    busy = {child.pid for child in psutil.Process().children(recursive=True)}
    for _ in range(_LOOKS):
        busy = {pid for pid in busy if _runnable(pid)}
        if not busy:
            return False
        time.sleep(_LOOK_S)
    return True


def _runnable(pid: int) -> bool:
    """Whether any thread of a process is in state R, proc(5)."""
    for stat in Path(f"/proc/{pid}/task").glob("*/stat"):
        with suppress(OSError):  # gone meanwhile
            if stat.read_text().rpartition(")")[2].split()[0] == "R":
                return True
    return False


def _write(seen: Seen, folder: Path) -> None:
    partial = folder / "seen.partial"
    partial.write_bytes(msgspec.json.encode(seen))
    partial.replace(folder / "seen.json")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
