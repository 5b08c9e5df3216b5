"""Plugins that break, as one table: fault × moment → state, reason, the caller's answer, the verdict.

Each row runs a folder of tests/faults in a real worker process beside an honest plugin. One test body holds
for all of them: the honest plugin's calls and every health read succeed throughout, the reason says what broke
and where, later callers are told the same, and nothing of the worker is left.
"""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import signal
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from enum import StrEnum
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from http_support import client_of
from structlog.testing import capture_logs
from support import descendants, hosting, next_event, open_descriptors, until, write_honest

from engine import Engine
from engine.outcome import Broke, Completed, Outcome, Refused

FAULTS = Path(__file__).parent / "faults"
STATES = {"LOADED", "INITIALIZED", "RUNNING", "FAILED", "UNAVAILABLE"}


class Moment(StrEnum):
    """When the fault comes."""

    START = "start"  # import, __init__, validate()
    CALL = "call"  # the tool breaks by itself
    KILLED = "killed"  # while the tool runs, the test sends the worker a signal
    IDLE = "idle"  # the call was answered; the test then sets the fault off
    IDLE_KILLED = "idle_killed"  # likewise, with a signal


class Fault(NamedTuple):
    """One row. `reason` holds regular expressions that the reason must match, each."""

    folder: str
    tool: str
    moment: Moment
    code: str
    reason: tuple[str, ...]
    error_type: str = "NotInService"
    state: str = "FAILED"
    signal: signal.Signals | None = None

    def __str__(self) -> str:
        name = self.folder if self.moment is Moment.START else self.tool
        return f"{name}-{self.signal.name}-{self.moment}" if self.signal else name


def start(folder: str, code: str, *reason: str, state: str = "FAILED") -> Fault:
    return Fault(folder, "work", Moment.START, code, reason, state=state)


def call(tool: str, code: str, error_type: str, *reason: str, folder: str = "breaks_on_call") -> Fault:
    return Fault(folder, tool, Moment.CALL, code, reason, error_type)


def killed(moment: Moment, number: signal.Signals, *reason: str) -> Fault:
    tool = "waits" if moment is Moment.KILLED else "works"
    kind = "KilledExternally" if moment is Moment.KILLED else ""
    return Fault("breaks_on_call", tool, moment, "killed_externally", reason, kind, signal=number)


def at(line: str, function: str, file: str = "plugin.py") -> str:
    """The place of the line in the plugin's code that holds `line`, as reasons write it."""
    return f"AT {file} {function} {line}"


TABLE = [
    # Import.
    start(
        "import_raises", "import_error", "import raised RuntimeError: the licence server is down at plugin.py:3"
    ),
    start("import_exits", "import_error", "import raised SystemExit: nothing to do here at plugin.py:5"),
    start("import_hangs", "start_timeout", r"import ran past 0.5 s at plugin.py:7 in `wait_for_nobody`"),
    start("import_segfaults", "worker_signal", "SIGSEGV at plugin.py:7 in `read_nowhere` during import"),
    start("import_syntax_error", "import_error", "import raised SyntaxError", r"at broken_syntax.py:4"),
    start("import_takes_memory", "memory_limit", "import ran out of memory at plugin.py:3", "limit is 256 MiB"),
    start(
        "import_lacks_own_module", "import_error", "ModuleNotFoundError", "detection.forgotten", "__init__.py:3"
    ),
    start("class_missing", "import_error", "plugin.py has no class `Plugin`"),
    start(
        "import_lacks_module",
        "package_missing",
        "^import_lacks_module → detection.boxes: holdfast_no_such_package is missing; install",
        state="UNAVAILABLE",
    ),
    start(
        "import_lacks_library",
        "package_missing",
        "^import_lacks_library → ctypes: libnothere.so.9 is missing; install",
        state="UNAVAILABLE",
    ),
    # __init__ and validate().
    start("init_raises", "init_error", "__init__ raised KeyError: 'truck' at plugin.py:6 in `__init__`"),
    start("init_hangs", "start_timeout", r"__init__ ran past 0.5 s at plugin.py:\d in `__init__`"),
    start(
        "init_swallows_failure", "validate_failed", r"validate\(\) raised RuntimeError: the model was not loaded"
    ),
    start(
        "validate_raises", "validate_failed", r"validate\(\) raised ValueError: the weights are of another model"
    ),
    start("validate_returns_false", "validate_failed", r"validate\(\) returned False", "raise an exception there"),
    start("validate_hangs", "start_timeout", r"validate\(\) ran past 0.5 s at plugin.py:11 in `validate`"),
    start("validate_missing", "validate_failed", "plugin:Plugin has no method `validate`"),
    # Tools that cannot be served.
    start("tool_missing", "manifest_invalid", r"\[tools.work\] has no method `work` on plugin:Plugin"),
    start(
        "hint_unresolved", "manifest_invalid", "hints of `work` do not resolve: name 'Rectangle' is not defined"
    ),
    start(
        "hint_without_schema", "manifest_invalid", "a type hint of `work` has no JSON Schema", "threading.Event"
    ),
    # A call: Python exceptions, and ways out of Python.
    call("raises", "tool_exception", "ValueError", "ValueError: frame 7 has no pixels", at("frame 7", "raises")),
    call(
        "raises_without_message",
        "tool_exception",
        "plugin.Unspeakable",
        "<no message: its __str__ raised RuntimeError>",
        at("raise Unspeakable", "raises_without_message"),
    ),
    call("raises_memory_error", "memory_limit", "MemoryError", at("raise MemoryError", "raises_memory_error")),
    call("exits", "tool_exception", "SystemExit", "`exits` raised SystemExit: 3", at("sys.exit(3)", "exits")),
    call("exits_silently", "worker_exit", "WorkerExit", "exited with status 0 during `exits_silently`"),
    call("async_raises", "tool_exception", "KeyError", "KeyError: 'track 12'", at("track 12", "async_raises")),
    # Native faults and signals.
    call(
        "reads_address_zero",
        "worker_signal",
        "WorkerSignal",
        "^SIGSEGV",
        "invalid memory access",
        at("string_at(0)  # now", "reads_address_zero"),
    ),
    call("aborts", "worker_signal", "WorkerSignal", "^SIGABRT", at("os.abort()", "aborts")),
    call(
        "kills_itself", "worker_signal", "WorkerSignal", "sent SIGKILL to itself", at("SIGKILL)", "kills_itself")
    ),
    call("signals_itself", "worker_signal", "WorkerSignal", "sent SIGSEGV", at("SIGSEGV)", "signals_itself")),
    # Time.
    call("loops", "tool_timeout", "ToolTimeout", r"`loops` ran past 0.5 s at plugin.py:\d+ in `loops`"),
    call("sleeps_in_c", "tool_timeout", "ToolTimeout", "ran past 0.5 s", at("LIBC.sleep", "sleeps_in_c")),
    # Memory.
    call("takes_4_gib", "memory_limit", "MemoryError", "256 MiB", at("4 << 30", "takes_4_gib")),
    # Either limit may be the first to notice: the allocation that fails, or the watch from outside.
    call("leaks", "memory_limit", "Memory(Error|Limit)", "256 MiB", "during `leaks`|`leaks` ran out of memory at"),
    call("leaks_objects", "memory_limit", "Memory(Error|Limit)", "during `leaks_objects`|`leaks_objects` ran out"),
    call("spreads_over_children", "memory_limit", "MemoryLimit", r"used \d+ MiB during `spreads_over_children`"),
    # Results.
    call("returns_a_lock", "result_invalid", "TypeError", "`returns_a_lock` returned", "type `lock`"),
    call("returns_bytes_keys", "result_invalid", "TypeError", "a key of type `bytes` has no JSON form"),
    call("returns_itself_in_a_list", "result_invalid", "RecursionError", "`returns_itself_in_a_list` returned"),
    call("work", "result_too_large", "ResultTooLarge", "more than 268435456 bytes", folder="returns_2_gib"),
    # Descriptors, output, processes.
    call("prints_100_mb_and_breaks", "tool_exception", "RuntimeError", "printed enough"),
    call("closes_descriptors", "protocol_error", "ProtocolError", "it closed the descriptors", "to descriptor 2"),
    call("leaves_grandchildren", "tool_exception", "RuntimeError", "the daemons are on their own now"),
    # Streams.
    call("stream_breaks", "tool_exception", "ValueError", "frame 3 is torn", at("frame 3", "stream_breaks")),
    call("async_stream_breaks", "tool_exception", "ValueError", at("frame 2", "async_stream_breaks")),
    call("stream_hangs", "tool_timeout", "ToolTimeout", "ran past 0.5 s", "in `stream_hangs`"),
    # Between calls, and from outside.
    Fault(
        "breaks_on_call",
        "breaks_in_a_thread_later",
        Moment.IDLE,
        "worker_signal",
        ("^SIGSEGV", "while it was idle", at("string_at(0)  # later", "fault")),
    ),
    killed(Moment.KILLED, signal.SIGTERM, "^SIGTERM from outside the engine", "during `waits`"),
    killed(Moment.KILLED, signal.SIGKILL, "^SIGKILL from outside the engine", "during `waits`"),
    killed(Moment.IDLE_KILLED, signal.SIGTERM, "^SIGTERM from outside the engine", "while it was idle"),
    killed(Moment.IDLE_KILLED, signal.SIGKILL, "^SIGKILL from outside the engine", "while it was idle"),
    killed(Moment.IDLE_KILLED, signal.SIGSEGV, "^SIGSEGV from outside the engine", "while it was idle"),
]


LIMITS = {"tool_timeout", "start_timeout", "memory_limit"}
ROWS = [
    pytest.param(fault, id=str(fault), marks=pytest.mark.contract(1, 2, 3, 4, *(6,) * (fault.code in LIMITS)))
    for fault in TABLE
]


@pytest.mark.parametrize("fault", ROWS)
async def test_a_plugin_that_breaks_is_named_and_removed_and_the_others_stay_in_service(
    fault: Fault, plugins: Path, data_dir: Path
) -> None:
    before, processes = held(), descendants()
    shutil.copytree(FAULTS / fault.folder, plugins / fault.folder)
    write_honest(plugins)
    with capture_logs() as logs:
        async with hosting(plugins, data_dir) as engine:
            async with service(engine, fault.folder):
                outcome = await set_off(engine, fault)
                exited = await next_event(engine, "worker.exited", fault.folder)
                await next_state(engine, fault.folder, {fault.state})
            health = engine.health(fault.folder)
            assert (health.state, health.reason_code) == (fault.state, fault.code)
            assert health.reason is not None
            for pattern in fault.reason:
                assert re.search(place(fault, pattern), health.reason), health.reason
            assert exited.data.verdict == fault.code  # type: ignore[union-attr]
            answered(outcome, fault, health.reason)
            await refused(engine, fault, health.reason)
            await nothing_left(engine, fault.folder)

            again = await engine.restart(fault.folder)
            assert again.incarnation == 2
            if fault.moment is Moment.START:
                assert (again.state, again.reason_code, again.reason) == (fault.state, fault.code, health.reason)
            else:
                assert (again.state, again.reason) == ("INITIALIZED", None)
            assert (await engine.run("honest", "echo")).ok
            assert not {**engine.faults, **engine.bus.faults, **engine.log.faults}
    assert not [entry for entry in logs if entry["log_level"] == "error"]
    await until(lambda: descendants() == processes)
    assert held() == before


async def test_losing_the_fork_server_fails_every_plugin_and_a_restart_brings_it_back(
    plugins: Path, data_dir: Path
) -> None:
    before, processes = held(), descendants()
    write_honest(plugins)
    write_honest(plugins, "other")
    async with hosting(plugins, data_dir) as engine:
        os.kill(fork_server(engine), signal.SIGKILL)
        for name in ("honest", "other"):
            health = await next_state(engine, name, {"FAILED"})
            assert health.reason_code == "killed_externally"
            assert "restart the plugin" in health.reason
            assert not (await engine.run(name, "echo")).ok
        await until(lambda: descendants() == processes)
        for name in ("honest", "other"):
            assert (await engine.restart(name)).state == "INITIALIZED"
            assert (await engine.run(name, "echo", {"text": "again"})).value == "again"
    assert held() == before


async def test_an_engine_that_lost_its_fork_server_still_leaves_nothing_behind(
    plugins: Path, data_dir: Path
) -> None:
    before, processes = held(), descendants()
    write_honest(plugins)
    async with hosting(plugins, data_dir) as engine:
        os.kill(fork_server(engine), signal.SIGKILL)
        await next_state(engine, "honest", {"FAILED"})
    assert (held(), descendants()) == (before, processes)
    assert not list((data_dir / "scratch").iterdir())


OVER_HTTP = [
    ("import_segfaults", "work", 503, "worker_signal"),
    ("import_lacks_module", "work", 503, "package_missing"),
    ("breaks_on_call", "raises_without_message", 502, "tool_exception"),
    ("breaks_on_call", "reads_address_zero", 502, "worker_signal"),
    ("breaks_on_call", "loops", 504, "tool_timeout"),
    ("breaks_on_call", "leaks", 502, "memory_limit"),
    ("breaks_on_call", "closes_descriptors", 502, "protocol_error"),
    ("returns_2_gib", "work", 502, "result_too_large"),
]


@pytest.mark.contract(4)
@pytest.mark.parametrize(("folder", "tool", "status", "code"), OVER_HTTP)
async def test_while_a_plugin_breaks_no_health_route_answers_5xx_and_other_calls_succeed_over_http(
    folder: str, tool: str, status: int, code: str, plugins: Path, data_dir: Path
) -> None:
    shutil.copytree(FAULTS / folder, plugins / folder)
    write_honest(plugins)
    async with hosting(plugins, data_dir) as engine, client_of(engine) as client:
        seen: Counter[tuple[str, int]] = Counter()
        over = False

        async def serve() -> None:
            while not over:
                for path in ("/v1/plugins", f"/v1/plugins/{folder}/health", f"/v1/plugins/{folder}", "/readyz"):
                    async with client.get(path) as answer:
                        seen[path, answer.status] += 1
                        assert await answer.json(content_type=None) is not None
                async with client.post("/v1/plugins/honest/tools/echo/run", json={"text": "still here"}) as answer:
                    seen["honest", answer.status] += 1
                    assert (await answer.json())["value"] == "still here"

        serving = asyncio.create_task(serve())
        answers = []
        for _ in range(2):
            async with client.post(f"/v1/plugins/{folder}/tools/{tool}/run", json={}) as answer:
                answers.append((answer.status, (await answer.json())["reason_code"]))
        over = True
        await serving
        assert answers == [(status, code), (503, code)]
        assert {code for _, code in seen} == {200}


@asynccontextmanager
async def service(engine: Engine, broken: str) -> AsyncIterator[None]:
    """While this lasts, the honest plugin is called and all health is read, and every one of these succeeds."""
    over = False
    rounds = 0

    async def serve() -> None:
        nonlocal rounds
        while not over:
            outcome = await engine.run("honest", "echo", {"text": str(rounds)})
            assert outcome.ok, outcome
            assert outcome.value == str(rounds)
            states = {health.name: health.state for health in engine.plugins()}
            assert states.keys() == {"honest", broken}
            assert states["honest"] == "RUNNING"
            assert states[broken] in STATES
            assert engine.health(broken).name == broken
            rounds += 1

    task = asyncio.create_task(serve())
    try:
        yield
    finally:
        over = True
        await task
    assert rounds


async def set_off(engine: Engine, fault: Fault) -> Outcome:
    """Bring the fault about; returns what the caller was told."""
    pid = engine.health(fault.folder).pid
    if fault.moment is Moment.KILLED:
        assert fault.signal is not None
        assert pid is not None
        running = asyncio.create_task(engine.run(fault.folder, fault.tool))
        await next_event(engine, "plugin.call.started", fault.folder)
        os.kill(pid, fault.signal)
        return await running
    outcome = await engine.run(fault.folder, fault.tool)
    if fault.moment is Moment.IDLE:
        assert outcome.value is not None
        await asyncio.to_thread(Path(outcome.value).write_bytes, b"now")
    if fault.moment is Moment.IDLE_KILLED:
        assert fault.signal is not None
        assert pid is not None
        os.kill(pid, fault.signal)
    return outcome


def answered(outcome: Outcome, fault: Fault, reason: str) -> None:
    """The call that met the fault got the whole truth, or had been answered before."""
    if fault.moment in (Moment.IDLE, Moment.IDLE_KILLED):
        assert isinstance(outcome, Completed)
        return
    assert isinstance(outcome, Refused if fault.moment is Moment.START else Broke)
    assert outcome.reason_code == fault.code
    assert re.fullmatch(fault.error_type, outcome.error_type)
    assert outcome.state == fault.state
    assert reason in outcome.error


async def refused(engine: Engine, fault: Fault, reason: str) -> None:
    """Every later call is told why there is no service, without a worker."""
    for _ in range(2):
        later = await engine.run(fault.folder, fault.tool)
        assert isinstance(later, Refused)
        assert (later.reason_code, later.error_type, later.state) == (fault.code, "NotInService", fault.state)
        assert reason in later.error


async def nothing_left(engine: Engine, name: str) -> None:
    """No process below us but the fork server and the honest worker; no scratch folder of the plugin's."""
    honest = engine.health("honest").pid
    await until(lambda: descendants() == {fork_server(engine), honest})
    await until(lambda: not list(engine.scratch_root.glob(f"{name}-*")))


async def next_state(engine: Engine, name: str, states: set[str]) -> Any:
    """The plugin's health once it is in one of the states."""
    async for _ in engine.events():
        if engine.health(name).state in states:
            return engine.health(name)
    raise AssertionError(f"{name} never was {states}")


def place(fault: Fault, pattern: str) -> str:
    """A regular expression for a place given by what stands there: line numbers change, code does not."""
    if not pattern.startswith("AT "):
        return pattern
    _, file, function, line = pattern.split(" ", 3)
    lines = (FAULTS / fault.folder / file).read_text().splitlines()
    (number,) = [n for n, text in enumerate(lines, 1) if line in text]
    return re.escape(f"{file}:{number} in `{function}`")


def fork_server(engine: Engine) -> int:
    process = engine._spawner._process
    assert process is not None
    return process.pid


def held() -> Counter[str]:
    """What this process holds open, by kind: how many sockets, pipes, memfds, and of each file."""
    kinds = (re.sub(r"^\d+ → ", "", entry) for entry in open_descriptors())
    return Counter(re.sub(r":\[\d+\]$", "", kind) for kind in kinds)
