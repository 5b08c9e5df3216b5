"""Runs one cell in a host process of its own, watches it from outside, and ends whatever is left of it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import msgspec
import psutil

from benchmarks.cells import Cell, Seen

ROOT = Path(__file__).resolve().parent.parent
_EXIT_S = 4.0  # for a host that is done to end by itself
_GONE_S = 1.0  # for its processes to follow it
_SAMPLE_S = 0.02


class Watch:
    """Every process below the host, and the most memory that any one of them held."""

    def __init__(self, host: int) -> None:
        self._host = psutil.Process(host)
        self._seen: set[psutil.Process] = set()
        self.peak_mib = 0

    def look(self) -> None:
        """Look once."""
        with suppress(psutil.Error):
            self._seen.update(self._host.children(recursive=True))
        for process in self._seen:
            self.peak_mib = max(self.peak_mib, _peak_mib(process.pid))

    def alive(self) -> list[psutil.Process]:
        """Those that still run, whoever their parent is now."""
        return [process for process in self._seen if _runs(process)]

    def kill(self) -> None:
        """End them. psutil checks that a pid is still the same process."""
        for process in self.alive():
            with suppress(psutil.Error):
                process.kill()


def run(peer: str, fault: str, deadline_s: float) -> Cell:
    """Measure one cell; takes no longer than `deadline_s`, and a moment to clean up."""
    with tempfile.TemporaryDirectory(prefix="holdfast-bench-", ignore_cleanup_errors=True) as temp:
        folder = Path(temp)
        started_s = time.monotonic()
        with (folder / "stderr").open("wb") as stderr:
            host = subprocess.Popen(
                [sys.executable, "-m", "benchmarks.host", peer, fault, temp],
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stdout=stderr,
                stderr=stderr,
                env={**os.environ, "TMPDIR": temp},
                start_new_session=True,  # its process group is ended as a whole
            )
        watch = Watch(host.pid)
        try:
            host_end = _follow(host, folder, watch, started_s + deadline_s)
            left_behind = 0 if host.returncode is None else _left_behind(watch)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(host.pid, signal.SIGKILL)
            host.wait()
            watch.kill()
            _unlink_semaphores(host.pid)
        seen = _read(folder)
        error = "" if seen.ready else f"not measured: {_tail(folder)}"
        wall_s = round(time.monotonic() - started_s, 2)
        return Cell(peer, fault, seen, host_end, watch.peak_mib, left_behind, wall_s, error)


def _follow(host: subprocess.Popen[bytes], folder: Path, watch: Watch, deadline_s: float) -> str:
    """Watch the host until it ends, or its time is over; returns how it ended."""
    done = False
    while True:
        status = host.poll()
        if status is not None:
            return signal.Signals(-status).name if status < 0 else f"exited {status}"
        watch.look()
        now_s = time.monotonic()
        if not done and _read(folder).done:
            done = True
            deadline_s = min(deadline_s, now_s + _EXIT_S)
        if now_s > deadline_s:
            return "killed by the harness, " + ("it could not end" if done else "it did not go on")
        time.sleep(_SAMPLE_S)


def _left_behind(watch: Watch) -> int:
    """How many processes outlive the host, which has ended."""
    deadline_s = time.monotonic() + _GONE_S
    while (alive := watch.alive()) and time.monotonic() < deadline_s:
        time.sleep(_SAMPLE_S)
    return len(alive)


def _unlink_semaphores(host: int) -> None:
    """loky's named semaphores bear the host's pid; its own cleaner is killed with a host that cannot end."""
    for semaphore in Path("/dev/shm").glob(f"sem.loky-{host}-*"):
        semaphore.unlink(missing_ok=True)


def _runs(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def _peak_mib(pid: int) -> int:
    """The peak of a process's resident memory, VmHWM in proc(5); 0 once it is gone."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    return next((int(line.split()[1]) // 1024 for line in status.splitlines() if line.startswith("VmHWM:")), 0)


def _read(folder: Path) -> Seen:
    try:
        return msgspec.json.decode((folder / "seen.json").read_bytes(), type=Seen)
    except FileNotFoundError:
        return Seen()


def _tail(folder: Path) -> str:
    lines = (folder / "stderr").read_text(errors="replace").strip().splitlines()
    return lines[-1] if lines else "the host said nothing before its deadline"
