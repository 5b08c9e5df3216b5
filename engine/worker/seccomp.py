"""Seccomp: a filter over system calls, for a process and everything it starts.

Written out in classic BPF (linux/filter.h, linux/seccomp.h, seccomp(2)): the filter is forty instructions, and
`pyseccomp` needs libseccomp on the machine, which few have. Libraries see an ordinary error, never a kill.

Always denied: changing limits and priorities of *other* processes, which needs no signal and no ptrace: one
`prlimit(engine, RLIMIT_CPU, …)` would end the engine. A process is "other" unless it is named 0 or by the worker's
own pid, so a child that names itself by number is denied too. And System V IPC, whose memory belongs to no
process: to libraries it looks like a kernel that was built without. On demand: every socket but Unix ones, and
io_uring, whose operations no filter sees.
"""

from __future__ import annotations

import ctypes
import errno
import functools
import os
import socket
import struct

from engine.worker.machine import machine as _machine
from engine.worker.native import syscall

_SET_MODE_FILTER = 1
_GET_ACTION_AVAIL = 2
_FLAG_SPEC_ALLOW = 4  # else kernels before 5.16 slow the process down against Spectre

_ALLOW = 0x7FFF0000
_ERRNO = 0x00050000

# struct seccomp_data: int nr; __u32 arch; __u64 instruction_pointer; __u64 args[6]; little-endian on both.
_NR = 0
_ARCH = 4


def _low(argument: int) -> int:
    return 16 + 8 * argument


_LOAD = 0x20  # BPF_LD | BPF_W | BPF_ABS
_EQUAL = 0x15  # BPF_JMP | BPF_JEQ | BPF_K
_AT_LEAST = 0x35  # BPF_JMP | BPF_JGE | BPF_K
_RETURN = 0x06  # BPF_RET | BPF_K
_X32 = 0x40000000  # __X32_SYSCALL_BIT

_NOBODY = 0xFFFFFFFF  # no process has this number

_INSTRUCTION = struct.Struct("=HBBI")  # struct sock_filter: code, jt, jf, k


class _Program(ctypes.Structure):
    """struct sock_fprog."""

    _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_char_p))


@functools.cache
def supported() -> bool:
    """Whether this kernel takes filters, and this machine's system calls are known here."""
    if _machine is None:
        return False
    action = struct.pack("=I", _ERRNO)
    try:
        syscall("seccomp(SECCOMP_GET_ACTION_AVAIL)", _machine.seccomp, _GET_ACTION_AVAIL, 0, action)
    except OSError:
        return False
    return True


def install(pid: int, *, network: bool) -> None:
    """Put the filter on this process, for good. Needs `PR_SET_NO_NEW_PRIVS`, and a process with one thread.

    Args:
        pid: the process's own.
        network: whether sockets other than Unix ones may be made.

    Raises:
        OSError: the kernel refused, or the machine is not known.
    """
    if _machine is None:
        raise OSError(errno.ENOSYS, f"seccomp: the system calls of {os.uname().machine} are not known")
    code = template(network=network).replace(_unless(_NOBODY), _unless(pid))
    program = _Program(len(code) // _INSTRUCTION.size, code)
    arguments = (_SET_MODE_FILTER, _FLAG_SPEC_ALLOW, bytes(program))
    syscall("seccomp(SECCOMP_SET_MODE_FILTER)", _machine.seccomp, *arguments)


@functools.cache
def template(*, network: bool) -> bytes:
    """The whole program, for process `_NOBODY`. Cached: a fork server has it ready for its workers."""
    if _machine is None:
        return b""
    machine = _machine
    deny, deny_network = (_op(_RETURN, _ERRNO | number) for number in (errno.EPERM, errno.EACCES))

    def named_by(argument: int) -> list[bytes]:
        return [_op(_LOAD, _low(argument)), _op(_EQUAL, 0, 2), _unless(_NOBODY), deny]

    program = [_op(_LOAD, _ARCH), _op(_EQUAL, machine.arch, 1), deny, _op(_LOAD, _NR)]
    program += [_op(_AT_LEAST, _X32, 0, 1), deny]
    for number in (machine.sched_setscheduler, machine.sched_setparam, machine.sched_setattr):
        program += _on(number, named_by(0))
    # Reading a limit is harmless: then the new one is a null pointer.
    both_null = [_op(_LOAD, _low(2)), _op(_EQUAL, 0, 0, 2), _op(_LOAD, _low(2) + 4), _op(_EQUAL, 0, 4)]
    program += _on(machine.prlimit, [*both_null, *named_by(0)])
    for number, users in ((machine.setpriority, 2), (machine.ioprio_set, 3)):  # PRIO_USER, IOPRIO_WHO_USER
        program += _on(number, [_op(_LOAD, _low(0)), _op(_AT_LEAST, users, 0, 1), deny, *named_by(1)])
    for number in (machine.shmget, machine.msgget, machine.semget):
        program += _on(number, [_op(_RETURN, _ERRNO | errno.ENOSYS)])
    if not network:
        unix_only = [_op(_LOAD, _low(0)), _op(_EQUAL, socket.AF_UNIX, 1), deny_network]
        program += _on(machine.socket, unix_only)
        program += _on(machine.socketpair, unix_only)
        program += _on(machine.io_uring_setup, [deny_network])
    program.append(_op(_RETURN, _ALLOW))
    return b"".join(program)


def _on(number: int, rule: list[bytes]) -> list[bytes]:
    """A rule for one system call. It falls through, or jumps, to its end, where the call is allowed."""
    return [_op(_EQUAL, number, 0, len(rule) + 1), *rule, _op(_RETURN, _ALLOW)]


def _unless(pid: int) -> bytes:
    """Jumps over the next instruction where this process is named."""
    return _op(_EQUAL, pid, 1)


def _op(code: int, k: int, if_true: int = 0, if_false: int = 0) -> bytes:
    return _INSTRUCTION.pack(code, if_true, if_false, k)
