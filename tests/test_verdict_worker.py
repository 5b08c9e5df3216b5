"""The engine's own part of a worker when it goes wrong: every start and every death ends in a verdict still."""

from __future__ import annotations

import asyncio
import errno
import os
import signal
from pathlib import Path
from typing import Any, ClassVar

import msgspec
import pytest
from support import (
    FINDS_ITS_CHANNEL,
    descendants,
    held,
    hosting,
    next_event,
    only_worker,
    settings_for,
    until,
    write_honest,
    write_plugin,
)
from zoo import fork_server, next_state, spares, the_spare

from engine import Engine
from engine.outcome import Broke, Refused
from engine.sandbox import calls, host, launcher, shm, wire
from engine.sandbox.cgroup import End
from engine.sandbox.channel import ProtocolBreach
from engine.sandbox.limits import MemoryWatch
from engine.sandbox.spawner import SpawnFailed
from engine.sandbox.stack import StackPipe
from engine.sandbox.values import MAX_VALUE_BYTES
from engine.sandbox.verdict import Ending, stage_name
from engine.startup import _Observer
from events.envelope import PluginLog

SPEAKS = """
def say(data):
    while data:
        data = data[os.write(CHANNEL, data):]
class Plugin:
    def __init__(self, context): ...
    def validate(self): say(bytes.fromhex(%r))
    def work(self, size: int):
        # Result(1, a text of that size): an array of tag, call_id and value.
        body = b"\\x93\\x17\\x01\\xdb" + struct.pack("!I", size) + b"x" * size
        say(struct.pack("!I", len(body)) + body)
"""
READY = {
    "it has other tools than its manifest": wire.Ready({"other": wire.ToolInfo("{}")}),
    "the schema of a tool is no JSON": wire.Ready({"work": wire.ToolInfo("{")}),
    "the schema of a tool is no object": wire.Ready({"work": wire.ToolInfo("[]")}),
}
# What a worker notes of how far it came lies behind its results, where a plugin can write as well.
NOTES = """
import os, struct
ARENA_OUT = 104
def note(number): os.pwrite(ARENA_OUT, struct.pack("<Q", number), os.fstat(ARENA_OUT).st_size - 64)
class Plugin:
    def __init__(self, context):
        %s
        os._exit(3)
    def validate(self): ...
    def work(self): ...
"""
EXITS = """
import os
class Plugin:
    def __init__(self, context): ...
    def validate(self): ...
    def work(self): os._exit(3)
"""
HANGS = """
import threading
class Plugin:
    def __init__(self, context): {init}
    def validate(self): ...
    def work(self): threading.Event().wait()
"""


@pytest.mark.contract(8)
async def test_a_worker_that_lies_about_its_tools_is_in_breach(plugins: Path, data_dir: Path) -> None:
    for number, ready in enumerate(READY.values()):
        write_plugin(plugins, f"liar_{number}", FINDS_ITS_CHANNEL + SPEAKS % wire.frame(ready).hex(), ["work"])
    async with hosting(plugins, data_dir) as engine:
        for number, words in enumerate(READY):
            health = engine.health(f"liar_{number}")
            assert (health.state, health.reason_code) == ("FAILED", "protocol_error")
            assert words in (health.reason or "")


@pytest.mark.parametrize(
    ("does", "doing"),
    [
        ("pass", "during __init__"),
        *((f"note({wire.note_of(stage)})", f"during {stage_name(stage)}") for stage in wire.STAGES),  # it may lie
        ("note(0)", "during its start"),
        ("note(3)", "during its start"),
        (f"note({wire.note_of('tools') + 1})", "during its start"),
        ("note(2**64 - 1)", "during its start"),
        ("os.close(ARENA_OUT)", "during __init__"),
    ],
)
async def test_how_far_a_start_came_is_read_from_what_the_worker_noted(
    does: str, doing: str, plugins: Path, data_dir: Path
) -> None:
    write_plugin(plugins, "notes", NOTES % does, ["work"])
    async with hosting(plugins, data_dir) as engine:
        health = engine.health("notes")
        assert (health.state, health.reason_code) == ("FAILED", "worker_exit")
        assert f"status 3 {doing}" in (health.reason or "")


async def test_a_plugin_that_closed_its_arena_serves_and_what_it_had_noted_is_taken_for_no_call(
    plugins: Path, data_dir: Path
) -> None:
    code = """
    import os
    os.close(104)
    class Plugin:
        def __init__(self, context): ...
        def validate(self): ...
        def work(self, code: int) -> int:
            if code: os._exit(code)
            return 1
    """
    write_plugin(plugins, "closes", code, ["work"])
    async with hosting(plugins, data_dir) as engine:
        assert (await engine.run("closes", "work", {"code": 0})).value == 1  # a short call: others are sent ahead
        broke, *behind = await asyncio.gather(*(engine.run("closes", "work", {"code": 3}) for _ in range(3)))
        assert isinstance(broke, Broke)
        assert [type(outcome) for outcome in behind] == [Refused, Refused]


async def test_a_plugin_that_closes_the_arena_of_its_arguments_fails_while_it_is_started(
    plugins: Path, data_dir: Path
) -> None:
    write_plugin(plugins, "closes", NOTES.replace("os._exit(3)", "") % "os.close(103)", ["work"])
    async with hosting(plugins, data_dir) as engine:
        health = engine.health("closes")
        assert health.state == "FAILED"
        assert "during reading its tools" in (health.reason or "")


async def test_a_death_after_its_start_is_no_stage_of_it(plugins: Path, data_dir: Path) -> None:
    code = """
    import os, threading
    class Plugin:
        def __init__(self, context): self.scratch = context.scratch
        def validate(self): ...
        def work(self): ...
        def __getattribute__(self, name):
            if name == "work": threading.Thread(target=self.wait, daemon=True).start()
            return super().__getattribute__(name)
        def wait(self):
            os.mkfifo(self.scratch / "gate")
            open(self.scratch / "gate").close()
            os._exit(3)
    """
    write_plugin(plugins, "later", code, ["work"])
    async with hosting(plugins, data_dir) as engine:
        gate = Path(only_worker(engine, "later").scratch) / "gate"
        await until(gate.exists)
        with gate.open("w"):
            pass
        health = await next_state(engine, "later", {"FAILED"})
        assert "status 3 while it was idle" in health.reason


async def test_a_worker_that_sends_more_plain_values_than_fit_is_in_breach(plugins: Path, data_dir: Path) -> None:
    write_plugin(plugins, "floods", FINDS_ITS_CHANNEL + SPEAKS % "", ["work"])
    async with hosting(plugins, data_dir) as engine:
        outcome = await engine.run("floods", "work", {"size": MAX_VALUE_BYTES})
        assert outcome.reason_code == "protocol_error"
        assert f"it sent more than {MAX_VALUE_BYTES} bytes of plain values at once" in (outcome.error or "")


@pytest.mark.contract(7)
async def test_arguments_that_only_together_cannot_be_sent_are_the_callers_fault(
    plugins: Path, data_dir: Path
) -> None:
    write_honest(plugins)
    async with hosting(plugins, data_dir) as engine:
        outcome = await engine.run("honest", "echo", {"\ud800": 1})
        assert isinstance(outcome, Refused)
        assert outcome.reason_code == "bad_input"
        assert outcome.error.startswith("the arguments cannot be sent: UnicodeEncodeError")
        assert (await engine.run("honest", "echo")).ok


async def test_a_worker_that_died_while_its_sibling_still_started_fails_the_plugin(
    plugins: Path, data_dir: Path, tmp_path: Path
) -> None:
    code = f"""
    import os, sys, threading, time
    from pathlib import Path

    FIRST = Path({str(tmp_path)!r}) / "first"

    def die_once_ready(main):
        while sys._current_frames()[main].f_code.co_name != "_wait":
            time.sleep(0.001)
        os._exit(3)

    class Plugin:
        def __init__(self, context):
            try:
                FIRST.open("x").close()
            except FileExistsError:
                while not FIRST.read_text() or Path(FIRST.read_text()).exists():
                    time.sleep(0.001)  # it goes, and its folder with it
            else:
                FIRST.write_text(str(context.scratch))
                threading.Thread(target=die_once_ready, args=[threading.get_ident()], daemon=True).start()
        def validate(self): ...
        def work(self): ...
    """
    write_plugin(plugins, "pair", code, ["work"], limits="workers = 2")
    async with hosting(plugins, data_dir) as engine:
        health = await next_state(engine, "pair", {"FAILED"})
        assert (health.state, health.reason_code) == ("FAILED", "worker_exit")
        assert "the worker exited with status 3 while it was idle" in (health.reason or "")
        await until(lambda: descendants() == {fork_server(engine)} | above(engine) | spares())


def above(engine: Engine) -> set[int]:
    """Between us and the fork server, if there is somebody."""
    process = engine._spawner._process
    return set() if process is None else {process.pid}


async def test_a_fork_server_that_does_not_start_fails_the_plugin_with_the_reason_and_leaves_no_descriptor(
    plugins: Path, data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_honest(plugins)
    before, processes = held(), descendants()
    with monkeypatch.context() as patch:
        patch.setattr(launcher, "_MAIN", Path("/nonexistent/__main__.py"))
        async with hosting(plugins, data_dir) as engine:
            health = engine.health("honest")
            assert health.state == "FAILED"
            assert "fork server" in (health.reason or ""), health.reason
            patch.undo()
            assert (await engine.restart("honest")).state == "INITIALIZED"
            assert (await engine.run("honest", "echo")).ok
    assert (held(), descendants()) == (before, processes)


@pytest.mark.parametrize("moment", ["as the process exists", "while the plugin starts"])
async def test_a_start_that_is_given_up_leaves_no_process_and_no_descriptor(
    moment: str, plugins: Path, data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inside = tmp_path / "inside"
    hang = f"open({str(inside)!r}, 'x').close(); threading.Event().wait()"
    write_plugin(plugins, "hangs", HANGS.format(init=hang), ["work"])
    before, processes = held(), descendants()
    told = _Observer.worker_started
    started = asyncio.Event()

    def worker_started(self: _Observer, pid: int) -> None:
        told(self, pid)
        started.set()
        if moment == "as the process exists":
            starting.cancel()

    monkeypatch.setattr(_Observer, "worker_started", worker_started)
    engine = Engine(settings_for(plugins, data_dir))
    starting = asyncio.ensure_future(engine.__aenter__())
    async with asyncio.timeout(20):
        await started.wait()
        if moment == "while the plugin starts":
            await until(inside.exists)
            starting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await starting
    await engine.close()
    await until(lambda: descendants() == processes)
    assert held() == before
    assert not engine.faults


async def test_a_death_that_cannot_be_judged_is_a_counted_fault_and_the_caller_is_told(
    plugins: Path, data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unable(*_: Any) -> None:
        raise ValueError("who could tell")

    write_plugin(plugins, "exits", EXITS, ["work"])
    monkeypatch.setattr(host, "verdict", unable)
    async with Engine(settings_for(plugins, data_dir)) as engine:
        outcome = await engine.run("exits", "work")
        assert isinstance(outcome, Broke)
        assert outcome.reason_code == "engine_fault"
        assert "failed to judge how (ValueError); see its log" in outcome.error
        assert {name: fault.count for name, fault in engine.faults.items()} == {"verdict exits": 1}


async def test_what_is_kept_of_a_call_goes_with_a_death_that_cannot_be_judged(
    plugins: Path, data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unable(*_: Any) -> None:
        raise ValueError("who could tell")

    write_plugin(plugins, "raises", RAISES, ["work"])
    async with Engine(settings_for(plugins, data_dir)) as engine:
        before = held()
        with monkeypatch.context() as patch:
            patch.setattr(host, "verdict", unable)
            outcome = await engine.run("raises", "work", {"data": bytes(100_000)})
            assert outcome.reason_code == "tool_exception"
            await next_event(engine, "worker.exited", "raises")
        assert list(engine.faults) == ["verdict raises"]
        assert (await engine.restart("raises")).state == "INITIALIZED"
        await until(lambda: held() == before)


async def test_a_greeting_that_the_engine_fails_on_leaves_no_worker_and_does_not_blame_the_plugin(
    plugins: Path, data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unable(_pid: int) -> None:
        raise RuntimeError("out of order")

    write_honest(plugins)
    async with Engine(settings_for(plugins, data_dir)) as engine:
        await the_spare()  # a moment ago it bore its parent's name
        before, processes = held(), descendants() - spares()
        with monkeypatch.context() as patch:
            patch.setattr(shm, "of", unable)
            health = await engine.restart("honest")
            assert (health.state, health.reason_code) == ("FAILED", "engine_fault")
            assert "out of order" in str(health.reason)
        await until(lambda: len(descendants() - spares()) == len(processes) - 1)
        assert (await engine.restart("honest")).state == "INITIALIZED"
        await until(lambda: held() == before)


@pytest.mark.contract(6)
async def test_a_hang_is_ended_even_where_its_stack_cannot_be_read(
    plugins: Path, data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def unable(_: StackPipe) -> bool:
        raise OSError("no pipe any more")

    write_plugin(plugins, "hangs", HANGS.format(init="..."), {"work": "timeout_s = 0.2"})
    monkeypatch.setattr(StackPipe, "arrived", unable)
    async with Engine(settings_for(plugins, data_dir)) as engine:
        async with asyncio.timeout(10):
            outcome = await engine.run("hangs", "work")
        assert outcome.reason_code == "tool_timeout"
        assert {name: fault.count for name, fault in engine.faults.items()} == {"worker hangs": 1}


@pytest.mark.contract(3)
async def test_a_fork_server_that_does_not_tell_how_a_worker_died_is_not_waited_for(
    plugins: Path, data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host, "_REAP_WAIT_S", 0.2)
    write_honest(plugins)
    async with hosting(plugins, data_dir) as engine:
        worker, server = engine.health("honest").pid, fork_server(engine)
        assert worker is not None
        os.kill(server, signal.SIGSTOP)
        try:
            os.kill(worker, signal.SIGKILL)
            await next_event(engine, "worker.exited", "honest")
            health = engine.health("honest")
            assert (health.state, health.reason_code) == ("FAILED", "killed_externally")
            assert "with it the process that could tell how" in (health.reason or "")
        finally:
            os.kill(server, signal.SIGCONT)


def test_the_schemas_that_a_worker_sends_are_bounded_json() -> None:
    deep = wire.ToolInfo("[" * 100_000)
    with pytest.raises(ProtocolBreach, match="no JSON"):
        host._check_tools({"work": deep}, ["work"])
    host._check_tools({"work": wire.ToolInfo(msgspec.json.encode({}).decode())}, ["work"])


@pytest.mark.parametrize("busy", [True, False], ids=["in a call", "while idle"])
async def test_evidence_that_nobody_can_take_is_a_counted_fault_and_the_plugin_leaves_service(
    busy: bool, plugins: Path, data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unable(*_: Any) -> None:
        raise ValueError("no room")

    write_plugin(plugins, "exits", EXITS, ["work"])
    monkeypatch.setattr(_Observer, "worker_died", unable)
    async with Engine(settings_for(plugins, data_dir)) as engine:
        code = "worker_exit" if busy else "killed_externally"
        async with asyncio.timeout(10):
            if busy:
                assert (await engine.run("exits", "work")).reason_code == code
            else:
                os.kill(engine.health("exits").pid or 0, signal.SIGKILL)
            assert (await next_state(engine, "exits", {"FAILED"})).reason_code == code
            assert isinstance(await engine.run("exits", "work"), Refused)
        assert {name: fault.last for name, fault in engine.faults.items()} == {
            "evidence exits": "ValueError: no room"
        }


async def test_an_exception_in_a_task_of_a_worker_is_counted_and_named(plugins: Path, data_dir: Path) -> None:
    async def unable() -> None:
        raise ValueError("nobody awaits this")

    write_honest(plugins)
    async with Engine(settings_for(plugins, data_dir)) as engine:
        pool = engine.registry.get("honest").pool
        assert pool is not None
        pool.workers[0]._own(unable())
        await until(lambda: engine.faults)
        assert engine.faults["worker honest"].last == "ValueError: nobody awaits this"
        assert (await engine.run("honest", "echo")).ok


async def test_lines_of_the_plugins_log_are_limited_to_a_rate(plugins: Path, data_dir: Path) -> None:
    code = """
    class Plugin:
        def __init__(self, context): self.log = context.log
        def validate(self): ...
        def shout(self):
            for n in range(5000):
                self.log.info("line %d", n)
    """
    write_plugin(plugins, "loud", code, ["shout"])
    async with hosting(plugins, data_dir, log_lines_per_s=20.0) as engine:
        assert (await engine.run("loud", "shout")).ok
        last, told = engine.bus.last, 0
        async for event in engine.events():
            told += isinstance(event.data, PluginLog)
            if event.sequence >= last:
                break
        assert 20 < told < 1000


SIGNALS = """
import os, signal, threading
class Plugin:
    def __init__(self, context): ...
    def validate(self): ...
    def thread_kill(self): signal.pthread_kill(threading.get_ident(), signal.SIGTERM)
    def group_kill(self): os.killpg(0, signal.SIGTERM)
    def child_kill(self) -> str:
        child = os.fork()
        if child == 0:
            signal.pause()
        os.kill(child, signal.SIGKILL)
        return str(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.contract(3)
@pytest.mark.parametrize("tool", ["thread_kill", "group_kill"])
async def test_a_signal_that_a_plugin_sends_itself_by_python_is_its_own(
    tool: str, plugins: Path, data_dir: Path
) -> None:
    write_plugin(plugins, "signals", SIGNALS, [tool])
    async with hosting(plugins, data_dir) as engine:
        outcome = await engine.run("signals", tool)
        assert outcome.reason_code == "worker_signal"
        assert f"it sent SIGTERM to itself during `{tool}` at plugin.py:" in (outcome.error or "")


async def test_a_signal_to_a_child_of_the_plugins_own_is_nobody_elses_business(
    plugins: Path, data_dir: Path
) -> None:
    write_plugin(plugins, "signals", SIGNALS, ["child_kill"])
    async with hosting(plugins, data_dir) as engine:
        assert (await engine.run("signals", "child_kill")).value == "-9"


SLOW = """
import time
class Plugin:
    def __init__(self, context): ...
    def validate(self): ...
    def count(self, numbers: list[int]) -> int: return len(numbers)
    def sleep(self, numbers: list[int]): time.sleep(600)
"""
# Over a MiB, as HTTP sends it.
NUMBERS = wire.Encoded("json", msgspec.json.encode({"numbers": list(range(400_000))}))


async def test_the_time_it_takes_to_read_large_arguments_is_not_the_tools(
    plugins: Path, data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calls, "_ARGUMENTS_S", 0.0)  # over before they can have been read
    write_plugin(plugins, "slow", SLOW, ["count"], "timeout_s = 60")
    async with hosting(plugins, data_dir) as engine:
        for _ in range(2):
            assert (await engine.run("slow", "count", NUMBERS)).value == 400_000


async def test_the_deadline_of_a_call_with_large_arguments_counts_from_its_beginning(
    plugins: Path, data_dir: Path
) -> None:
    write_plugin(plugins, "slow", SLOW, {"sleep": "timeout_s = 0.2"})
    async with hosting(plugins, data_dir) as engine:
        outcome = await engine.run("slow", "sleep", NUMBERS)
        assert isinstance(outcome, Broke)
        assert outcome.reason_code == "tool_timeout"
        assert "ran past 0.2 s at plugin.py:7 in `sleep`" in outcome.error


WAITS = """
import os, threading, time
from pathlib import Path
class Plugin:
    def __init__(self, context): pass
    def validate(self): pass
    def work(self, once: str) -> int:
        def die():
            Path(once).with_name("dying").touch()
            os._exit(1)
        while not os.path.exists(once):
            time.sleep(0.001)
        threading.Timer(0.2, die).start()
        return 1
"""


RAISES = """
class Plugin:
    def __init__(self, context): pass
    def validate(self): pass
    def work(self, data: bytes): raise ValueError(len(data))
"""


class _Invocation:
    """A call that keeps its reply."""

    tool, timeout_s, request_id, announce = "echo", 1.0, "", False
    arguments: ClassVar[dict[str, Any]] = {}

    def __init__(self) -> None:
        self.reply: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self.replied = self.reply.set_result

    def begins(self) -> None: ...


async def test_a_call_that_is_given_to_a_dead_worker_is_told_why_that_died(plugins: Path, data_dir: Path) -> None:
    write_honest(plugins)
    async with hosting(plugins, data_dir) as engine:
        worker = only_worker(engine, "honest")
        os.kill(worker.pid, signal.SIGKILL)
        await worker.cause_of_death()
        call: Any = _Invocation()
        worker.begin(call)
        assert (await call.reply).cause.reason_code == "killed_externally"


async def test_a_start_without_a_descriptor_left_says_so_and_leaves_none_open(
    plugins: Path, data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_honest(plugins)
    async with hosting(plugins, data_dir) as engine:
        before = held()

        async def refuse(*_: Any, **__: Any) -> None:
            raise SpawnFailed("the engine has no file descriptor left; raise its limit (ulimit -n)")

        with monkeypatch.context() as patch:
            patch.setattr(engine._spawner, "spawn", refuse)
            health = await engine.restart("honest")
            assert (health.state, health.reason_code) == ("FAILED", "engine_fault")
            assert "ulimit -n" in str(health.reason)
        assert (await engine.restart("honest")).state == "INITIALIZED"
        await until(lambda: held() == before)  # the watch looks into a file of a process now and then


@pytest.mark.parametrize("unable", ["create_unix_connection", "watch"])
async def test_a_worker_that_cannot_be_connected_is_ended_and_leaves_nothing(
    unable: str, plugins: Path, data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_honest(plugins)
    async with Engine(settings_for(plugins, data_dir)) as engine:
        await the_spare()  # a moment ago it bore its parent's name
        before, processes = held(), descendants() - spares()
        owner: Any = asyncio.get_running_loop() if unable != "watch" else MemoryWatch
        name = unable if unable != "watch" else "add"

        def refuse(*_: Any, **__: Any) -> None:
            raise OSError(errno.ENOMEM, "no memory")

        with monkeypatch.context() as patch:
            patch.setattr(owner, name, refuse)
            health = await engine.restart("honest")
            assert (health.state, health.reason_code) == ("FAILED", "engine_fault")
            assert "no memory" in str(health.reason)
            assert list(engine.faults) == ["start honest"]
        assert (await engine.restart("honest")).state == "INITIALIZED"
        await until(lambda: held() == before)  # the watch looks into a file of a process now and then
        await until(lambda: len(descendants() - spares()) == len(processes))


@pytest.mark.contract(4)
async def test_a_worker_that_dies_while_its_shared_memory_is_opened_leaves_no_descriptor(
    plugins: Path, data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_honest(plugins)

    def opened(pid: int) -> int:
        os.kill(pid, signal.SIGKILL)
        return os.memfd_create("shm")

    async with hosting(plugins, data_dir) as engine:
        before = held()
        with monkeypatch.context() as patch:
            patch.setattr(shm, "of", opened)
            assert (await engine.restart("honest")).reason_code == "killed_externally"
        assert (await engine.restart("honest")).state == "INITIALIZED"
        await until(lambda: held() == before)  # the watch looks into a file of a process now and then


async def test_a_worker_that_is_being_ended_is_not_told_to_go(
    plugins: Path, data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(_pid: int) -> None:
        raise AssertionError("it was looked at")

    write_honest(plugins)
    async with hosting(plugins, data_dir) as engine:
        worker = only_worker(engine, "honest")
        monkeypatch.setattr(shm, "of", never)
        worker._ending = Ending.STOP
        worker._on_hello(wire.Hello(wire.PROTOCOL, worker.pid, 1))
        worker._ending = None


@pytest.mark.contract(6)
async def test_an_answer_after_the_deadline_is_too_late(plugins: Path, data_dir: Path, tmp_path: Path) -> None:
    once = tmp_path / "once"
    write_plugin(plugins, "waits", WAITS, ["work"])
    async with hosting(plugins, data_dir) as engine:
        worker = only_worker(engine, "waits")
        calling = asyncio.create_task(engine.run("waits", "work", {"once": str(once)}))
        await next_event(engine, "plugin.call.started", "waits")
        worker._ending = Ending.TIMEOUT  # the deadline has passed; the kill comes late
        once.touch()
        await until(lambda: once.with_name("dying").exists())
        outcome = await calling
        assert isinstance(outcome, Broke)
        assert outcome.reason_code == "tool_timeout"


async def test_a_worker_that_the_watch_has_killed_was_over_its_limit_before_the_word_of_it_came(
    plugins: Path, data_dir: Path
) -> None:
    write_honest(plugins)
    async with hosting(plugins, data_dir) as engine:
        worker = only_worker(engine, "honest")
        worker.over_memory = True
        os.kill(worker.pid, signal.SIGKILL)
        assert (await worker.cause_of_death()).reason_code == "memory_limit"


class _Leaf:
    """A cgroup whose end is known, or fails."""

    path = "/sys/fs/cgroup/leaf"

    def __init__(self, end: Any) -> None:
        self._end = end

    def end(self) -> Any:
        if isinstance(self._end, Exception):
            raise self._end
        return self._end


@pytest.mark.parametrize(
    ("end", "code", "faults"),
    [
        (End(oom_kills=1, at_limit=True, peak_bytes=1 << 30, removed=True), "memory_limit", []),
        (End(oom_kills=0, at_limit=False, peak_bytes=1 << 20, removed=False), "killed_externally", ["cgroup"]),
        (RuntimeError("can't start new thread"), "killed_externally", ["memory evidence"]),
    ],
    ids=["at its limit", "not removed", "unknown"],
)
async def test_what_a_cgroup_tells_in_the_end_goes_into_the_verdict(
    end: Any, code: str, faults: list[str], plugins: Path, data_dir: Path
) -> None:
    write_honest(plugins)
    async with Engine(settings_for(plugins, data_dir)) as engine:
        worker = only_worker(engine, "honest")
        worker._spawned = worker._spawned._replace(leaf=_Leaf(end))  # type: ignore[arg-type]
        os.kill(worker.pid, signal.SIGKILL)
        assert (await worker.cause_of_death()).reason_code == code
        assert list(engine.faults) == [f"{fault} honest" for fault in faults]
