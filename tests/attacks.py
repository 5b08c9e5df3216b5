"""What a hostile plugin tries on others: the code of a plugin, and a program that tries the same uncontained.

`python attacks.py WHAT TARGET` prints "done", or the name of the error. Nothing here harms when it succeeds.
"""

import ctypes
import multiprocessing
import os
import resource
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import Callable
from multiprocessing import shared_memory
from pathlib import Path
from typing import Any

_libc = ctypes.CDLL(None, use_errno=True)
_PTRACE_SEIZE = 0x4206
_TGKILL = {"x86_64": 234, "aarch64": 131}.get(os.uname().machine, -1)
_CLONE_NEWUSER_NEWNS = 0x10020000


def _call(result: int) -> None:
    if result == -1:
        raise OSError(ctypes.get_errno(), "refused")


def _read(path: str) -> None:
    with Path(path).open("rb") as file:
        if not file.read(1):
            raise FileNotFoundError(path)  # hidden files are empty


def _write(path: str) -> None:
    with Path(path).open("ab") as file:
        file.write(b"x")


def _peek(where: str) -> None:
    pid, address = where.split(":")
    with Path(f"/proc/{pid}/mem").open("rb", buffering=0) as file:
        os.pread(file.fileno(), 1, int(address))


def _vm_read(where: str) -> None:
    pid, address = map(int, where.split(":"))
    into = ctypes.create_string_buffer(1)
    local = struct.pack("=QQ", ctypes.addressof(into), 1)
    _call(_libc.process_vm_readv(pid, local, 1, struct.pack("=QQ", address, 1), 1, 0))


def _kernel_ring() -> None:
    _call(_libc.syscall(425, 1, ctypes.create_string_buffer(120)))  # io_uring_setup


def _namespace_mount(target: str) -> None:
    _call(_libc.unshare(_CLONE_NEWUSER_NEWNS))
    _call(_libc.mount(b"none", target.encode(), b"tmpfs", 0, None))


def _connect(kind: int, family: int, address: Any) -> None:
    with socket.socket(family, kind) as client:
        client.settimeout(5)
        client.connect(address)
        client.send(b"x")


def _pair() -> None:
    for end in socket.socketpair():
        end.close()


def _shared() -> None:
    block = shared_memory.SharedMemory(create=True, size=64)
    block.close()
    block.unlink()


ATTACKS: dict[str, Callable[[str], Any]] = {
    "signal": lambda pid: os.kill(int(pid), signal.SIGURG),  # ignored by whoever does not ask for it
    "signal_thread": lambda pid: _call(_libc.syscall(_TGKILL, int(pid), int(pid), signal.SIGURG)),  # tgkill
    "signal_pidfd": lambda pid: signal.pidfd_send_signal(os.pidfd_open(int(pid)), signal.SIGURG),
    "trace": lambda pid: _call(_libc.ptrace(_PTRACE_SEIZE, int(pid), None, None)),
    "peek": _peek,
    "vm_read": _vm_read,
    "environ": lambda pid: _read(f"/proc/{pid}/environ"),
    "descriptors": lambda pid: Path(f"/proc/{pid}/fd/0").readlink(),
    "steal_descriptor": lambda pid: _call(_libc.syscall(438, os.pidfd_open(int(pid)), 0, 0)),  # pidfd_getfd
    "limit": lambda pid: resource.prlimit(
        int(pid), resource.RLIMIT_CORE, resource.prlimit(int(pid), resource.RLIMIT_CORE)
    ),
    "nice": lambda pid: os.setpriority(os.PRIO_PROCESS, int(pid), os.getpriority(os.PRIO_PROCESS, int(pid))),
    "scheduler": lambda pid: os.sched_setscheduler(int(pid), os.SCHED_OTHER, os.sched_param(0)),
    "oom_score": lambda pid: Path(f"/proc/{pid}/oom_score_adj").write_text("1000"),
    "share": lambda pid: Path(f"/proc/{pid}/autogroup").write_text("19"),
    "read": _read,
    "write": _write,
    "make": lambda path: Path(path).mkdir(),
    "remove": lambda path: Path(path).unlink(),
    "truncate": lambda path: os.truncate(path, 0),
    "rename": lambda paths: Path(paths.split(":")[0]).rename(paths.split(":")[1]),
    "link": lambda paths: os.link(*paths.split(":")),
    "list": os.listdir,
    "mount": lambda path: _call(_libc.mount(b"none", path.encode(), b"tmpfs", 0, None)),
    "unmount": lambda path: _call(_libc.umount2(path.encode(), 2)),
    "namespace_mount": _namespace_mount,
    "device": lambda path: os.mknod(path, 0o60600, os.makedev(254, 0)),
    "raise_limit": lambda _: resource.setrlimit(resource.RLIMIT_DATA, (1 << 40, 1 << 40)),
    "tcp": lambda port: _connect(socket.SOCK_STREAM, socket.AF_INET, ("127.0.0.1", int(port))),
    "udp": lambda port: _connect(socket.SOCK_DGRAM, socket.AF_INET, ("127.0.0.1", int(port))),
    "tcp6": lambda port: _connect(socket.SOCK_STREAM, socket.AF_INET6, ("::1", int(port))),
    "netlink": lambda _: socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0).close(),
    "packet": lambda _: socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0).close(),
    "io_uring": lambda _: _kernel_ring(),
    "abstract": lambda name: _connect(socket.SOCK_STREAM, socket.AF_UNIX, f"\0{name}"),
    "pair": lambda _: _pair(),
    "shared_memory": lambda _: _shared(),
}


def attempt(what: str, target: str) -> str:
    """ "done", or the name of the error."""
    try:
        ATTACKS[what](target)
    except (OSError, ValueError) as exc:  # ValueError: the resource module says it so
        return type(exc).__name__
    return "done"


def _forked(what: str, target: str, *, detach: bool) -> str:
    source, sink = os.pipe()
    if os.fork() == 0:
        if detach:
            os.setsid()
            if os.fork():
                os._exit(0)
        os.write(sink, attempt(what, target).encode())
        os._exit(0)
    os.close(sink)
    with os.fdopen(source) as answer:
        return answer.read()


def _pool(what: str, target: str) -> str:
    with multiprocessing.get_context("fork").Pool(1) as pool:
        return str(pool.apply(attempt, (what, target)))


def program(what: str, target: str) -> str:
    """From a new program."""
    command = [sys.executable, __file__, what, target]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


WAYS: dict[str, Callable[[str, str], str]] = {
    "itself": attempt,
    "child": lambda what, target: _forked(what, target, detach=False),
    "detached grandchild": lambda what, target: _forked(what, target, detach=True),
    "multiprocessing": _pool,
    "program": program,
}


class Plugin:
    """Tries what it is told."""

    def __init__(self, context: Any) -> None:
        self.scratch = context.scratch

    def validate(self) -> None:
        """Nothing to check."""

    def attempt(self, what: str, target: str = "", way: str = "itself") -> str:
        """As `attempt`; `way` is one of WAYS. A relative target is one in the scratch folder."""
        return WAYS[way](what, target)


if __name__ == "__main__":
    print(attempt(*sys.argv[1:3]))
