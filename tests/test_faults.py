"""Plugins that break, as one table. What holds for each of them is in `zoo`; the hostile ones are in test_zoo."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
from collections import Counter
from pathlib import Path

import pytest
from http_support import client_of
from support import descendants, held, hosting, until, write_honest
from zoo import FAULTS, Fault, Moment, at, breaks, call, fork_server, killed, next_state, rows, start

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
        "^import_lacks_module → detection.boxes: holdfast_no_such_package is missing at detection/boxes.py:3",
        state="UNAVAILABLE",
    ),
    start(
        "import_lacks_library",
        "package_missing",
        "^import_lacks_library → ctypes: libnothere.so.9 is missing at plugin.py:5 in `<module>`; install",
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
    call("returns_itself_in_a_list", "result_invalid", "ValueError", "it is nested deeper than 256"),
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


@pytest.mark.parametrize("fault", rows(TABLE))
async def test_a_plugin_that_breaks_is_named_and_removed_and_the_others_stay_in_service(
    fault: Fault, plugins: Path, data_dir: Path
) -> None:
    await breaks(fault, plugins, data_dir)


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
