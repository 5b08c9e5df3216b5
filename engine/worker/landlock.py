"""Landlock: rights that a process gives up for good, for itself and everything it starts.

Numbers are from linux/landlock.h; landlock(7) tells what they mean. The packages on PyPI are pre-releases
(`landlock` 1.0.0.dev5 and `py-landlock` 0.1.1 know older kernels or are alpha, `landlockpy` 0.2.0 takes 20 ms to
import) around the three system calls below.
"""

from __future__ import annotations

import errno
import functools
import os
import stat
import struct
from collections.abc import Iterable
from enum import IntFlag

from engine.worker.native import syscall

# The same on every architecture: they are newer than the unified table.
_CREATE_RULESET = 444
_ADD_RULE = 445
_RESTRICT_SELF = 446
_CREATE_RULESET_VERSION = 1
_RULE_PATH_BENEATH = 1

_RULESET = struct.Struct("=QQQ")  # handled_access_fs, handled_access_net, scoped
_PATH_BENEATH = struct.Struct("=Qi")  # allowed_access, parent_fd


class Access(IntFlag):
    """LANDLOCK_ACCESS_FS_*."""

    EXECUTE = 1 << 0
    WRITE_FILE = 1 << 1
    READ_FILE = 1 << 2
    READ_DIR = 1 << 3
    REMOVE_DIR = 1 << 4
    REMOVE_FILE = 1 << 5
    MAKE_CHAR = 1 << 6
    MAKE_DIR = 1 << 7
    MAKE_REG = 1 << 8
    MAKE_SOCK = 1 << 9
    MAKE_FIFO = 1 << 10
    MAKE_BLOCK = 1 << 11
    MAKE_SYM = 1 << 12
    REFER = 1 << 13  # rename or link into another folder; denied by any ruleset that handles a file right
    TRUNCATE = 1 << 14
    IOCTL_DEV = 1 << 15


class Scope(IntFlag):
    """LANDLOCK_SCOPE_*: what reaches only processes of the same or a narrower domain."""

    ABSTRACT_UNIX_SOCKET = 1 << 0
    SIGNAL = 1 << 1


# Plain numbers from here on: the operators of an `IntFlag` are Python code, in each worker, for each right.
READ = int(Access.EXECUTE | Access.READ_FILE | Access.READ_DIR)
DEVICE = int(Access.READ_FILE | Access.WRITE_FILE | Access.IOCTL_DEV)
ALL = (1 << 16) - 1
WRITE = ALL & ~int(Access.MAKE_CHAR | Access.MAKE_BLOCK)
_OF_FILES = int(Access.EXECUTE | Access.WRITE_FILE | Access.READ_FILE | Access.TRUNCATE | Access.IOCTL_DEV)

MIN_ABI = 2  # Linux 5.19: before, a domain forbids every rename into another folder
READ_ONLY_ABI = 3  # Linux 6.2: before, truncate(2) cannot be denied
SCOPE_ABI = 6  # Linux 6.12


@functools.cache
def abi() -> int:
    """The kernel's Landlock version; 0 where it has none, or was started without it."""
    try:
        return syscall("landlock_create_ruleset", _CREATE_RULESET, None, 0, _CREATE_RULESET_VERSION)
    except OSError as exc:
        if exc.errno in (errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM):  # EPERM: a container's seccomp filter
            return 0
        raise


def restrict(handled: int, allowed: Iterable[tuple[str, int]], scopes: int) -> None:
    """Enter a domain of its own, for good. Needs `PR_SET_NO_NEW_PRIVS`, and a process with one thread.

    A domain may not trace, or look into, a process outside it, and may not mount, whatever else it allows. What
    this kernel does not know of `handled` and `scopes` is left out.

    Args:
        handled: rights that are denied, of `Access`, but for what follows.
        allowed: a path and the rights below it. One that does not exist is passed over.
        scopes: what stays inside the domain, of `Scope`.

    Raises:
        OSError: the kernel refused.
    """
    handled &= _known()
    known_scopes = scopes if abi() >= SCOPE_ABI else 0
    attributes = _RULESET.pack(handled, 0, known_scopes)
    ruleset = syscall("landlock_create_ruleset", _CREATE_RULESET, attributes, len(attributes), 0)
    try:
        for path, rights in allowed:
            _allow(ruleset, path, rights & handled)
        syscall("landlock_restrict_self", _RESTRICT_SELF, ruleset, 0)
    finally:
        os.close(ruleset)


def _allow(ruleset: int, path: str, rights: int) -> None:
    try:
        fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError, PermissionError):  # nor could the plugin reach it
        return
    try:
        if not stat.S_ISDIR(os.fstat(fd).st_mode):
            rights &= _OF_FILES
        rule = _PATH_BENEATH.pack(rights, fd)
        syscall("landlock_add_rule", _ADD_RULE, ruleset, _RULE_PATH_BENEATH, rule, 0)
    finally:
        os.close(fd)


@functools.cache
def _known() -> int:
    known = ALL
    if abi() < 5:  # Linux 6.10
        known &= ~int(Access.IOCTL_DEV)
    if abi() < READ_ONLY_ABI:
        known &= ~int(Access.TRUNCATE)
    return known
