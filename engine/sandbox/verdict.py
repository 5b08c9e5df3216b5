"""How a plugin ended: from exit status and evidence to a reason a person can act on. Pure functions only.

Three questions are kept apart, as in the contest sandbox `isolate`: did we end it (`Ending`), how did the process
go (`ExitStatus`), and what else is known (`Evidence`). Every reason reads fact, cause, next step.
"""

from __future__ import annotations

import os
import re
import signal
from enum import StrEnum
from pathlib import Path

import msgspec

from engine.errors import Cause, ReasonCode
from engine.sandbox import wire

STOPPED = "stopped"  # the verdict on a worker that we ended in good health

_MIB = 1024 * 1024
_USE_LESS = "use less or raise [limits] memory_mib, then restart the plugin"


class Ending(StrEnum):
    """Why the engine ended a worker, if it did."""

    STOP = "stop"  # in good health: the engine stops, the plugin restarts, or a sibling failed
    TIMEOUT = "timeout"
    START_TIMEOUT = "start_timeout"
    MEMORY = "memory"
    PROCESSES = "processes"
    SCRATCH = "scratch"
    PROTOCOL = "protocol"
    FAILED = "failed"  # it had already answered with what broke


class ExitStatus(msgspec.Struct, frozen=True):
    """How the process went; both None where nobody could tell."""

    code: int | None = None
    signal: int | None = None

    @classmethod
    def from_wait(cls, status: int | None) -> ExitStatus:
        """From a `waitpid` status."""
        if status is None:
            return cls()
        if os.WIFSIGNALED(status):
            return cls(signal=os.WTERMSIG(status))
        return cls(code=os.WEXITSTATUS(status))

    @property
    def signal_name(self) -> str | None:
        """`SIGSEGV`, or None."""
        if self.signal is None:
            return None
        try:
            return signal.Signals(self.signal).name
        except ValueError:
            return f"signal {self.signal}"


class Evidence(msgspec.Struct, frozen=True, kw_only=True):
    """What is known of a worker's last moments, besides its exit status."""

    folder: str  # the plugin's
    doing: str  # "`detect`" while a call ran, "import", "__init__", "validate()", or "" when idle
    ending: Ending | None = None  # None: the engine did not end it
    known: Cause | None = None  # what it had answered, with Ending.FAILED
    breach: str = ""  # what it did wrong, with Ending.PROTOCOL
    limit_s: float = 0.0  # the deadline that passed
    memory_limit_bytes: int = 0
    process_count: int = 0  # processes and threads of the tree, with Ending.PROCESSES
    process_limit: int = 0
    memory_peak_bytes: int = 0  # the whole process tree, resident
    memory_shared_bytes: int = 0  # of that: shared memory, mapped or not
    scratch_holds: str = ""  # "holds at least 1100 MiB", with Ending.SCRATCH
    scratch_limit_bytes: int = 0
    oom_kills: int = 0  # by the kernel, of anything in its cgroup; or on the machine, shortly before it died
    cgroup_limit: bool = False  # they were for the limit of its own cgroup
    lost: str = ""  # how the fork server ended, where the worker went with it
    stack: str = ""  # what faulthandler wrote
    main_thread: int = 0
    output_tail: str = ""


class Verdict(msgspec.Struct, frozen=True):
    """What goes into `worker.exited`. `cause` is None where the plugin is not to blame."""

    cause: Cause | None

    @property
    def code(self) -> str:
        """The reason code, or `stopped`."""
        return STOPPED if self.cause is None else self.cause.reason_code.value


_SIGNAL_MEANING = {
    signal.SIGSEGV: "an invalid memory access",
    signal.SIGBUS: "a memory access that the hardware or a truncated file could not serve",
    signal.SIGABRT: "abort() in native code",
    signal.SIGFPE: "an arithmetic fault in native code",
    signal.SIGILL: "an instruction this CPU does not have",
    signal.SIGSYS: "a forbidden system call",
}
_OWN_LIMIT = {  # sent by the kernel for what a process asked for itself
    signal.SIGALRM: "a timer",
    signal.SIGVTALRM: "a timer",
    signal.SIGPROF: "a timer",
    signal.SIGXCPU: "a limit on processor time",
    signal.SIGXFSZ: "a limit on the size of files",
}
_NO_MEMORY = re.compile(
    r"bad_alloc|can(?:'t|not) allocate memory|out of memory|insufficient memory", re.IGNORECASE
)
_SELF_SIGNAL = re.compile(r"^self-signal (\d{1,3}) at (.{1,500})$", re.MULTILINE)
_FRAME = re.compile(r'^  File "(?P<file>.*)", line (?P<line>\d+) in (?P<function>.*)$')
_LAST_FRAME = re.compile(rb'(worker/__main__\.py", line \d+ in <module>|^  \.\.\.)\n\Z', re.MULTILINE)
_SERVES, _FRAMES = "engine/worker/serve.py", "engine/sandbox/frames.py"
# Of our own code, what a worker may be in from one answer to the next call.
_WAITS = ("send", "answer", "_put", "serve", "_next", "_hear", "receive", "_wait")
_OWN = Path(__file__).parents[1]
_THREAD = re.compile(r"^(?P<current>Current thread|Thread) 0x(?P<id>[0-9a-f]{1,16})\b")


def verdict(status: ExitStatus, evidence: Evidence) -> Verdict:
    """The one judgement on a dead worker."""
    match evidence.ending:
        case Ending.STOP:
            return Verdict(None)
        case Ending.FAILED:
            return Verdict(evidence.known)
        case Ending.TIMEOUT:
            return Verdict(Cause(ReasonCode.TOOL_TIMEOUT, _hung(evidence)))
        case Ending.START_TIMEOUT:
            return Verdict(Cause(ReasonCode.START_TIMEOUT, _hung(evidence)))
        case Ending.MEMORY:
            return Verdict(Cause(ReasonCode.MEMORY_LIMIT, _memory(evidence)))
        case Ending.PROCESSES:
            return Verdict(Cause(ReasonCode.PROCESS_LIMIT, _processes(evidence)))
        case Ending.SCRATCH:
            return Verdict(Cause(ReasonCode.SCRATCH_LIMIT, _scratch(evidence)))
        case Ending.PROTOCOL:
            return _cause(ReasonCode.PROTOCOL_ERROR, evidence, _breach(evidence))
    return _died_by_itself(status, evidence)


def _died_by_itself(status: ExitStatus, evidence: Evidence) -> Verdict:
    doing = _doing(evidence)
    at = f" at {place}" if (place := fatal_place(evidence)) else ""
    if status.signal is not None:
        return _signalled(status, evidence, doing, at)
    if status.code == wire.EXIT_CHANNEL_LOST:
        breach = "it closed the descriptors that connect it with the engine"
        return _cause(
            ReasonCode.PROTOCOL_ERROR, evidence, _breach(msgspec.structs.replace(evidence, breach=breach))
        )
    if status.code is None:
        if evidence.lost:
            return Verdict(lost_with(evidence.lost, doing))
        text = f"the worker is gone{doing}, and with it the process that could tell how; restart the plugin"
        return _cause(ReasonCode.KILLED_EXTERNALLY, evidence, text)
    if status.code == wire.EXIT_NO_MEMORY:
        return _cause(ReasonCode.MEMORY_LIMIT, evidence, f"no memory was left{doing}: {_raise(evidence)}")
    if status.code == wire.EXIT_BROKEN:
        text = f"Holdfast's own part of the worker failed{doing}; see its output; restart the plugin"
        return _cause(ReasonCode.WORKER_EXIT, evidence, text)
    text = (
        f"the worker exited with status {status.code}{doing}, without a Python exception (os._exit or native "
        f"code ended it); raise an exception instead, then restart the plugin"
    )
    return _cause(ReasonCode.WORKER_EXIT, evidence, text)


def _signalled(status: ExitStatus, evidence: Evidence, doing: str, at: str) -> Verdict:
    name, number = status.signal_name, status.signal
    if (place := self_signal_place(status, evidence)) is not None:
        text = f"it sent {name} to itself{doing} at {place}; remove that, then restart the plugin"
        return _cause(ReasonCode.WORKER_SIGNAL, evidence, text)
    if number == signal.SIGABRT and _NO_MEMORY.search(evidence.output_tail):
        return _cause(
            ReasonCode.MEMORY_LIMIT, evidence, f"an allocation failed in native code{doing}: {_raise(evidence)}"
        )
    if number == signal.SIGKILL and evidence.cgroup_limit:
        text = f"killed by the kernel for memory{doing}, at its cgroup's limit: {_raise(evidence)}"
        return _cause(ReasonCode.MEMORY_LIMIT, evidence, text)
    if number == signal.SIGBUS and _shm_was_full(evidence):  # there was no room for a mapped page that it wrote to
        return _cause(ReasonCode.MEMORY_LIMIT, evidence, _memory(evidence))
    if number == signal.SIGKILL and evidence.oom_kills:
        text = f"the kernel ended it for want of memory{doing}: {_raise(evidence)}"
        return _cause(ReasonCode.MEMORY_LIMIT, evidence, text)
    if number in _SIGNAL_MEANING and not _only_waited(evidence):
        meaning = _SIGNAL_MEANING[signal.Signals(number)]
        text = f"{name}{at}{doing}: {meaning}; mend the native code that was called there, then restart the plugin"
        return _cause(ReasonCode.WORKER_SIGNAL, evidence, text)
    if number in _OWN_LIMIT:
        what = _OWN_LIMIT[signal.Signals(number)]
        text = f"{name}{doing}: {what} that it had set itself; handle it or remove it, then restart the plugin"
        return _cause(ReasonCode.WORKER_SIGNAL, evidence, text)
    text = f"{name} from outside the engine ended the worker{doing}; find out who sent it, then restart the plugin"
    return _cause(ReasonCode.KILLED_EXTERNALLY, evidence, text)


def _cause(code: ReasonCode, evidence: Evidence, text: str) -> Verdict:
    last = [line for line in evidence.output_tail.splitlines() if line.strip()][-1:]
    shown = f" (last output: {last[0].strip()[:200]})" if last else ""
    return Verdict(Cause(code, text + shown))


def lost_with(how: str, doing: str) -> Cause:
    """The cause of every plugin whose worker, or the making of one, ended with the fork server."""
    text = (
        f"its worker was lost{doing}: {how}, and all workers end with it; find out what ended it, then restart "
        f"the plugin"
    )
    return Cause(ReasonCode.KILLED_EXTERNALLY, text)


def _doing(evidence: Evidence) -> str:
    return f" during {evidence.doing}" if evidence.doing else " while it was idle"


def _hung(evidence: Evidence) -> str:
    place = hang_place(evidence)
    at = f" at {place}" if place else ", in code that did not let Python tell where"
    return (
        f"{evidence.doing} ran past {evidence.limit_s:g} s{at}; make it faster or raise "
        f"{'start_timeout_s' if evidence.ending is Ending.START_TIMEOUT else 'timeout_s'}, then restart the plugin"
    )


def _memory(evidence: Evidence) -> str:
    used = evidence.memory_peak_bytes / _MIB
    shared = evidence.memory_shared_bytes / _MIB
    of_that = f", {shared:.0f} MiB of it shared memory" if shared > used / 4 else ""
    return f"it used {used:.0f} MiB{_doing(evidence)}{of_that}: {_raise(evidence)}"


def _scratch(evidence: Evidence) -> str:
    return (
        f"its scratch folder {evidence.scratch_holds}{_doing(evidence)}: its limit is "
        f"{evidence.scratch_limit_bytes / _MIB:.0f} MiB; delete there what you no longer need or raise "
        f"[limits] scratch_mib, then restart the plugin"
    )


def _processes(evidence: Evidence) -> str:
    return (
        f"it had {evidence.process_count} processes and threads{_doing(evidence)}: its limit is "
        f"{evidence.process_limit}; start fewer or raise [limits] processes, then restart the plugin"
    )


def _raise(evidence: Evidence) -> str:
    return f"its limit is {evidence.memory_limit_bytes / _MIB:.0f} MiB; {_USE_LESS}"


def _breach(evidence: Evidence) -> str:
    return (
        f"the worker broke the protocol{_doing(evidence)}: {evidence.breach}; leave descriptors that the plugin "
        f"did not open alone, then restart the plugin"
    )


def failed_call(failed: wire.Failed, tool: str, memory_limit_bytes: int) -> Cause:
    """The cause when a call ended in Python: an exception, or a result that cannot be sent."""
    at = f" at {failed.where}" if failed.where else ""
    said = f": {failed.message}" if failed.message else ""
    match failed.kind:
        case "memory":
            text = (
                f"`{tool}` ran out of memory{at} ({failed.error_type}{said}): its limit is "
                f"{memory_limit_bytes / _MIB:.0f} MiB; {_USE_LESS}"
            )
            return Cause(ReasonCode.MEMORY_LIMIT, text)
        case "invalid":
            text = f"`{tool}` returned what cannot be sent{said}; return JSON values, dataclasses, bytes or arrays"
            return Cause(ReasonCode.RESULT_INVALID, text)
        case "too_large":
            text = f"the result of `{tool}` is too large{said}; return less, stream it, or raise max_result_bytes"
            return Cause(ReasonCode.RESULT_TOO_LARGE, text)
    text = (
        f"`{tool}` raised {failed.error_type}{said}{at}; mend it, or name the exception under "
        f"[tools.{tool}] rejects if it means bad input, then restart the plugin"
    )
    return Cause(ReasonCode.TOOL_EXCEPTION, text)


_STAGE_CODES = {
    "import": ReasonCode.IMPORT_ERROR,
    "init": ReasonCode.INIT_ERROR,
    "validate": ReasonCode.VALIDATE_FAILED,
    "tools": ReasonCode.MANIFEST_INVALID,
}
_STAGE_NAMES = {"import": "import", "init": "__init__", "validate": "validate()", "tools": "reading its tools"}


def stage_name(stage: str) -> str:
    """A start's stage as people call it."""
    return _STAGE_NAMES.get(stage, stage)


def failed_start(report: wire.StartFailed, memory_limit_bytes: int) -> Cause:
    """The cause when a start ended in Python. `package_missing` alone means UNAVAILABLE."""
    stage = stage_name(report.stage)
    at = f" at {report.where}" if report.where else ""
    match report.kind:
        case "uncontained":
            return Cause(ReasonCode.SANDBOX_UNSUPPORTED, f"{report.message}, then restart the plugin")
        case "missing":
            chain = " → ".join(report.chain)
            text = f"{chain}: {report.message} is missing{at}; install what provides it, then restart the plugin"
            return Cause(ReasonCode.PACKAGE_MISSING, text)
        case "memory":
            text = (
                f"{stage} ran out of memory{at} ({report.error_type}): its limit is "
                f"{memory_limit_bytes / _MIB:.0f} MiB; {_USE_LESS}"
            )
            return Cause(ReasonCode.MEMORY_LIMIT, text)
        case "exception":
            text = f"{stage} raised {report.error_type}: {report.message}{at}; mend it, then restart the plugin"
            return Cause(_STAGE_CODES.get(report.stage, ReasonCode.INIT_ERROR), text)
        case "no_validate":
            text = f"{report.message}; add one that raises, or returns False, if the plugin could not serve"
            return Cause(ReasonCode.VALIDATE_FAILED, text)
        case "returned_false":
            text = (
                f"{report.message}: the plugin says that it could not serve; raise an exception there to say why"
            )
            return Cause(ReasonCode.VALIDATE_FAILED, text)
    return Cause(_STAGE_CODES.get(report.stage, ReasonCode.INIT_ERROR), f"{report.message}; mend it, then restart")


def self_signal_place(status: ExitStatus, evidence: Evidence) -> str | None:
    """Where in the plugin the signal that it died of was sent, by its own note; None where there is none."""
    notes = _SELF_SIGNAL.findall(evidence.stack)
    return notes[-1][1] if notes and int(notes[-1][0]) == status.signal else None


def stack_is_whole(stack: bytes) -> bool:
    """Whether a dump on request has come to its end: many small writes, of which the last is our own main module's
    frame (faulthandler writes the main thread last), or the sign that it has cut a deep stack."""
    return _LAST_FRAME.search(stack) is not None


def fatal_place(evidence: Evidence) -> str:
    """Where the thread that crashed was, from faulthandler's last words; "" where they do not say."""
    return _place(_fatal_threads(evidence), None, evidence.folder)


def _shm_was_full(evidence: Evidence) -> bool:
    """Or almost, when it was looked at: Python's own resource tracker empties it as soon as the worker is dead."""
    return evidence.memory_shared_bytes > evidence.memory_limit_bytes * 0.9


def _only_waited(evidence: Evidence) -> bool:
    """Whether the thread that took the signal was our own, between two calls: it does nothing there that could
    fault, so somebody sent the signal."""
    for file, _, function in _fatal_threads(evidence).get(None) or []:
        if file.endswith(_SERVES):
            return function in _WAITS
        if not file.endswith(_FRAMES):
            return False
    return False


def hang_place(evidence: Evidence) -> str:
    """Where the thread that runs the tools was when it was asked; "" where it did not answer."""
    return _place(_threads(evidence.stack), evidence.main_thread, evidence.folder)


def _fatal_threads(evidence: Evidence) -> dict[int | None, list[tuple[str, str, str]]]:
    """The threads as they were at the crash: what stands before it may be the plugin's own words."""
    _, _, fatal = evidence.stack.rpartition("Fatal Python error")
    return _threads(fatal)


def _threads(stack: str) -> dict[int | None, list[tuple[str, str, str]]]:
    """Frames by thread, innermost first; the current thread under None as well."""
    threads: dict[int | None, list[tuple[str, str, str]]] = {}
    frames: list[tuple[str, str, str]] = []
    for line in stack.splitlines():
        if (thread := _THREAD.match(line)) is not None:
            frames = []
            threads[int(thread["id"], 16)] = frames
            if thread["current"] == "Current thread":
                threads[None] = frames
        elif (frame := _FRAME.match(line)) is not None:
            frames.append((frame["file"], frame["line"], frame["function"]))
    return threads


def _place(threads: dict[int | None, list[tuple[str, str, str]]], thread: int | None, folder: str) -> str:
    frames = threads.get(thread) or threads.get(None) or []
    inside = next((frame for frame in frames if Path(frame[0]).is_relative_to(folder)), None)
    found = inside or next((frame for frame in frames if not _is_ours(frame[0])), None)
    if found is None:
        return ""
    file, line, function = found
    path = Path(file)
    shown = str(path.relative_to(folder)) if inside else path.name
    return f"{shown}:{line} in `{function}`"


def _is_ours(file: str) -> bool:
    """Whether it is Holdfast's or the importer's: nobody could mend anything there."""
    return file.startswith("<frozen ") or Path(file).is_relative_to(_OWN)
