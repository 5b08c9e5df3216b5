"""The reaper and the fork server from outside: started, seen off, cleaned up after. All of it blocks."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import structlog

from engine.descriptors import restore_in
from engine.sandbox import trees, wire

log = structlog.get_logger(__name__)

_MAIN = Path(__file__).resolve().parents[1] / "worker" / "__main__.py"
_LOGGED = 5  # of what could not be removed
END_TIMEOUT_S = 10.0  # for them to end, and everything below them

# What a plugin may see of the engine's environment: how to find programs, libraries, GPUs and the locale.
_ENVIRONMENT = (
    "HOME",
    "LANG",
    "LANGUAGE",
    "LD_LIBRARY_PATH",
    "PATH",
    "PYTHONDONTWRITEBYTECODE",
    "PYTHONPATH",
    "TZ",
    "USER",
    "VIRTUAL_ENV",
)
_ENVIRONMENT_PREFIXES = ("CUDA_", "LC_", "NVIDIA_", "TORCH_")
_THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMEXPR_NUM_THREADS")


def worker_environment() -> dict[str, str]:
    """The minimal environment of every worker, with the BLAS libraries' threads capped at the core count."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if name in _ENVIRONMENT or name.startswith(_ENVIRONMENT_PREFIXES)
    }
    threads = str(min(4, os.cpu_count() or 1))
    return {**kept, **dict.fromkeys(_THREADS, threads), "PYTHONUNBUFFERED": "1"}


def launch(control: socket.socket, scratch_root: Path, private: Sequence[Path]) -> subprocess.Popen[bytes]:
    """The reaper, which forks the fork server. Raises OSError."""
    folders = [str(path.absolute()) for path in (scratch_root, *private)]  # its working directory is not ours
    command = [sys.executable, "-P", str(_MAIN), str(control.fileno()), *folders]
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        env=worker_environment(),
        cwd="/",
        pass_fds=[control.fileno()],
        start_new_session=True,  # a Ctrl-C in the terminal is for the engine alone
    )
    restore_in(process.pid)
    return process


def see_off(process: subprocess.Popen[bytes], pidfd: int | None) -> None:
    """Until the reaper and the fork server are gone; those that stay are killed, the fork server first."""
    try:
        process.wait(END_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        log.error("fork_server_stuck", pid=process.pid)
        if pidfd is not None:
            kill(pidfd)  # then the reaper leaves nothing behind
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(END_TIMEOUT_S)
        process.kill()
        process.wait()
    if pidfd is not None:
        poll = select.poll()
        poll.register(pidfd, select.POLLIN)
        poll.poll(END_TIMEOUT_S * 1000)
        os.close(pidfd)


def bury(process: subprocess.Popen[bytes] | None, pidfd: int | None, scratch_root: Path) -> None:
    """See a lost fork server off, and remove what its workers had; the files of calls are the engine's."""
    if process is not None:
        see_off(process, pidfd)
    for folder in scratch_root.iterdir() if scratch_root.is_dir() else ():
        if folder.name != wire.UPLOADS:
            remove(folder)


def remove(folder: Path) -> None:
    """Remove a folder that plugins wrote to; what cannot be removed is logged."""
    if left := trees.remove_tree(folder):
        log.error("scratch_not_removed", folder=str(folder), count=len(left), first=left[:_LOGGED])


def ended(code: int) -> str:
    """An exit code as `subprocess` has it, in words."""
    if code >= 0:
        return f"exited with status {code}"
    try:
        return f"was killed by {signal.Signals(-code).name}"
    except ValueError:  # a real-time signal
        return f"was killed by signal {-code}"


def kill(pidfd: int) -> None:
    """SIGKILL, if it still lives."""
    with contextlib.suppress(ProcessLookupError):
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)
