"""What a worker is confined to, what it cannot see, and what the engine's process never touches."""

from __future__ import annotations

import asyncio
import json
import os
import resource
import signal
import struct
import subprocess
import sys
import textwrap
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest
import uvloop
from hypothesis import example, given
from hypothesis import strategies as st
from support import FINDS_ITS_CHANNEL, feed, hosting, settings_for, until, write_honest, write_plugin

from engine import Engine
from engine.errors import SetupError
from engine.sandbox import arena, proc, wire
from engine.sandbox.channel import Channel, ProtocolBreach
from engine.sandbox.host import Worker
from engine.sandbox.output import Output, RateLimit
from engine.worker.confine import RESERVE_BYTES
from events.envelope import PluginLog

ROOT = Path(__file__).resolve().parents[1]
MIB = 1024 * 1024

CURIOUS = """
import ctypes
import os
import resource
import signal
import sys
import textwrap
from pathlib import Path

class Plugin:
    def __init__(self, context):
        self.context = context
    def validate(self): ...
    def limits(self) -> dict:
        return {
            "data": resource.getrlimit(resource.RLIMIT_DATA),
            "core": resource.getrlimit(resource.RLIMIT_CORE),
            "oom_score_adj": int(Path("/proc/self/oom_score_adj").read_text()),
            "status": Path("/proc/self/status").read_text(),
        }
    def place(self) -> dict:
        death = ctypes.c_int()
        ctypes.CDLL(None).prctl(2, ctypes.byref(death))  # PR_GET_PDEATHSIG
        return {
            "pid": os.getpid(),
            "session": os.getsid(0),
            "cwd": os.getcwd(),
            "scratch": str(self.context.scratch),
            "tmpdir": os.environ["TMPDIR"],
            "death": death.value,
        }
    def signals(self) -> dict:
        asked = (signal.SIGTERM, signal.SIGHUP, signal.SIGCHLD)
        return {
            "default": [signal.getsignal(number) is signal.SIG_DFL for number in asked],
            "interrupt": signal.getsignal(signal.SIGINT) is signal.default_int_handler,
            "blocked": len(signal.pthread_sigmask(signal.SIG_BLOCK, [])),
        }
    def streams(self) -> dict:
        streams = (sys.stdin, sys.stdout, sys.stderr)
        return {
            "descriptors": [stream.fileno() for stream in streams],
            "targets": [os.readlink(f"/proc/self/fd/{stream.fileno()}").partition(":")[0] for stream in streams],
            "encodings": [stream.encoding for stream in streams[1:]],
            "by_line": [stream.line_buffering for stream in streams[1:]],
            "seekable": [stream.seekable() for stream in streams[1:]],
            "closed": [stream.closed for stream in streams],
        }
    def environment(self) -> dict:
        return dict(os.environ)
    def descriptors(self) -> dict:
        return {fd: os.readlink(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd")
                if os.path.lexists(f"/proc/self/fd/{fd}")}
    def visible(self) -> dict:
        return {
            "modules": [name for name in sys.modules if name.partition(".")[0] in ("engine", "events")],
            "path": sys.path,
        }
"""
CURIOUS_TOOLS = ["limits", "place", "signals", "streams", "environment", "descriptors", "visible"]


async def ask(plugins: Path, data_dir: Path, tool: str, limits: str = "") -> Any:
    write_plugin(plugins, "curious", CURIOUS, CURIOUS_TOOLS, limits)
    async with hosting(plugins, data_dir) as engine:
        outcome = await engine.run("curious", tool)
        assert outcome.ok, outcome
        return outcome.value


@pytest.mark.contract(6)
async def test_a_worker_is_limited_before_the_plugin_is_imported(plugins: Path, data_dir: Path) -> None:
    told = await ask(plugins, data_dir, "limits", "memory_mib = 300")
    # Soft: where allocations fail. Hard: what Holdfast's own part may use then, to say so.
    assert told["data"] == [300 * MIB, 300 * MIB + RESERVE_BYTES]
    assert told["core"] == [0, 0]
    assert told["oom_score_adj"] == 1000
    assert "NoNewPrivs:\t1" in told["status"]


@pytest.mark.contract(1)
async def test_a_worker_has_its_own_process_session_and_folder(plugins: Path, data_dir: Path) -> None:
    told = await ask(plugins, data_dir, "place")
    assert told["pid"] not in (os.getpid(), os.getppid())
    assert told["session"] == told["pid"]
    assert told["cwd"] == told["scratch"] == told["tmpdir"]
    assert Path(told["scratch"]).is_relative_to(data_dir)
    assert told["death"] == 9


async def test_a_worker_has_pythons_own_signals_though_its_fork_server_has_not(
    plugins: Path, data_dir: Path
) -> None:
    told = await ask(plugins, data_dir, "signals")
    assert told == {"default": [True, True, True], "interrupt": True, "blocked": 0}


async def test_a_workers_streams_are_its_own_though_the_fork_server_made_them(
    plugins: Path, data_dir: Path
) -> None:
    told = await ask(plugins, data_dir, "streams")
    assert told == {
        "descriptors": [0, 1, 2],
        "targets": ["/dev/null", "pipe", "pipe"],
        "encodings": ["utf-8", "utf-8"],
        "by_line": [True, True],
        "seekable": [False, False],
        "closed": [False, False, False],
    }


async def test_a_worker_sees_nothing_of_the_engines_environment_but_what_it_needs(
    plugins: Path, data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    secrets = {"HOLDFAST_TOKEN": "s3cret", "AWS_SECRET_ACCESS_KEY": "s3cret", "DATABASE_URL": "s3cret"}
    for name, value in {**secrets, "LC_ALL": "C.UTF-8", "CUDA_VISIBLE_DEVICES": "0"}.items():
        monkeypatch.setenv(name, value)
    told = await ask(plugins, data_dir, "environment")
    assert not told.keys() & secrets.keys()
    assert "s3cret" not in told.values()
    assert (told["LC_ALL"], told["CUDA_VISIBLE_DEVICES"], told["PATH"]) == ("C.UTF-8", "0", os.environ["PATH"])
    threads = {told[name] for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")}
    assert threads == {str(min(4, os.cpu_count() or 1))}


async def test_a_worker_holds_no_descriptor_but_its_own(plugins: Path, data_dir: Path) -> None:
    foreign = os.open(os.devnull, os.O_RDONLY)
    os.set_inheritable(foreign, True)
    try:
        told = await ask(plugins, data_dir, "descriptors")
    finally:
        os.close(foreign)
    assert told["0"] == "/dev/null"
    assert told["1"] == told["2"]
    assert told["1"].startswith("pipe:")
    own = {fd: target.partition(":")[0] for fd, target in told.items() if fd not in "012"}
    assert sorted(own.values()) == ["/memfd", "/memfd", "pipe", "pipe", "socket"]
    assert min(map(int, own)) >= 100


@pytest.mark.contract(1)
async def test_a_plugin_finds_neither_holdfast_nor_its_folder(plugins: Path, data_dir: Path) -> None:
    told = await ask(plugins, data_dir, "visible")
    assert told["modules"] == []
    assert str(ROOT / "engine" / "worker") not in told["path"]
    assert told["path"][0] == str(plugins / "curious")


@pytest.mark.parametrize("name", ["engine", "events", "wire", "msgspec_helper", "serve", "tools", "load"])
async def test_a_plugin_may_have_a_module_named_like_one_of_ours(name: str, plugins: Path, data_dir: Path) -> None:
    code = f"""
    import {name}
    import {name}.part
    class Plugin:
        def __init__(self, context): ...
        def validate(self): ...
        def which(self): return [{name}.WHO, {name}.part.WHO, {name}.__file__]
    """
    folder = write_plugin(plugins, "named", code, ["which"])
    (folder / name).mkdir()
    (folder / name / "__init__.py").write_text("WHO = 'the plugin'")
    (folder / name / "part.py").write_text("WHO = 'its part'")
    async with hosting(plugins, data_dir) as engine:
        outcome = await engine.run("named", "which")
        assert outcome.value == ["the plugin", "its part", str(folder / name / "__init__.py")]


@pytest.mark.contract(1)
def test_the_engines_process_imports_no_plugin_code_and_none_of_its_packages(
    plugins: Path, data_dir: Path
) -> None:
    code = """
    import os, numpy
    class Plugin:
        def __init__(self, context): ...
        def validate(self): ...
        def mean(self, frame: numpy.ndarray) -> dict:
            return {"mean": frame.mean(), "frame": frame * 2, "pid": os.getpid()}
    """
    write_plugin(plugins, "pixels", code, ["mean"])
    host = """
    import asyncio, json, os, sys
    from pathlib import Path
    from engine import Engine, Settings

    async def main():
        settings = Settings(plugin_dirs=(Path(sys.argv[1]),), bundled=True, data_dir=Path(sys.argv[2]))
        async with Engine(settings) as engine:
            outcome = await engine.run("pixels", "mean", {"frame": [[1, 2], [3, 4]]})
            assert outcome.ok, outcome
            assert outcome.value["pid"] != os.getpid()
            print(json.dumps([outcome.value["mean"], outcome.value["frame"].shape, sorted(sys.modules)]))

    asyncio.run(main())
    """
    mean, shape, modules = json.loads(run_python(host, str(plugins), str(data_dir)))
    assert (mean, shape) == (2.5, [2, 2])
    heavy = {"numpy", "cv2", "torch", "plugin", "motion_tracker", "video_tracker"}
    assert not heavy & {name.partition(".")[0] for name in modules}


@pytest.mark.contract(1)
def test_the_workers_side_imports_no_server() -> None:
    modules = json.loads(
        run_python("import engine.worker.forkserver, json, sys; print(json.dumps([*sys.modules]))")
    )
    top = {name.partition(".")[0] for name in modules}
    servers = {"aiohttp", "anyio", "structlog", "transitions", "typer", "rich", "psutil", "uvloop", "events"}
    assert "msgspec" in top
    assert not top & {*servers, "prometheus_client", "numpy", "cv2", "torch"}
    ours = {name for name in modules if name.startswith("engine.")}
    assert not ours & {"engine.engine", "engine.runner", "engine.api", "engine.errors", "engine.sandbox.host"}


def run_python(code: str, *arguments: str) -> str:
    command = [sys.executable, "-c", textwrap.dedent(code), *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=50, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip().splitlines()[-1]


# Output.

LOUD = """
import os, sys

class Plugin:
    def __init__(self, context):
        self.log = context.log
        print("from the start")
    def validate(self): ...
    def shout(self, lines: int):
        for n in range(lines):
            print(f"line {n}")
    def mixed(self):
        os.write(1, b"descriptor 1\\n")
        os.write(2, b"\\xff descriptor 2\\r\\n")
        sys.stderr.write("stderr\\n")
        os.write(1, b"x" * 10_000 + b"\\n")
        self.log.warning("%d of %d", 1, 2)
        os.system("echo from a child")
        os.write(1, b"no newline")
        raise RuntimeError("the end")
"""


async def test_what_a_plugin_writes_becomes_events_line_by_line(plugins: Path, data_dir: Path) -> None:
    write_plugin(plugins, "loud", LOUD, ["mixed", "shout"])
    async with hosting(plugins, data_dir) as engine:
        await engine.run("loud", "mixed")
        lines = [(line.stream, line.level, line.message) for line in await log_lines(engine)]
        assert ("log", "warning", "1 of 2") in lines
        written = [text for stream, _, text in lines if stream == "output"]
        assert written[:4] == ["from the start", "descriptor 1", "� descriptor 2", "stderr"]
        assert [len(text) for text in written[4:7]] == [4096, 4096, 10_000 - 2 * 4096]
        assert written[7:] == ["from a child", "no newline"]


async def test_a_loud_plugin_is_limited_to_a_rate_and_what_was_dropped_is_counted(
    plugins: Path, data_dir: Path
) -> None:
    write_plugin(plugins, "loud", LOUD, ["mixed", "shout"])
    async with hosting(plugins, data_dir, log_lines_per_s=20.0) as engine:
        assert (await engine.run("loud", "shout", {"lines": 50_000})).ok
        await engine.run("loud", "mixed")
        lines = [line for line in await log_lines(engine) if line.stream == "output"]
        assert 20 < len(lines) < 1000
        assert lines[1].message == "line 0"


def test_the_rate_is_an_average_with_a_burst_of_twice_that() -> None:
    now_s = 0.0
    limit = RateLimit(10, clock=lambda: now_s)
    assert [limit.admit() for _ in range(25)] == [0] * 20 + [None] * 5
    now_s = 0.5
    assert [limit.admit() for _ in range(7)] == [5, 0, 0, 0, 0, None, None]
    now_s = 100.0
    assert [limit.admit() for _ in range(21)] == [2] + [0] * 19 + [None]


async def test_the_tail_of_the_output_is_kept_even_where_the_rate_drops_it() -> None:
    seen: list[tuple[str, int]] = []
    reading, writing = os.pipe()
    output = Output(reading, lambda line, dropped: seen.append((line, dropped)), 1.0)
    os.write(writing, b"".join(b"line %d\n" % n for n in range(1000)) + b"half")
    os.close(writing)
    output.close()
    os.close(reading)
    assert seen[:2] == [("line 0", 0), ("line 1", 0)]
    (last,) = seen[2:]
    assert last[1] == 999, "what was dropped last is told of too"
    assert output.tail().splitlines() == [*(f"line {n}" for n in range(981, 1000)), "half"]


async def log_lines(engine: Any) -> list[PluginLog]:
    """Every plugin.log event so far, once the worker is gone and its pipe is read to the end."""
    await until(lambda: engine.health("loud").pid is None)
    lines = []
    last = engine.bus.last
    async for event in engine.events():
        if isinstance(event.data, PluginLog):
            lines.append(event.data)
        if event.sequence >= last:
            break
    return lines


@pytest.mark.parametrize("loop", [asyncio.run, uvloop.run], ids=["asyncio", "uvloop"])
def test_settings_larger_than_the_channel_takes_at_once_arrive_whole(
    loop: Callable[[Coroutine[Any, Any, None]], None], plugins: Path, data_dir: Path
) -> None:
    loop(_large_settings(plugins, data_dir))


# libuv makes a pipe for signals, once for a process.
uvloop.new_event_loop().close()


async def _large_settings(plugins: Path, data_dir: Path) -> None:
    code = """
        class Plugin:
            def __init__(self, context): self.texts = context.settings["texts"]
            def validate(self): pass
            def work(self): return [len(text) for text in self.texts]
    """
    texts = ["x" * 100_000] * 9  # a manifest may have a MiB
    write_plugin(plugins, "wordy", code, ["work"], head=f"[settings]\ntexts = {texts!r}")
    async with hosting(plugins, data_dir) as engine:
        busy = asyncio.create_task(_busy())
        for _ in range(4):
            assert (await engine.restart("wordy")).state == "INITIALIZED"
        assert (await engine.run("wordy", "work")).value == [100_000] * 9
        busy.cancel()


async def _busy() -> None:
    """Each turn of the loop takes a while, in which a worker may say much."""
    while True:
        time.sleep(0.002)  # noqa: ASYNC251
        await asyncio.sleep(0)


# The channel.

FRAMES = st.one_of(
    st.binary(max_size=64),
    st.binary(max_size=64).map(lambda body: struct.pack("!I", len(body)) + body),
    st.sampled_from(
        [
            wire.frame(wire.Hello(1, 2, 3)),
            wire.frame(wire.StartFailed("import", "exception", "E", "m", "")),
            wire.frame(wire.Ready({})),
            wire.frame(wire.Began(1)),
            wire.frame(wire.Progress(1, float("nan"), 2)),
            wire.frame(wire.Failed(1, "exception", "E", "m")),
            struct.pack("!I", 2**32 - 1),
            struct.pack("!I", 0),
            struct.pack("!I", 4) + b"\x92\x11\xa1\xff",  # text that is not UTF-8
            struct.pack("!I", 100_000) + b"\x91" * 100_000,  # nested deeper than anybody may recurse
        ]
    ),
)


def _of(body: bytes) -> bytes:
    return struct.pack("!I", len(body)) + body


# What was found to matter, by fuzzing or by thinking, stays: each of these once broke an end of some channel.
@given(st.lists(FRAMES, max_size=8), st.integers(1, 70))
@example([struct.pack("!I", 2**32 - 1)], 4)
@example([struct.pack("!I", wire.MAX_FRAME_BYTES) + b"\0" * 100], 70)
@example([_of(b"\x92\x11\xa1\xff")], 1)
@example([_of(b"\x91" * 100_000)], 1)
@example([_of(b"\xdd\xff\xff\xff\xff")], 3)
@example([_of(b"\x92\x16\xc7\xff\x01")], 2)
@example([wire.frame(wire.Hello(1, 2, 3)), b"\0\0"], 1)
def test_no_bytes_from_a_worker_break_the_engines_end_of_the_channel(frames: list[bytes], size: int) -> None:
    lost: list[str | None] = []
    messages: list[Any] = []
    channel = Channel(messages.append, lost.append)
    channel.hear()
    stream = b"".join(frames)
    for at in range(0, len(stream), size if len(stream) < 10_000 else 4096):
        feed(channel, stream[at : at + (size if len(stream) < 10_000 else 4096)])
    channel.connection_lost(None)
    feed(channel, stream)
    assert len(lost) == 1
    assert all(isinstance(message, wire.Message) for message in messages)


SOME_MESSAGES = [wire.Progress(7, 1.0, 2.0), wire.Began(7), wire.Item(7, msgspec.Raw(b"\x01"))]


@given(st.lists(st.sampled_from(SOME_MESSAGES), max_size=6), st.data())
def test_messages_arrive_whole_and_in_order_however_the_bytes_are_cut(messages: list[Any], data: Any) -> None:
    stream = b"".join(wire.frame(message) for message in messages)
    arrived: list[bytes] = []
    channel = Channel(lambda message: arrived.append(wire.frame(message)), lambda _breach: None)
    channel.hear()
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=6)))
    for start, end in zip([0, *cuts], [*cuts, len(stream)], strict=True):
        feed(channel, stream[start:end])
    assert arrived == [wire.frame(message) for message in messages]


def test_a_breach_is_told_once_and_ends_the_channel() -> None:
    lost: list[str | None] = []

    def refuse(message: Any) -> None:
        raise ProtocolBreach("not now")

    channel = Channel(refuse, lost.append)
    channel.hear()
    frame = wire.frame(wire.Began(1))
    feed(channel, frame + frame)
    feed(channel, frame)
    channel.connection_lost(None)
    assert lost == ["not now"]


def test_no_frame_is_larger_than_the_other_side_accepts() -> None:
    with pytest.raises(ValueError, match="at most"):
        wire.frame(wire.LogLine("info", "x" * (wire.MAX_FRAME_BYTES + 1)))


# The arena.


def test_an_arena_can_neither_shrink_nor_grow() -> None:
    fd = arena.create(MIB)
    try:
        for size in (0, 2 * MIB):
            with pytest.raises(PermissionError):
                os.ftruncate(fd, size)
    finally:
        os.close(fd)


@given(
    st.lists(st.tuples(st.integers(-(2**70), 2**70), st.integers(-(2**70), 2**70)), max_size=5),
    st.lists(st.binary(min_size=1, max_size=3000), max_size=6),
)
def test_a_writer_never_writes_over_what_is_held_whatever_a_worker_claims(
    held: list[tuple[int, int]], payloads: list[bytes]
) -> None:
    fd = arena.create(16_384)
    shared = arena.Arena(fd, writable=True)
    try:
        shared.reset(held)
        written: list[tuple[int, int]] = []
        for payload in payloads:
            try:
                offset, length = shared.write(payload)
            except arena.ArenaFull:
                continue
            assert shared.copy(offset, length) == payload
            for other, size in [*written, *(span for span in held if span[0] >= 0 and span[1] > 0)]:
                assert offset + length <= other or other + size <= offset
            written.append((offset, length))
    finally:
        shared.release()
        os.close(fd)


@pytest.mark.parametrize(("offset", "length"), [(-1, 1), (0, -1), (0, MIB + 1), (MIB, 1), (2**63, 1)])
def test_a_reference_outside_the_arena_is_refused(offset: int, length: int) -> None:
    fd = arena.create(MIB)
    try:
        with pytest.raises(ValueError, match="outside"):
            arena.Arena(fd, writable=False).view(offset, length)
    finally:
        os.close(fd)


# Hostile workers, end to end: a plugin that finds the channel's descriptor and speaks for itself.

SPEAKING = """
class Plugin:
    def __init__(self, context): ...
    def validate(self): ...
    def say(self, data: bytes):
        os.write(CHANNEL, data)
        raise RuntimeError("too late")
"""


@pytest.mark.parametrize(
    ("said", "words"),
    [
        (b"\xff" * 64, "announced a frame of 4294967295 bytes"),
        (struct.pack("!I", 3) + b"\xc1\xc1\xc1", "a frame that is no message"),
        (wire.frame(wire.Hello(1, 2, 3)), "it sent Hello out of turn"),
        (wire.frame(wire.Ready({})), "it sent Ready out of turn"),
        (wire.frame(wire.Began(999)), "it spoke of call 999, which does not run"),
        (wire.frame(wire.Result(1, msgspec.Raw(b"\xd4\x01\x00"))), "it sent a value that does not decode"),
    ],
)
async def test_a_plugin_that_speaks_on_the_channel_is_in_breach(
    said: bytes, words: str, plugins: Path, data_dir: Path
) -> None:
    write_plugin(plugins, "speaking", FINDS_ITS_CHANNEL + SPEAKING, ["say"])
    write_honest(plugins)
    async with hosting(plugins, data_dir) as engine:
        outcome = await engine.run("speaking", "say", {"data": said})
        assert (outcome.reason_code, outcome.state) == ("protocol_error", "FAILED")
        assert words in (outcome.error or "")
        assert (await engine.run("honest", "echo")).ok


async def test_the_engines_own_limits_stay_as_they_were(plugins: Path, data_dir: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_DATA), resource.getrlimit(resource.RLIMIT_CORE), os.getsid(0)
    write_honest(plugins)
    async with hosting(plugins, data_dir) as engine:
        await asyncio.gather(*(engine.run("honest", "echo") for _ in range(5)))
    after = resource.getrlimit(resource.RLIMIT_DATA), resource.getrlimit(resource.RLIMIT_CORE), os.getsid(0)
    assert after == before


@asynccontextmanager
async def _opened(plugins: Path, data_dir: Path) -> AsyncIterator[Engine]:
    """An engine that has not started its plugins."""
    engine = Engine(settings_for(plugins, data_dir))
    await engine.open()
    try:
        yield engine
    finally:
        await engine.close()


async def test_an_engine_that_is_settled_again_starts_nothing_again(plugins: Path, data_dir: Path) -> None:
    write_honest(plugins)
    async with _opened(plugins, data_dir) as engine:
        await asyncio.gather(engine.settle(), engine.settle())
        before = engine.bus.last
        await engine.settle()
        assert engine.bus.last == before
        assert engine.health("honest").state == "INITIALIZED"


async def test_a_plugin_that_is_restarted_while_the_engine_settles_is_started_once(
    plugins: Path, data_dir: Path
) -> None:
    write_honest(plugins)
    async with _opened(plugins, data_dir) as engine:
        restarting = asyncio.create_task(engine.restart("honest"))
        await asyncio.sleep(0)
        await asyncio.sleep(0)  # it has begun
        await asyncio.gather(engine.settle(), restarting)
        assert engine.health("honest").state == "INITIALIZED"
        assert not engine.faults
        assert len(engine._watch._trees) == 1


async def test_a_worker_that_is_killed_before_its_hello_did_not_die_of_what_the_kernel_had_killed_before(
    plugins: Path, data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_honest(plugins)
    killed_by_kernel = [5]
    monkeypatch.setattr(proc, "oom_kills", lambda: killed_by_kernel[0])
    connect = Worker._connect

    async def killed(worker: Worker, *args: Any) -> None:
        await connect(worker, *args)
        os.kill(worker.pid, signal.SIGKILL)

    monkeypatch.setattr(Worker, "_connect", killed)
    async with _opened(plugins, data_dir) as engine:
        await until(lambda: engine._watch._oom_kills[0][1] == 5)
        killed_by_kernel[0] = 6  # something else, while there was no worker
        await engine.settle()
        assert engine.health("honest").reason_code == "killed_externally"


async def test_a_data_folder_that_no_text_can_name_is_refused(plugins: Path, data_dir: Path) -> None:
    engine = Engine(settings_for(plugins, data_dir / os.fsdecode(b"bad\xff")))
    with pytest.raises(SetupError, match=r"bad\\udcff has a path that is not UTF-8; choose another one"):
        await engine.open()
