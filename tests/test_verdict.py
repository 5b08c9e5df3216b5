"""The one judgement on a dead worker: what is known → code and words, and no evidence that it cannot judge."""

from __future__ import annotations

import os
import signal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.errors import Cause, ReasonCode
from engine.sandbox import wire
from engine.sandbox.verdict import (
    _WAITS,
    STOPPED,
    Ending,
    Evidence,
    ExitStatus,
    failed_call,
    failed_start,
    fatal_place,
    hang_place,
    verdict,
)
from engine.worker import serve

FOLDER = "/srv/plugins/detector"
MIB = 1024 * 1024
SEGFAULT = f"""Fatal Python error: Segmentation fault

Thread 0x00007f1111111111 (most recent call first):
  File "/usr/lib/python3.11/threading.py", line 324 in wait
  File "{FOLDER}/feed.py", line 8 in poll

Current thread 0x00007f2222222222 (most recent call first):
  File "/usr/lib/python3.11/ctypes/__init__.py", line 519 in string_at
  File "{FOLDER}/native/kernels.py", line 17 in detect
  File "{FOLDER}/plugin.py", line 30 in work
"""
HANG = f"""Thread 0x00007f2222222222 (most recent call first):
  File "{FOLDER}/plugin.py", line 88 in _match
  File "{FOLDER}/plugin.py", line 40 in track

Current thread 0x00007f1111111111 (most recent call first):
  File "{FOLDER}/feed.py", line 8 in poll
"""
OUTSIDE = """Fatal Python error: Aborted

Current thread 0x00007f2222222222 (most recent call first):
  File "/usr/lib/python3/dist-packages/cv2/dnn.py", line 5 in forward
"""
BETWEEN = """Fatal Python error: Segmentation fault

Current thread 0x00007f2222222222 (most recent call first):
  File "/srv/engine/sandbox/frames.py", line 5 in take
  File "/srv/engine/worker/serve.py", line 80 in _wait
"""
FIRST = "Current thread 0x1 (most recent call first):"
SPACE = f'{FIRST}\n  File "{FOLDER}/a b.py", line 1 in <module>'
NEIGHBOUR = f'{FIRST}\n  File "{FOLDER}2/x.py", line 1 in f'
OURS = f'{FIRST}\n  File "<frozen runpy>", line 8 in _run\n  File "{wire.__file__}", line 1 in f'
KNOWN = Cause(ReasonCode.TOOL_EXCEPTION, "`work` raised ValueError")


def evidence(**known: object) -> Evidence:
    base: dict[str, object] = {"folder": FOLDER, "doing": "`work`", "memory_limit_bytes": 256 * MIB}
    return Evidence(**{**base, **known})  # type: ignore[arg-type]


def by(number: int) -> ExitStatus:
    return ExitStatus(signal=number)


# exit status, evidence → code, words of the reason
VERDICTS: list[tuple[ExitStatus, Evidence, str, list[str]]] = [
    # The engine ended it.
    (ExitStatus(0), evidence(ending=Ending.STOP), STOPPED, []),
    (by(9), evidence(ending=Ending.FAILED, known=KNOWN), "tool_exception", ["`work` raised ValueError"]),
    (
        by(9),
        evidence(ending=Ending.TIMEOUT, limit_s=60.0, stack=HANG, main_thread=0x7F2222222222),
        "tool_timeout",
        ["`work` ran past 60 s at plugin.py:88 in `_match`", "raise timeout_s"],
    ),
    (
        by(9),
        evidence(ending=Ending.TIMEOUT, limit_s=0.5),
        "tool_timeout",
        ["past 0.5 s, in code that did not let"],
    ),
    (
        by(9),
        evidence(ending=Ending.START_TIMEOUT, doing="import", limit_s=2.0),
        "start_timeout",
        ["import ran past 2 s", "raise start_timeout_s"],
    ),
    (
        by(9),
        evidence(ending=Ending.MEMORY, memory_peak_bytes=300 * MIB),
        "memory_limit",
        ["it used 300 MiB during `work`", "its limit is 256 MiB", "memory_mib"],
    ),
    (
        by(9),
        evidence(ending=Ending.PROTOCOL, breach="it sent Hello out of turn", doing=""),
        "protocol_error",
        ["broke the protocol while it was idle: it sent Hello out of turn"],
    ),
    # It ended by itself.
    (
        by(11),
        evidence(stack=SEGFAULT),
        "worker_signal",
        ["SIGSEGV at native/kernels.py:17 in `detect` during `work`"],
    ),
    (
        by(6),
        evidence(stack=OUTSIDE),
        "worker_signal",
        ["SIGABRT at dnn.py:5 in `forward`", "abort() in native code"],
    ),
    (by(7), evidence(doing=""), "worker_signal", ["SIGBUS while it was idle"]),
    (
        by(7),
        evidence(memory_shared_bytes=1 << 30, memory_peak_bytes=1 << 30),
        "memory_limit",
        ["it used 1024 MiB"],
    ),
    (
        by(11),
        evidence(doing="", stack=BETWEEN),
        "killed_externally",
        ["SIGSEGV from outside", "while it was idle"],
    ),
    (by(4), evidence(doing="import"), "worker_signal", ["SIGILL during import", "this CPU does not have"]),
    (by(8), evidence(), "worker_signal", ["SIGFPE during `work`"]),
    (by(31), evidence(), "worker_signal", ["SIGSYS", "forbidden system call"]),
    (
        by(9),
        evidence(stack="self-signal 9 at plugin.py:3 in `work`\n"),
        "worker_signal",
        ["it sent SIGKILL to itself during `work` at plugin.py:3 in `work`"],
    ),
    (
        by(15),
        evidence(stack="self-signal 0 at plugin.py:3 in `work`\n"),
        "killed_externally",
        ["SIGTERM from outside"],
    ),
    (
        by(6),
        evidence(output_tail="terminate called after throwing an instance of 'std::bad_alloc'"),
        "memory_limit",
        ["an allocation failed in native code during `work`", "256 MiB"],
    ),
    (by(9), evidence(oom_kills=1), "memory_limit", ["the kernel ended it for want of memory during `work`"]),
    (by(9), evidence(), "killed_externally", ["SIGKILL from outside the engine", "find out who sent it"]),
    (by(15), evidence(doing=""), "killed_externally", ["SIGTERM from outside the engine", "while it was idle"]),
    (by(64), evidence(), "killed_externally", ["SIGRTMAX from outside"]),
    (by(40), evidence(), "killed_externally", ["signal 40 from outside"]),
    (ExitStatus(), evidence(), "killed_externally", ["the worker is gone during `work`"]),
    (ExitStatus(0), evidence(), "worker_exit", ["exited with status 0 during `work`", "os._exit"]),
    (
        ExitStatus(3),
        evidence(output_tail="loading\nlicence expired\n\n"),
        "worker_exit",
        ["exited with status 3", "(last output: licence expired)"],
    ),
    (ExitStatus(wire.EXIT_CHANNEL_LOST), evidence(), "protocol_error", ["closed the descriptors"]),
    (ExitStatus(wire.EXIT_NO_MEMORY), evidence(), "memory_limit", ["no memory was left during `work`", "256 MiB"]),
    (ExitStatus(wire.EXIT_BROKEN), evidence(), "worker_exit", ["Holdfast's own part of the worker failed"]),
]


@pytest.mark.parametrize(("status", "known", "code", "words"), VERDICTS)
def test_every_death_has_its_code_and_its_words(
    status: ExitStatus, known: Evidence, code: str, words: list[str]
) -> None:
    judged = verdict(status, known)
    assert judged.code == code
    if code == STOPPED:
        assert judged.cause is None
        return
    assert judged.cause is not None
    for part in words:
        assert part in judged.cause.reason, judged.cause.reason


LINES = st.lists(
    st.one_of(
        st.text(max_size=40),
        st.sampled_from([*SEGFAULT.splitlines(), *HANG.splitlines(), "self-signal 9 at x", "out of memory"]),
    ),
    max_size=12,
).map("\n".join)
EVIDENCE = st.builds(
    Evidence,
    folder=st.sampled_from([FOLDER, "/", "", "relative"]),
    doing=st.sampled_from(["", "`work`", "import", "validate()"]),
    # Invariant of the host: it ends a worker as FAILED only when it knows the cause.
    ending=st.sampled_from([None, *(ending for ending in Ending if ending is not Ending.FAILED)]),
    breach=st.text(max_size=20),
    limit_s=st.floats(min_value=0, allow_nan=False),
    memory_limit_bytes=st.integers(0, 2**50),
    memory_peak_bytes=st.integers(0, 2**50),
    oom_kills=st.integers(-3, 3),
    stack=LINES,
    main_thread=st.sampled_from([0, 0x7F2222222222, 2**64]),
    output_tail=LINES,
)
STATUSES = st.one_of(
    st.just(ExitStatus()),
    st.builds(ExitStatus, code=st.integers(0, 255)),
    st.builds(ExitStatus, signal=st.integers(1, 255)),
)


@given(STATUSES, EVIDENCE)
def test_there_is_a_verdict_for_any_evidence(status: ExitStatus, known: Evidence) -> None:
    judged = verdict(status, known)
    if known.ending is Ending.STOP:
        assert judged.cause is None
    else:
        assert judged.cause is not None
        assert judged.code in set(ReasonCode)
        assert judged.cause.reason.strip()


FAILURES = st.builds(
    wire.Failed,
    call_id=st.integers(0, 9),
    kind=st.sampled_from(["exception", "memory", "invalid", "too_large", "", "unheard of"]),
    error_type=st.text(max_size=9),
    message=st.text(max_size=9),
    where=st.text(max_size=9),
)
START_FAILURES = st.builds(
    wire.StartFailed,
    stage=st.one_of(st.sampled_from(["import", "init", "validate", "tools"]), st.text(max_size=5)),
    kind=st.sampled_from(["exception", "missing", "memory", "returned_false", "no_validate", "no_tool", "?"]),
    error_type=st.text(max_size=9),
    message=st.text(max_size=9),
    where=st.text(max_size=9),
    chain=st.lists(st.text(max_size=5), max_size=3).map(tuple),
)


@given(FAILURES, START_FAILURES)
def test_there_is_a_cause_for_whatever_a_worker_reports(failed: wire.Failed, start: wire.StartFailed) -> None:
    for cause in (failed_call(failed, "work", MIB), failed_start(start, MIB)):
        assert cause.reason_code in set(ReasonCode)
        assert cause.reason.strip()


@pytest.mark.parametrize(
    ("stack", "fatal", "hung"),
    [
        (SEGFAULT, "native/kernels.py:17 in `detect`", "native/kernels.py:17 in `detect`"),
        (HANG, "feed.py:8 in `poll`", "plugin.py:88 in `_match`"),
        (OUTSIDE, "dnn.py:5 in `forward`", "dnn.py:5 in `forward`"),
        (HANG + SEGFAULT, "native/kernels.py:17 in `detect`", "native/kernels.py:17 in `detect`"),
        ("Fatal Python error: Bus error\n\n<no Python frame>\n", "", ""),
        ("", "", ""),
        (SPACE, "a b.py:1 in `<module>`", "a b.py:1 in `<module>`"),
        (NEIGHBOUR, "x.py:1 in `f`", "x.py:1 in `f`"),
        (OURS, "", ""),
    ],
)
def test_the_place_is_that_of_the_thread_that_crashed_or_hung(stack: str, fatal: str, hung: str) -> None:
    known = evidence(stack=stack, main_thread=0x7F2222222222)
    assert (fatal_place(known), hang_place(known)) == (fatal, hung)


@pytest.mark.parametrize(
    ("raw", "status", "name"),
    [
        (None, ExitStatus(), None),
        (0, ExitStatus(code=0), None),
        (3 << 8, ExitStatus(code=3), None),
        (signal.SIGSEGV, ExitStatus(signal=11), "SIGSEGV"),
        (signal.SIGABRT | 0x80, ExitStatus(signal=6), "SIGABRT"),  # with a core dump
        (40, ExitStatus(signal=40), "signal 40"),
    ],
)
def test_a_wait_status_becomes_a_code_or_a_signals_name(
    raw: int | None, status: ExitStatus, name: str | None
) -> None:
    assert ExitStatus.from_wait(raw) == status
    assert status.signal_name == name


def test_the_wait_status_of_a_real_process_is_read_as_the_kernel_means_it() -> None:
    pid = os.fork()
    if pid == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    _, raw = os.waitpid(pid, 0)
    assert ExitStatus.from_wait(raw).signal_name == "SIGKILL"


def test_what_a_worker_does_between_two_calls_is_known_by_its_present_names() -> None:
    own = {*vars(serve.Channel), *vars(serve.Caller)}
    assert set(_WAITS) <= own
