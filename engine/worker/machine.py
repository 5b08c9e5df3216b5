"""The numbers of system calls that differ from machine to machine; newer calls have the same ones on all."""

from __future__ import annotations

import os
import sys
from typing import Final, NamedTuple


class Machine(NamedTuple):
    """The audit architecture (linux/audit.h) and system call numbers of one machine."""

    arch: int
    seccomp: int
    socket: int
    socketpair: int
    setpriority: int
    ioprio_set: int
    sched_setparam: int
    sched_setscheduler: int
    sched_setattr: int
    prlimit: int
    io_uring_setup: int
    shmget: int
    msgget: int
    semget: int


_MACHINES = {
    "x86_64": Machine(0xC000003E, 317, 41, 53, 141, 251, 142, 144, 314, 302, 425, 29, 68, 64),
    "aarch64": Machine(0xC00000B7, 277, 198, 199, 140, 30, 118, 119, 274, 261, 425, 194, 186, 190),
}
# None where they are not known here.
machine: Final = _MACHINES.get(os.uname().machine) if sys.maxsize > 2**32 else None
