"""The worker that is forked in advance: taken by the next start, replaced, and never in anybody's way."""

from __future__ import annotations

import errno
import logging
import os
import signal
import socket
import sys
from pathlib import Path
from typing import Any

import pytest
from msgspec import msgpack
from support import (
    HONEST,
    descendants,
    hosting,
    import_from,
    next_event,
    open_descriptors,
    until,
    write_honest,
    write_plugin,
)
from zoo import fork_server, name_of, the_spare

from engine import Engine
from engine.sandbox import wire
from engine.sandbox.frames import Frames
from engine.worker import bytecode, confine, forkserver, rehearsal
from engine.worker.forkserver import ForkServer
from events.envelope import PluginLog

TOUCHY = """
import sys
import os
def touchy(path):
    if path == "/":
        open(os.path.join(os.path.dirname(__file__), str(os.getpid())), "w").close()
        raise ValueError("no root")
    raise ImportError
sys.path_hooks.insert(0, touchy)
"""


def pid_of(engine: Engine) -> int:
    pid = engine.health("honest").pid
    assert pid is not None
    return pid


def descriptors(pid: int) -> set[int]:
    return {int(entry.name) for entry in Path(f"/proc/{pid}/fd").iterdir()}


def of_proc(pid: int, name: str) -> str:
    path = Path(f"/proc/{pid}/{name}")
    return str(path.readlink()) if path.is_symlink() else path.read_text()


async def test_the_next_start_takes_the_spare_and_another_one_comes(plugins: Path, data_dir: Path) -> None:
    write_honest(plugins)
    async with hosting(plugins, data_dir) as engine:
        for _ in range(3):
            spare = await the_spare()
            assert (await engine.restart("honest")).state == "INITIALIZED"
            assert pid_of(engine) == spare
            assert name_of(spare) == "holdfast-worker"
            assert (await engine.run("honest", "echo", {"text": "on"})).value == "on"
        await the_spare()
    assert not descendants()


async def test_a_spare_that_was_killed_costs_nobody_a_start(plugins: Path, data_dir: Path) -> None:
    write_honest(plugins)
    async with hosting(plugins, data_dir) as engine:
        for _ in range(3):
            spare = await the_spare()
            os.kill(spare, signal.SIGKILL)
            await until(lambda spare=spare: not name_of(spare))
            assert (await engine.restart("honest")).state == "INITIALIZED"
        assert (await engine.run("honest", "echo", {"text": "on"})).value == "on"


async def test_a_spare_holds_nothing_but_its_own_end_and_is_confined_already(
    plugins: Path, data_dir: Path
) -> None:
    write_honest(plugins)
    async with hosting(plugins, data_dir) as engine:
        spare = await the_spare()
        await until(lambda: " /dev/shm " in of_proc(spare, "mountinfo"))  # the last of what it does to itself
        assert len(descriptors(spare) - {0, 1, 2}) == 1
        assert os.getsid(spare) == spare
        assert os.getpriority(os.PRIO_PROCESS, spare) >= 10
        assert of_proc(spare, "oom_score_adj") == "1000\n"
        assert of_proc(spare, "ns/mnt") != of_proc(fork_server(engine), "ns/mnt")


async def test_a_spare_ends_with_its_fork_server(plugins: Path, data_dir: Path) -> None:
    write_honest(plugins)
    async with hosting(plugins, data_dir) as engine:
        spare = await the_spare()
        os.kill(fork_server(engine), signal.SIGKILL)
        await until(lambda: not name_of(spare))
        assert (await engine.restart("honest")).state == "INITIALIZED"


async def test_a_spare_that_was_stopped_goes_on_when_it_is_needed(plugins: Path, data_dir: Path) -> None:
    write_honest(plugins)
    async with hosting(plugins, data_dir) as engine:
        os.kill(await the_spare(), signal.SIGSTOP)
        assert (await engine.restart("honest")).state == "INITIALIZED"


async def test_what_is_installed_after_the_rehearsal_is_found_by_the_next_start(
    plugins: Path, data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    extra = tmp_path / "extra"
    import_from(extra, monkeypatch)
    write_plugin(plugins, "honest", f"import late_module\n{HONEST}", ["echo"])
    async with hosting(plugins, data_dir) as engine:
        assert engine.health("honest").reason_code == "package_missing"
        await the_spare()
        extra.mkdir()
        (extra / "late_module.py").write_text("")
        assert (await engine.restart("honest")).state == "INITIALIZED"


async def test_a_finder_that_cannot_stand_the_rehearsal_breaks_no_start(
    plugins: Path, data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    extra = tmp_path / "extra"
    import_from(extra, monkeypatch, sitecustomize=TOUCHY)
    write_honest(plugins)
    async with hosting(plugins, data_dir) as engine:
        assert engine.health("honest").state == "INITIALIZED"
        spare = await the_spare()
        await until((extra / str(spare)).exists)  # it has rehearsed
        assert (await engine.restart("honest")).state == "INITIALIZED"
        line = await next_event(engine, "plugin.log", "honest")
        assert isinstance(line.data, PluginLog)
        assert "the rehearsal of a start failed (ValueError: no root)" in line.data.message


def traces() -> list[list[Any]]:
    """Where a rehearsal could leave something behind, in this process."""
    importing = (sys.path, sys.path_hooks, sys.meta_path, sys.modules, sys.path_importer_cache)
    return [list(place) for place in (*importing, logging.root.manager.loggerDict)]


def test_a_rehearsal_leaves_no_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "dont_write_bytecode", sys.dont_write_bytecode)
    before = traces()
    assert rehearsal.rehearse(lambda: False) == ""
    assert traces() == before


def test_a_rehearsal_imports_what_is_kept_and_writes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object) -> None:
        raise AssertionError("it was asked")

    monkeypatch.setattr(sys, "dont_write_bytecode", sys.dont_write_bytecode)
    monkeypatch.setattr(bytecode.Keeping, "source_to_code", never)
    monkeypatch.setattr(bytecode.Keeping, "set_data", never)
    assert rehearsal.rehearse(lambda: False) == ""


@pytest.mark.parametrize("after", range(6))
def test_a_rehearsal_ends_as_soon_as_the_start_is_wanted_and_leaves_no_trace(
    after: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "dont_write_bytecode", sys.dont_write_bytecode)
    before = traces()
    asked = iter([*[False] * after, True])
    assert rehearsal.rehearse(lambda: next(asked)) == ""
    assert len(list(asked)) == (0 if after < 5 else after - 4), "before it begins, and at each of four stages"
    assert traces() == before


def test_why_a_rehearsal_went_wrong_is_told_and_harms_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    def raises(_: object) -> None:
        raise ValueError("not with me")

    monkeypatch.setattr(rehearsal, "_start", raises)
    assert rehearsal.rehearse(lambda: False) == "the rehearsal of a start failed (ValueError: not with me)"


# Of a fork server within this process, and its children


def forked(orders: socket.socket) -> int:
    """A spare of ours, that listens to `orders`."""
    parent = os.getpid()
    if pid := os.fork():
        return pid
    forkserver._become_worker(parent, orders)
    raise AssertionError("it never returns")


def test_a_spare_that_nobody_needs_any_more_ends_without_a_word() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        pid = forked(theirs)
    ours.close()
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def test_what_the_kernel_refuses_a_spare_is_said_by_the_worker_that_it_becomes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse() -> None:
        raise OSError(errno.EACCES, "it may not volunteer")

    monkeypatch.setattr(confine, "volunteer", refuse)
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    output, output_end = os.pipe()
    with ours, theirs:
        pid = forked(theirs)
        request = wire.encode(wire.Fork(1, str(tmp_path / "scratch")))
        socket.send_fds(ours, [request], [theirs.fileno(), *[output_end] * 4])
        os.close(output_end)
        said = os.read(output, 1000).decode()
        os.close(output)
        assert said == "holdfast worker: PermissionError: [Errno 13] it may not volunteer\n"
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == wire.EXIT_BROKEN


def test_a_rehearsal_that_went_wrong_is_said_by_the_worker_that_it_becomes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rehearsal, "rehearse", lambda _: "it went wrong")
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    channel, channel_end = socket.socketpair()
    with ours, theirs, channel, Path(os.devnull).open("rb") as nothing:
        pid = forked(theirs)
        request = wire.encode(wire.Fork(1, str(tmp_path / "scratch")))
        socket.send_fds(ours, [request], [channel_end.fileno(), *[nothing.fileno()] * 4])
        channel_end.close()
        start = wire.Start("absent", str(tmp_path), "absent:Plugin", {}, msgpack.encode({}), "/", {}, 0, 0)
        channel.sendall(wire.frame(start) + wire.frame(wire.Go()))
        channel.shutdown(socket.SHUT_WR)
        assert wire.LogLine("warning", "it went wrong") in messages(channel)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def messages(channel: socket.socket) -> list[wire.Message]:
    """All that a worker says until it ends."""
    frames, heard = Frames(), list[wire.Message]()
    while count := channel.recv_into(frames.room()):
        frames.came(count)
        while (frame := frames.take()) is not None:
            heard.append(wire.from_worker.decode(frame))
    return heard


def test_where_every_spare_dies_at_once_the_fork_server_says_that_there_is_no_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    made: list[int] = []

    def stillborn(_: ForkServer) -> forkserver._Spare:
        near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        far.close()
        made.append(os.posix_spawn("/bin/true", ["true"], {}))
        os.waitpid(made[-1], 0)
        return forkserver._Spare(made[-1], near)

    monkeypatch.setattr(ForkServer, "_fork", stillborn)
    with ours, theirs:
        server = ForkServer(os.dup(theirs.fileno()), os.getpid(), tmp_path, [])
        before = open_descriptors()
        socket.send_fds(ours, [wire.encode(wire.Fork(7, str(tmp_path)))], [ours.fileno()])
        assert server._serve_request()
        assert wire.from_fork_server.decode(ours.recv(1000)) == wire.NotForked(7, errno.EAGAIN)
        assert open_descriptors() == before
        assert len(made) == 2
        server._control.close()
