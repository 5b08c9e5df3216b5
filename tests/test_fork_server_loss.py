"""The fork server, or the reaper above it, is killed or stopped: what is said, what is left, what goes on."""

from __future__ import annotations

import asyncio
import errno
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs
from support import (
    descendants,
    held,
    hosting,
    next_event,
    open_descriptors,
    settings_for,
    until,
    write_honest,
    write_plugin,
)
from zoo import above, fork_server, next_state, spares

from engine import Engine
from engine.outcome import Broke
from engine.sandbox import host, launcher, spawner, wire
from engine.worker.forkserver import ForkServer

KILLED = "the fork server was killed by SIGKILL, and all workers end with it; find out what ended it"

DAEMONS = """
import ctypes, os, signal, threading

LIBC = ctypes.CDLL(None)

def daemon(deaf):
    source, sink = os.pipe()
    if os.fork() == 0:
        LIBC.prctl(1, 0)                  # PR_SET_PDEATHSIG
        os.setsid()
        if os.fork() == 0:
            LIBC.prctl(1, 0)
            LIBC.prctl(36, int(deaf))     # PR_SET_CHILD_SUBREAPER
            os.setsid()
            if os.fork() == 0:
                LIBC.prctl(1, 0)
                if deaf:
                    signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
                os.write(sink, str(os.getpid()).encode())
                os.closerange(0, 1000)
                while True:
                    LIBC.pause()
            if deaf:
                while True:
                    LIBC.pause()
            os._exit(0)
        os._exit(0)
    os.wait()
    return int(os.read(source, 20))

class Plugin:
    def __init__(self, context):
        LIBC.prctl(1, 0)                  # what kills a worker with its parent
        (context.scratch / "kept").write_text("something")
    def validate(self): pass
    def spawns(self) -> list[int]:
        return [daemon(deaf) for deaf in (False, True, False)]
    def waits(self) -> None:
        threading.Event().wait()
"""
WAITS = """
import threading
class Plugin:
    def __init__(self, context): {init}
    def validate(self): pass
    def waits(self) -> None: threading.Event().wait()
"""


def kill_fork_server(engine: Engine) -> None:
    os.kill(fork_server(engine), signal.SIGKILL)


def kill_reaper(engine: Engine) -> None:
    reaper = engine._spawner.reaper_pid
    assert reaper is not None
    os.kill(reaper, signal.SIGKILL)


def exists(pid: int) -> bool:
    """Whether there is such a process that is not a zombie."""
    try:
        return ") Z " not in Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False


def scratch_folders(data_dir: Path) -> list[str]:
    """Those of workers, of every engine there."""
    return sorted(path.name for path in (data_dir / "scratch").glob("*/*") if path.name != "uploads")


@pytest.mark.contract(2, 3)
@pytest.mark.parametrize("kill", [kill_fork_server, kill_reaper])
async def test_calls_that_run_when_the_fork_server_is_lost_are_told_so_and_a_restart_works_at_once(
    kill: Callable[[Engine], None], plugins: Path, data_dir: Path
) -> None:
    before, processes = held(), descendants()
    write_plugin(plugins, "waiting", WAITS.format(init="pass"), ["waits"], limits="workers = 2")
    write_honest(plugins)
    who = "the fork server" if kill is kill_fork_server else "the reaper, the fork server's parent,"
    lost = f"{who} was killed by SIGKILL, and all workers end with it; find out what ended it, then restart"
    async with hosting(plugins, data_dir) as engine:
        calls = [asyncio.create_task(engine.run("waiting", "waits")) for _ in range(2)]
        for _ in calls:
            await next_event(engine, "plugin.call.started", "waiting")
        kill(engine)
        for outcome in await asyncio.gather(*calls):
            assert isinstance(outcome, Broke)
            assert (outcome.reason_code, outcome.state) == ("killed_externally", "FAILED")
            assert f"its worker was lost during `waits`: {lost}" in outcome.error
        idle = await next_state(engine, "honest", {"FAILED"})
        assert idle.reason_code == "killed_externally"
        assert f"its worker was lost while it was idle: {lost}" in idle.reason
        for name in ("waiting", "honest"):
            again = await engine.restart(name)
            assert (again.state, again.incarnation) == ("INITIALIZED", 2)
        assert (await engine.run("honest", "echo", {"text": "again"})).value == "again"
        await until(lambda: len(descendants() - spares()) == len(processes) + len(above(engine)) + 3)
        assert len(scratch_folders(data_dir)) == 3
        (crash,) = await engine.crashes("honest")
        assert crash.by == "outside"
    assert (held(), descendants()) == (before, processes)
    assert not list((data_dir / "scratch").iterdir())


@pytest.mark.parametrize("kill", [kill_fork_server, kill_reaper])
async def test_daemons_of_a_plugin_do_not_survive_the_fork_server_nor_does_a_worker_that_wants_to(
    kill: Callable[[Engine], None], plugins: Path, data_dir: Path
) -> None:
    write_plugin(plugins, "breeder", DAEMONS, ["spawns", "waits"])
    ours = await asyncio.create_subprocess_exec(  # a child of the embedding application is none of our business
        sys.executable, "-c", "input()", stdin=subprocess.PIPE
    )
    async with hosting(plugins, data_dir) as engine:
        worker = engine.health("breeder").pid
        assert worker is not None
        daemons = await spawned(engine)
        assert len(set(daemons)) == 3
        before = above(engine)
        kill(engine)
        health = await next_state(engine, "breeder", {"FAILED"})
        assert health.reason_code == "killed_externally"
        await until(lambda: engine._spawner._burial is not None and engine._spawner._burial.done())
        assert [pid for pid in (*daemons, worker, *before) if exists(pid)] == []
        assert scratch_folders(data_dir) == []
        assert (await engine.restart("breeder")).state == "INITIALIZED"
        assert len(await spawned(engine)) == 3
    assert ours.returncode is None
    ours.terminate()  # it has not been reaped by anybody else
    assert await ours.wait() == -signal.SIGTERM


async def test_a_plugin_that_starts_when_the_fork_server_is_lost_fails_for_the_same_reason(
    plugins: Path, data_dir: Path, tmp_path: Path
) -> None:
    gate = tmp_path / "gate"
    os.mkfifo(gate)
    init = f"open({str(gate)!r}, 'w').close(); threading.Event().wait()"
    write_plugin(plugins, "starting", WAITS.format(init=init), ["waits"])
    write_honest(plugins)
    engine = Engine(settings_for(plugins, data_dir))
    await engine.open()
    try:
        settling = asyncio.create_task(engine.settle())
        await asyncio.to_thread(gate.read_bytes)  # until its __init__ runs
        kill_fork_server(engine)
        await settling
        health = engine.health("starting")
        assert (health.state, health.reason_code) == ("FAILED", "killed_externally")
        assert f"its worker was lost during __init__: {KILLED}" in (health.reason or "")
        assert (await engine.restart("honest")).state == "INITIALIZED"
    finally:
        await engine.close()


async def test_losing_the_fork_server_twice_in_a_row_fails_and_restarts_twice(
    plugins: Path, data_dir: Path
) -> None:
    write_honest(plugins)
    async with hosting(plugins, data_dir) as engine:
        seen = set()
        for incarnation in (1, 2):
            assert engine.health("honest").incarnation == incarnation
            seen |= above(engine)
            kill_fork_server(engine)
            health = await next_failed(engine, "honest", incarnation)
            assert KILLED in health
            assert (await engine.restart("honest")).state == "INITIALIZED"
            assert (await engine.run("honest", "echo", {"text": "back"})).value == "back"
        assert len(seen | above(engine)) == 6
        assert len(scratch_folders(data_dir)) == 1


async def test_a_restart_during_the_loss_finds_the_next_fork_server_or_the_reason(
    plugins: Path, data_dir: Path
) -> None:
    write_honest(plugins)
    async with hosting(plugins, data_dir) as engine:
        kill_fork_server(engine)
        during = await engine.restart("honest")
        if during.state == "FAILED":
            assert KILLED in (during.reason or "")
            during = await engine.restart("honest")
        assert during.state == "INITIALIZED"


async def test_a_stopped_fork_server_is_ended_by_the_engine_which_says_so(
    plugins: Path, data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host, "_REAP_WAIT_S", 0.3)
    write_plugin(plugins, "breeder", DAEMONS, ["spawns", "waits"])
    write_honest(plugins)
    async with hosting(plugins, data_dir) as engine:
        daemons = await spawned(engine)
        os.kill(fork_server(engine), signal.SIGSTOP)
        assert (await engine.run("honest", "echo", {"text": "as before"})).value == "as before"
        with monkeypatch.context() as impatient:
            impatient.setattr(spawner, "_FORK_TIMEOUT_S", 0.3)
            asked = await engine.restart("honest")
        text = "the fork server did not answer for 0.3 s, so the engine ended it"
        assert (asked.state, asked.reason_code) == ("FAILED", "killed_externally")
        assert f"its worker was lost before it began: {text}" in (asked.reason or "")
        other = await next_state(engine, "breeder", {"FAILED"})
        assert other.reason_code == "killed_externally"
        assert f"its worker was lost while it was idle: {text}" in other.reason
        assert (await engine.restart("honest")).state == "INITIALIZED"
        assert [pid for pid in daemons if exists(pid)] == []


async def test_a_burial_that_fails_is_a_counted_fault_and_a_restart_works_all_the_same(
    plugins: Path, data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bury = launcher.bury

    def fails(process: subprocess.Popen[bytes] | None, pidfd: int | None, scratch_root: Path) -> None:
        bury(process, pidfd, scratch_root)
        raise OSError(errno.EIO, "the disk is gone")

    write_honest(plugins)
    async with hosting(plugins, data_dir) as engine:
        with monkeypatch.context() as broken:
            broken.setattr(launcher, "bury", fails)
            kill_fork_server(engine)
            await until(lambda: "fork server burial" in engine.faults)
        fault = engine.faults.pop("fork server burial")
        assert (fault.count, fault.last) == (1, "OSError: [Errno 5] the disk is gone")
        assert (await engine.restart("honest")).state == "INITIALIZED"


async def test_a_fork_server_and_a_reaper_that_are_both_stopped_do_not_keep_the_engine(
    plugins: Path, data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host, "_REAP_WAIT_S", 0.2)
    before = descendants()
    write_honest(plugins)
    async with hosting(plugins, data_dir) as engine:
        for pid in above(engine):
            os.kill(pid, signal.SIGSTOP)
        with monkeypatch.context() as impatient:
            impatient.setattr(spawner, "_FORK_TIMEOUT_S", 0.2)
            impatient.setattr(launcher, "END_TIMEOUT_S", 0.2)
            assert (await engine.restart("honest")).reason_code == "killed_externally"
            assert engine._spawner._burial is not None
            await asyncio.wait([engine._spawner._burial])
        assert (await engine.restart("honest")).state == "INITIALIZED"
    await until(lambda: descendants() == before)


async def test_an_engine_that_closes_while_its_fork_server_is_stopped_leaves_nothing_behind(
    plugins: Path, data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launcher, "END_TIMEOUT_S", 0.3)
    monkeypatch.setattr(host, "_REAP_WAIT_S", 0.3)
    before, processes = held(), descendants()
    write_plugin(plugins, "breeder", DAEMONS, ["spawns", "waits"])
    with capture_logs() as logs:
        async with hosting(plugins, data_dir) as engine:
            daemons = await spawned(engine)
            os.kill(fork_server(engine), signal.SIGSTOP)
    assert "fork_server_stuck" in [entry["event"] for entry in logs]
    assert [pid for pid in daemons if exists(pid)] == []
    assert (held(), descendants()) == (before, processes)
    assert not list((data_dir / "scratch").iterdir())


async def spawned(engine: Engine) -> list[int]:
    """The daemons that the breeder has now."""
    value: Any = (await engine.run("breeder", "spawns")).value
    assert all(exists(pid) for pid in value)
    return list(value)


async def next_failed(engine: Engine, name: str, incarnation: int) -> str:
    """The reason of that incarnation's failure."""
    async for _ in engine.events():
        health = engine.health(name)
        if health.incarnation == incarnation and health.state == "FAILED":
            return health.reason or ""
    raise AssertionError("the log ended")


def test_where_the_kernel_gives_no_process_the_fork_server_says_so_and_serves_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        server = ForkServer(os.dup(theirs.fileno()), os.getpid(), tmp_path, [])
        scratch = tmp_path / "plugin-1"
        scratch.mkdir()
        real = os.fork
        children: list[int] = []

        def fork() -> int:
            if not children:
                raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")
            children.append(real())
            return children[-1]

        monkeypatch.setattr(os, "fork", fork)
        before = open_descriptors()
        socket.send_fds(ours, [wire.encode(wire.Fork(7, str(scratch)))], [ours.fileno()])
        assert server._serve_request()
        assert wire.from_fork_server.decode(ours.recv(1000)) == wire.NotForked(7, errno.EAGAIN)
        assert open_descriptors() == before
        empty = scratch.with_name("empty")
        empty.mkdir()
        (scratch / "kept").write_text("something")
        server._littered.extend([empty, scratch])
        server._tidy()  # nobody to do it yet, where there is more than a folder to remove
        assert (scratch.exists(), empty.exists()) == (True, False)
        children.append(0)
        server._tidy()
        os.waitpid(children[-1], 0)
        assert not scratch.exists()
        server._control.close()


async def test_a_start_for_which_there_is_no_process_names_the_cause_and_the_next_one_works(
    plugins: Path, data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_honest(plugins)
    async with hosting(plugins, data_dir) as engine:
        asked = engine._spawner
        with monkeypatch.context() as patch:

            async def refused(_: object, message: Any, *__: object) -> None:
                asked._on_not_forked(wire.NotForked(message.token, errno.EAGAIN))

            patch.setattr(asked, "_send", refused)
            health = await engine.restart("honest")
            assert (health.state, health.reason_code) == ("FAILED", "engine_fault")
            assert "the kernel gives no process (Resource temporarily unavailable); end some" in str(health.reason)
        assert (await engine.restart("honest")).state == "INITIALIZED"
