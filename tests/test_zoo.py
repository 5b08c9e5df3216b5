"""Plugins that mean it: a table of hostile ones, beside that of those that only break (test_faults).

What holds for each row is in `zoo`. Some attacks do not come to anything: then the plugin is as it was before.
"""

from __future__ import annotations

import asyncio
import math
import mmap
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs
from support import descendants, held, hosting, next_event, until, write_honest, write_plugin
from zoo import FAULTS, Fault, Moment, above, after, at, breaks, call, rows, service, spares

from engine.sandbox import wire

PROCESSES, SIGNALS, CHANNEL = "hostile_processes", "hostile_signals", "hostile_channel"
VALUES, PATCHES = "hostile_values", "hostile_patches"
MEMORY = "takes_memory"
BROKEN = "Holdfast's own part of the worker failed"
SILENT = "in code that did not let Python tell where"


def breed(tool: str, code: str, kind: str, *reason: str) -> Fault:
    return call(tool, code, kind, *reason, folder=PROCESSES)


def sign(tool: str, code: str, kind: str, *reason: str) -> Fault:
    return call(tool, code, kind, *reason, folder=SIGNALS)


def speak(tool: str, *reason: str) -> Fault:
    return call(tool, "protocol_error", "ProtocolError", *reason, folder=CHANNEL)


def take(tool: str, *reason: str) -> Fault:
    return call(tool, "memory_limit", "MemoryLimit", rf"used \d+ MiB during `{tool}`", *reason, folder=MEMORY)


def litter(tool: str, *reason: str) -> Fault:
    return call(tool, "scratch_limit", "ScratchLimit", *reason, r"raise .limits. scratch_mib", folder=MEMORY)


def value(tool: str, code: str, kind: str, *reason: str) -> Fault:
    return call(tool, code, kind, *reason, folder=VALUES)


def patch(tool: str, code: str, kind: str, *reason: str) -> Fault:
    return call(tool, code, kind, *reason, folder=PATCHES)


TABLE = [
    # Processes, threads, descriptors, and memory that no single process's limit sees.
    breed(
        "fork_bomb", "process_limit", "ProcessLimit", r"it had \d+ processes and threads during `fork_bomb`", "128"
    ),
    breed(
        "thread_bomb",
        "process_limit",
        "ProcessLimit",
        r"it had \d+ processes and threads",
        "raise .limits. processes",
    ),
    breed(
        "thread_bomb_of_large_stacks",
        "tool_exception",
        "RuntimeError",
        "can't start new thread",
        "in `thread_bomb_of_large_stacks`",
    ),
    breed("exhausts_descriptors", "tool_exception", "OSError", "Too many open files", "in `exhausts_descriptors`"),
    breed("leaves_a_daemon_and_exits", "worker_exit", "WorkerExit", "exited with status 9"),
    breed("leaves_a_deaf_daemon_and_hangs", "tool_timeout", "ToolTimeout", "ran past 0.3 s"),
    breed("maps_shared_memory", "memory_limit", "MemoryLimit", r"used \d+ MiB during `maps_shared_memory`"),
    breed("maps_a_memfd", "memory_limit", "MemoryLimit", r"used \d+ MiB during `maps_a_memfd`", "256 MiB"),
    after(
        "children_hold_memory_after_the_call",
        "memory_limit",
        r"used \d+ MiB while it was idle",
        folder=PROCESSES,
        moment=Moment.IDLE,
    ),
    take("slowly"),
    take("in_children"),
    take("by_writing_to_shared_pages"),
    take("by_a_second_thread", r"\d+ MiB of it shared memory"),
    take("by_letting_go_of_shared_pages", r"\d+ MiB of it shared memory"),
    take("by_mapping_dev_shm", r"\d+ MiB of it shared memory"),
    take("in_memfds", r"\d+ MiB of it shared memory"),
    take("in_memfds_of_a_child", r"\d+ MiB of it shared memory"),
    take("in_closed_memfds", r"\d+ MiB of it shared memory"),
    # Disk.
    litter("in_one_file", r"holds at least \d+ MiB during `in_one_file`: its limit is 64 MiB"),
    litter("in_many_files", r"holds at least 6\d MiB during `in_many_files`"),
    litter("in_empty_files", "holds at least 64 MiB during `in_empty_files`"),
    litter("in_an_unlinked_file", r"holds at least \d+ MiB"),
    litter("in_an_unlinked_mapping", r"holds at least \d+ MiB"),
    litter("in_an_unlinked_file_of_a_second_thread", r"holds at least \d+ MiB"),
    litter("too_deep", "cannot be measured, being nested too deep"),
    # Signals, native code, and every way not to come back.
    sign("stops_itself", "tool_timeout", "ToolTimeout", "`stops_itself` ran past 0.3 s"),
    sign(
        "kills_its_parent", "tool_exception", "PermissionError", "Operation not permitted", "in `kills_its_parent`"
    ),
    sign(
        "terminates_itself_by_raise", "worker_signal", "WorkerSignal", "^SIGABRT", "`terminates_itself_by_raise`"
    ),
    sign("sets_an_alarm", "worker_signal", "WorkerSignal", "^SIGALRM"),
    sign("answers_every_signal", "tool_timeout", "ToolTimeout", SILENT),
    sign("blocks_every_signal", "tool_timeout", "ToolTimeout", SILENT),
    sign(
        "signalled_itself_before_it_hung",
        "tool_timeout",
        "ToolTimeout",
        r"at plugin.py:\d+ in `signalled_itself_before_it_hung`",
    ),
    sign("holds_the_gil", "tool_timeout", "ToolTimeout", at("PyDLL", "holds_the_gil")),
    sign(
        "loops_in_a_regular_expression",
        "tool_timeout",
        "ToolTimeout",
        at("re.match", "loops_in_a_regular_expression"),
    ),
    sign(
        "recurses",
        "tool_exception",
        "RecursionError",
        "maximum recursion depth",
        at("self.recurses()", "recurses"),
    ),
    sign("recurses_past_the_stack", "worker_signal", "WorkerSignal", "^SIGSEGV", at("sorted(", "<lambda>")),
    sign("hangs_in_a_collection", "tool_timeout", "ToolTimeout", "in `<lambda>`"),
    sign("cancels_itself", "tool_exception", "asyncio.exceptions.CancelledError", "in `cancels_itself`"),
    sign(
        "blocks_its_event_loop", "tool_exception", "RuntimeError", "already running", "in `blocks_its_event_loop`"
    ),
    after(
        "exits_in_a_thread_later", "worker_exit", "status 7 while it was idle", folder=SIGNALS, moment=Moment.IDLE
    ),
    # What is written to the channel itself, and done to the arenas.
    speak("says_garbage", "a frame that is no message"),
    speak("announces_too_much", "announced a frame of 4294967295 bytes; at most 67108864 may come"),
    call("breaks_off_in_a_frame", "worker_exit", "WorkerExit", "exited with status 0", folder=CHANNEL),
    speak("swallows_its_answer", "a frame that is no message"),
    speak("greets_again", "it sent Hello out of turn"),
    speak("is_ready_again", "it sent Ready out of turn"),
    speak("goes_back_to_its_start", "it sent StartFailed out of turn"),
    speak("speaks_of_another_call", "it spoke of call 77, which does not run"),
    speak("answers_before_it_began", "it spoke of call 2, which does not run"),
    after("answers_twice", "protocol_error", "it spoke of call 1, which does not run", folder=CHANNEL),
    speak("claims_all_of_the_arena", "it holds on to parts of the arena that there are not"),
    speak("logs_40_mb", "a frame that is no message", "length <= 65536"),
    after("forks_behind_pythons_back", "protocol_error", "it spoke of call 1, which does not run", folder=CHANNEL),
    speak("shuts_the_channel_down", "it closed the descriptors that connect it with the engine"),
    speak("puts_another_file_there", "it closed the descriptors that connect it with the engine"),
    speak("speaks_of_a_place_outside_the_arena", "a value that does not decode", "outside its 268435456 bytes"),
    speak("names_an_extension_that_is_none", "a value that does not decode", "unknown extension 99"),
    speak("forges_a_message_of_40_mb", "a frame that is no message", "length <= 65536"),
    call("forges_a_kind", "tool_exception", "Oops", "`forges_a_kind` raised Oops: what a kind", folder=CHANNEL),
    call("shrinks_the_arena", "tool_exception", "PermissionError", "in `shrinks_the_arena`", folder=CHANNEL),
    call("closes_the_arena", "result_invalid", "OSError", "Bad file descriptor", folder=CHANNEL),
    # Values that have no form, and exceptions that do not want to be told.
    value("returns_a_lone_surrogate", "result_invalid", "UnicodeEncodeError", "surrogates not allowed"),
    value("returns_10_million_items", "result_too_large", "ResultTooLarge", "10000005 bytes of plain values"),
    value("returns_10_000_levels", "result_invalid", "ValueError", "cannot be sent: it is nested deeper than 256"),
    value("returns_an_integer_of_100_digits", "result_invalid", "OverflowError", "returned what cannot be sent"),
    value("returns_what_lies_about_itself", "result_invalid", "SystemExit", "returned what cannot be sent"),
    value(
        "raises_100_mb", "tool_exception", "ValueError", r"x{2000}… \(100000000 characters\)", "in `raises_100_mb`"
    ),
    value("raises_a_lone_surrogate", "tool_exception", r"plugin.Odd\\ud800", r"mess \\ud800 age"),
    value("raises_a_cycle", "tool_exception", "ValueError", "ValueError: first", "in `raises_a_cycle`"),
    value("raises_a_group", "tool_exception", "ExceptionGroup", r"all at once \(2 sub-exceptions\)"),
    value("raises_a_base_exception", "tool_exception", "BaseException", "below them all"),
    value("raises_keyboard_interrupt", "tool_exception", "KeyboardInterrupt", "in `raises_keyboard_interrupt`"),
    value("raises_generator_exit", "tool_exception", "GeneratorExit", "no more"),
    value("raises_what_hides_its_class", "tool_exception", "an exception", "raised an exception"),
    # What the worker itself may use, replaced.
    patch("patches_builtins", "worker_exit", "WorkerExit", BROKEN),
    patch("patches_socket", "worker_exit", "WorkerExit", BROKEN, "RuntimeError: patched"),
    patch("traces_everything", "worker_exit", "WorkerExit", BROKEN, "RuntimeError: patched"),
    patch("patches_msgspec", "result_invalid", "RuntimeError", "returned what cannot be sent: patched"),
]


@pytest.mark.parametrize("fault", rows(TABLE))
async def test_a_hostile_plugin_is_named_and_removed_and_the_others_stay_in_service(
    fault: Fault, plugins: Path, data_dir: Path
) -> None:
    await breaks(fault, plugins, data_dir)


def numbers(got: Any) -> bool:
    return math.isnan(got[0]) and got[1:] == [math.inf, -math.inf]


HARMLESS: list[tuple[str, str, Callable[[Any], bool]]] = [
    (PROCESSES, "holds_all_descriptors", lambda got: got == "held"),
    (PROCESSES, "returns_twice", lambda got: got == "both of us"),
    (MEMORY, "shares_memory", lambda got: got == 2 * 120 * (150 << 20) // mmap.PAGESIZE),
    (MEMORY, "keeps_within_its_scratch", lambda got: got == 400 << 20),
    (PROCESSES, "shares_pages_with_children", lambda got: got == "shared"),
    (SIGNALS, "raises_in_a_thread", lambda got: got == "raised there, not here"),
    (CHANNEL, "floods_with_frames", lambda got: got == "flooded"),
    (CHANNEL, "scribbles_over_its_answer", lambda got: len(got) == 1 << 20),
    (VALUES, "returns_nan_and_infinity", numbers),
    (VALUES, "returns_integer_keys", lambda got: got == {1: "one", -2: "minus two"}),
    (VALUES, "logs_a_lone_surrogate", lambda got: got == "logged"),
    (VALUES, "reports_no_number", lambda got: got == "reported"),
    (VALUES, "changes_its_surroundings", lambda got: got == "changed"),
    (PATCHES, "patches_json", lambda got: got == "patched"),
    (PATCHES, "patches_os", lambda got: got == "patched"),
    (PATCHES, "patches_threads_and_the_collector", lambda got: got == "patched"),
    (PATCHES, "empties_the_modules", lambda got: got == "emptied"),
]


@pytest.mark.contract(1, 4)
@pytest.mark.parametrize(("folder", "tool", "fits"), HARMLESS, ids=[tool for _, tool, _ in HARMLESS])
async def test_what_harms_nobody_is_answered_and_leaves_the_plugin_in_service(
    folder: str, tool: str, fits: Callable[[Any], bool], plugins: Path, data_dir: Path
) -> None:
    before, processes = held(), descendants()
    shutil.copytree(FAULTS / folder, plugins / folder)
    write_honest(plugins)
    with capture_logs() as logs:
        async with hosting(plugins, data_dir) as engine:
            async with service(engine, folder):
                for _ in range(2):
                    outcome = await engine.run(folder, tool)
                    assert outcome.ok, outcome
                    assert fits(outcome.value)
                finished = await next_event(engine, "plugin.call.finished", folder)
                assert finished.data.ok  # type: ignore[union-attr]
            health = engine.health(folder)
            assert (health.state, health.reason) == ("RUNNING", None)
            again = await engine.restart(folder)
            assert (again.state, again.incarnation, again.reason) == ("INITIALIZED", 2, None)
            assert not {**engine.faults, **engine.bus.faults, **engine.log.faults}
            served = {engine.health("honest").pid, again.pid}
            await until(lambda: descendants() == above(engine) | spares() | served)
            await until(lambda: len(list(engine.scratch_root.glob(f"{folder}-*"))) == 1)
    assert not [entry for entry in logs if entry["log_level"] == "error"]
    await until(lambda: descendants() == processes)
    assert held() == before


@pytest.mark.contract(2, 4)
@pytest.mark.parametrize(
    "tool",
    [
        "hangs_at_exit",
        "collects_for_ever_at_exit",
        "raises_at_exit",
        "leaves_a_thread_running",
        "kills_itself_at_exit",
    ],
)
async def test_a_plugin_that_will_not_go_is_ended_after_its_grace_and_is_not_to_blame(
    tool: str, plugins: Path, data_dir: Path
) -> None:
    before, processes = held(), descendants()
    shutil.copytree(FAULTS / SIGNALS, plugins / SIGNALS)
    write_honest(plugins)
    async with hosting(plugins, data_dir, stop_grace_s=0.2) as engine:
        assert (await engine.run(SIGNALS, tool)).ok
        async with service(engine, SIGNALS), asyncio.timeout(5):
            again = await engine.restart(SIGNALS)
        assert (again.state, again.incarnation, again.reason) == ("INITIALIZED", 2, None)
        exited = await next_event(engine, "worker.exited", SIGNALS)
        assert exited.data.verdict == "stopped"  # type: ignore[union-attr]
        assert (await engine.run(SIGNALS, tool)).ok
    assert (held(), descendants()) == (before, processes)


OWN = "def detect(): return 'own'\n"
USES = """
import {name}
class Plugin:
    def __init__(self, context): pass
    def validate(self): pass
    def work(self) -> str: return {name}.detect()
"""
TAKEN = ["json", "types", "socket", "signal", "os", "re", "logging", "asyncio", "typing", "threading"]
FREE = ["colorsys", "wave", "sched", "this"]


@pytest.mark.contract(3)
@pytest.mark.parametrize("name", TAKEN)
async def test_a_module_that_a_standard_one_hides_is_named(name: str, plugins: Path, data_dir: Path) -> None:
    folder = write_plugin(
        plugins, "uses", USES.format(name=name).replace("import", f"from {name} import detect\nimport"), ["work"]
    )
    (folder / f"{name}.py").write_text(OWN)
    folder = write_plugin(plugins, "is", "", ["work"], head="")
    manifest = folder / "plugin.toml"
    manifest.write_text(manifest.read_text().replace("plugin:Plugin", f"{name}:Plugin"))
    (folder / f"{name}.py").write_text(USES.format(name="math"))
    write_honest(plugins)
    async with hosting(plugins, data_dir) as engine:
        uses, itself = engine.health("uses"), engine.health("is")
        assert (uses.state, uses.reason_code) == ("FAILED", "import_error")
        assert f"that is the standard library's `{name}`, not the plugin's own: rename the plugin's" in (
            uses.reason or ""
        )
        assert (itself.state, itself.reason_code) == ("FAILED", "import_error")
        assert f"the entry `{name}:Plugin` is a module of the standard library; rename {name}.py" in (
            itself.reason or ""
        )
        assert (await engine.run("honest", "echo")).ok


async def test_a_module_named_like_a_standard_one_that_nobody_uses_is_the_plugins_own(
    plugins: Path, data_dir: Path
) -> None:
    for name in FREE:
        (write_plugin(plugins, f"uses_{name}", USES.format(name=name), ["work"]) / f"{name}.py").write_text(OWN)
    async with hosting(plugins, data_dir) as engine:
        for name in FREE:
            assert (await engine.run(f"uses_{name}", "work")).value == "own"


async def test_a_worker_that_speaks_another_protocol_is_refused(
    plugins: Path, data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wire, "PROTOCOL", wire.PROTOCOL + 1)  # in the engine; its workers are other processes
    write_honest(plugins)
    async with hosting(plugins, data_dir) as engine:
        health = engine.health("honest")
        assert (health.state, health.reason_code) == ("FAILED", "protocol_error")
        assert f"it speaks protocol {wire.PROTOCOL - 1}, the engine {wire.PROTOCOL}" in (health.reason or "")
        await until(lambda: descendants() == above(engine) | spares())
    assert os.getpid() not in descendants()
