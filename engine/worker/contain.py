"""What a worker may not do to others: applied to itself after it was told what it will be, before any plugin code.

    always, where the kernel can   no signal to, no look into and no trace of a process it did not start; no
                                   change of another's limits or priority; no mount, no device node; no power of
                                   root's that is not about files
    `[sandbox] network`            no socket but Unix ones of named files
    `[sandbox] filesystem`         "read-only": writes to its scratch folder and `write` only
                                   "listed": and reads only what a Python program needs, its own, and `read`

The engine has checked beforehand that this kernel can do what the manifest asks for; what fails here nevertheless
ends the worker's start. What holds for all workers alike, the hidden data folder, is in `mounts`.
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct
import sys
from collections.abc import Iterator
from pathlib import Path

from engine.sandbox import wire
from engine.worker import confine, landlock, load, native, seccomp
from engine.worker.landlock import ALL, DEVICE, READ, READ_ONLY_ABI, WRITE, Access, Scope
from engine.worker.native import checked

_PR_CAP_AMBIENT = 47
_PR_CAP_AMBIENT_CLEAR_ALL = 4

# linux/capability.h: CHOWN, DAC_OVERRIDE, FOWNER, FSETID, SETGID, SETUID, NET_BIND_SERVICE, IPC_LOCK. Not among
# them, for instance: SYS_ADMIN, SYS_RESOURCE (limits), SYS_RAWIO, MKNOD, DAC_READ_SEARCH (opens by inode number).
_KEPT_CAPABILITIES = sum(1 << number for number in (0, 1, 3, 4, 6, 7, 10, 14))
_CAPABILITY_HEADER = struct.pack("=Ii", 0x20080522, 0)  # version 3, this process
_CAPABILITY_DATA = struct.Struct("=IIIIII")  # effective, permitted, inheritable: low words, then high words
_capabilities = ctypes.create_string_buffer(_CAPABILITY_DATA.size)

# Some right must be handled, else the domain may mount; and then renames have to be allowed.
_HANDLED = int(Access.MAKE_CHAR | Access.MAKE_BLOCK | Access.REFER)
_RENAMES = int(Access.REFER)
_SIGNALS = int(Scope.SIGNAL)
_SIGNALS_AND_SOCKETS = int(Scope.SIGNAL | Scope.ABSTRACT_UNIX_SOCKET)

_OPEN = "open"
_LISTED = "listed"

_SYSTEM = (
    *("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32", "/proc", "/sys", "/run/systemd/resolve"),
    *("/etc/alternatives", "/etc/ca-certificates", "/etc/fonts", "/etc/group", "/etc/gai.conf", "/etc/host.conf"),
    *(
        "/etc/hosts",
        "/etc/ld.so.cache",
        "/etc/ld.so.conf",
        "/etc/ld.so.conf.d",
        "/etc/localtime",
        "/etc/mime.types",
    ),
    *("/etc/nsswitch.conf", "/etc/OpenCL", "/etc/os-release", "/etc/passwd", "/etc/pki", "/etc/protocols"),
    *("/etc/resolv.conf", "/etc/services", "/etc/ssl", "/etc/timezone", "/etc/vulkan"),
)
"""What a program reads of a system, secrets not among it."""

_DEVICES = ("null", "zero", "full", "random", "urandom", "tty", "ptmx", "pts", "shm", "dri", "kfd")


def prepare() -> None:
    """In the fork server: have ready what every worker would find out again."""
    landlock.abi()
    if seccomp.supported():
        for network in (True, False):
            seccomp.template(network=network)


def apply(start: wire.Start) -> None:
    """Give up, for good, what the plugin must not have.

    Raises:
        load.Refused: nothing of the plugin may run: the kernel refused, or the plugin's folder or a model lies
            where no plugin may look.
    """
    for path in (start.folder, *start.models.values()):
        if not os.path.exists(path):  # noqa: PTH110 - a worker without models needs no `Path` so far
            raise _refused(f"{path} is hidden from plugins, as all of the data folder is; move it elsewhere")
    try:
        _apply(start)
    except OSError as exc:
        raise _refused(f"the worker could not be contained ({exc.strerror}); run it on a kernel that can") from exc


def _refused(text: str) -> load.Refused:
    return load.Refused(wire.StartFailed("sandbox", "uncontained", "", text, ""))


def _apply(start: wire.Start) -> None:
    sandbox = start.sandbox
    _drop_capabilities()
    if landlock.abi() >= landlock.MIN_ABI:
        _enter_domain(start)
    elif sandbox.filesystem != _OPEN:
        raise OSError(errno.EOPNOTSUPP, "this kernel has no Landlock")
    if seccomp.supported() or not sandbox.network:
        seccomp.install(os.getpid(), network=sandbox.network)


def _drop_capabilities() -> None:
    """Keep of root's powers those over files. No program that it starts gets more: `no_new_privs` sees to that."""
    checked(native.capget(_CAPABILITY_HEADER, _capabilities), "capget")
    low = _CAPABILITY_DATA.unpack(_capabilities.raw)[1] & _KEPT_CAPABILITIES
    checked(native.capset(_CAPABILITY_HEADER, _CAPABILITY_DATA.pack(low, low, 0, 0, 0, 0)), "capset")
    confine.prctl(_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL)


def _enter_domain(start: wire.Start) -> None:
    sandbox = start.sandbox
    scopes = _SIGNALS if sandbox.network else _SIGNALS_AND_SOCKETS
    if sandbox.filesystem == _OPEN:
        landlock.restrict(_HANDLED, [("/", _RENAMES)], scopes)
        return
    if landlock.abi() < READ_ONLY_ABI:
        raise OSError(errno.EOPNOTSUPP, f"this kernel's Landlock is version {landlock.abi()}, not {READ_ONLY_ABI}")
    landlock.restrict(ALL, _allowed(start), scopes)


def _allowed(start: wire.Start) -> Iterator[tuple[str, int]]:
    sandbox = start.sandbox
    if sandbox.filesystem == _LISTED:
        own = (start.folder, *start.models.values(), *sandbox.read)
        for path in dict.fromkeys((*_SYSTEM, sys.prefix, sys.base_prefix, *filter(None, sys.path), *own)):
            yield path, READ
    else:
        yield "/", READ
    for path in (start.scratch, *sandbox.write):
        yield path, READ | WRITE
    yield "/dev/shm", READ | WRITE  # noqa: S108 - where multiprocessing keeps its locks and shared memory
    for device in (*_DEVICES, *_gpus()):
        yield f"/dev/{device}", DEVICE | Access.READ_DIR


def _gpus() -> list[str]:
    return [path.name for path in Path("/dev").glob("nvidia*")]
