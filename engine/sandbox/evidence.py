"""What a death leaves behind besides its verdict: who ended it, which limit, whose memory, which library.

Pure functions. What cannot be known is said to be unknown: no wait status tells who sent a signal.
"""

from __future__ import annotations

import re
import signal
from enum import StrEnum
from pathlib import PurePath
from typing import NamedTuple

import msgspec

from engine.errors import Cause, ReasonCode
from engine.sandbox.fingerprint import InFlight
from engine.sandbox.verdict import Ending, Evidence, ExitStatus, self_signal_place


class By(StrEnum):
    """Who ended a worker."""

    ENGINE = "engine"  # a deadline, a limit, or a breach of the protocol
    KERNEL_MEMORY = "kernel_memory"  # the machine, or the worker's cgroup, ran out of memory
    OUTSIDE = "outside"  # a signal from another process, or gone without a trace
    ITSELF = "itself"  # an exception, an exit, a crash


class Sender(StrEnum):
    """Who sent the signal that ended a worker."""

    ENGINE = "engine"
    KERNEL = "kernel"
    ITSELF = "itself"  # from Python; the place is known
    UNKNOWN = "unknown"  # of a fault such as SIGSEGV, as a rule the kernel; but any process could have sent it


class Failure(msgspec.Struct, frozen=True):
    """What the worker itself said of its end: an exception, or a result that cannot be sent."""

    error_type: str
    message: str
    where: str  # "plugin.py:17 in `detect`", or ""


class Process(msgspec.Struct, frozen=True):
    """One process of a worker's tree, when that held the most. Pages that several share count for each."""

    pid: int
    command: str  # of its main thread, at most 15 bytes; a process may choose it
    resident_bytes: int


class Death(NamedTuple):
    """All that is known of a worker that died for a cause. Whoever takes it closes `in_flight`."""

    incarnation: int
    pid: int
    time_ns: int
    status: ExitStatus
    evidence: Evidence
    cause: Cause
    failure: Failure | None
    in_flight: InFlight | None
    processes: tuple[Process, ...]  # of a tree that held over half of its limit, the largest first


_FRAME = re.compile(r'^  File "(.*)", line \d+ in ')
_EXTENSIONS = re.compile(r"^Extension modules: (.+?)(?: \(total: \d+\))?$", re.MULTILINE)
_OURS = "msgspec"  # in every worker


def ended_by(death: Death) -> By:
    """Who ended it."""
    if death.evidence.ending not in (None, Ending.FAILED):
        return By.ENGINE
    if _killed_by_kernel(death):
        return By.KERNEL_MEMORY
    return By.OUTSIDE if death.cause.reason_code is ReasonCode.KILLED_EXTERNALLY else By.ITSELF


def signal_sender(death: Death) -> tuple[Sender | None, str]:
    """Who sent the signal, and from where in the plugin if it was the plugin; None where it died of none."""
    if death.status.signal is None:
        return None, ""
    place = self_signal_place(death.status, death.evidence)
    if death.evidence.ending is None and place is not None:
        return Sender.ITSELF, place
    if death.evidence.ending is not None and death.status.signal == signal.SIGKILL:
        return Sender.ENGINE, ""
    if _killed_by_kernel(death):
        return Sender.KERNEL, ""
    return Sender.UNKNOWN, ""


def memory_limit(death: Death) -> str | None:
    """Which limit was met: `tree` (of all its processes, by the engine's watch or its cgroup), `process` (an
    allocation in one was refused), `machine` (the kernel's OOM killer); None where it did not die of memory.
    """
    if death.cause.reason_code is not ReasonCode.MEMORY_LIMIT:
        return None
    if death.evidence.ending is Ending.MEMORY:
        return "tree"
    if not _killed_by_kernel(death):
        return "process"
    return "tree" if death.evidence.cgroup_limit else "machine"


def _killed_by_kernel(death: Death) -> bool:
    """Whether the kernel's OOM killer ended it."""
    if death.cause.reason_code is not ReasonCode.MEMORY_LIMIT or death.evidence.ending is not None:
        return False
    return death.status.signal == signal.SIGKILL and death.evidence.oom_kills > 0


def extension_modules(stack: str) -> tuple[str, ...]:
    """The native modules that were loaded when it crashed, those of the standard library excepted."""
    found = _EXTENSIONS.findall(stack)
    return tuple(name for name in found[-1].split(", ") if name.partition(".")[0] != _OURS) if found else ()


def native_library(death: Death) -> str | None:
    """The native library that a crash happened in, where the stack shows it; else None.

    It shows it where the innermost Python frame of the thread that crashed lies in a package whose native modules
    were loaded: `cv2/__init__.py` with `cv2`. From `ctypes` on, nothing tells which library was called.
    """
    _, fatal, stack = death.evidence.stack.rpartition("Fatal Python error")
    _, current, own = stack.partition("Current thread ")
    if not fatal or not current or death.status.signal is None:
        return None
    innermost = next((found[1] for line in own.splitlines() if (found := _FRAME.match(line))), "")
    folders = PurePath(innermost).parent.parts
    if folders[-1:] == ("ctypes",):
        return "_ctypes"
    if PurePath(innermost).is_relative_to(death.evidence.folder):
        return None
    packages = {name.partition(".")[0] for name in extension_modules(stack)}
    return next((part for part in reversed(folders) if part in packages), None)
