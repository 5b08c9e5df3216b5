"""What a dead worker leaves behind: one bounded bundle, with the evidence and without anybody's arguments."""

from __future__ import annotations

import asyncio
import hashlib
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from http_support import form, server_process, serving
from structlog.testing import capture_logs
from support import hosting, next_event, settings_for, until, write_honest, write_plugin
from test_cli import holdfast

from engine import Engine
from engine.crash_store import CrashStore
from engine.crashes import MAX_BYTES, Crash, encode
from engine.errors import Cause, ReasonCode, UnknownPlugin
from engine.outcome import Broke
from engine.sandbox import wire
from engine.sandbox.evidence import (
    By,
    Death,
    Failure,
    Process,
    Sender,
    ended_by,
    extension_modules,
    memory_limit,
    native_library,
    signal_sender,
)
from engine.sandbox.fingerprint import Argument, InFlight
from engine.sandbox.verdict import Ending, Evidence, ExitStatus

SECRET = "hunter2-the-secret-of-the-caller"
FRAGILE = """
import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np


class Plugin:
    def __init__(self, context): pass
    def validate(self): pass
    def segfault(self, password: str, n: int) -> None:
        print("about to read nowhere")
        threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
        ctypes.string_at(0)
    def hang(self, password: str) -> None:
        while True:
            time.sleep(0.01)
    def take(self, password: str) -> None:
        held = bytearray(40 * 2**20)
        code = "import time; held = b'x' * (60 * 2**20); time.sleep(60)"
        children = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(3)]
        time.sleep(60)
    def suicide(self) -> None: os.kill(os.getpid(), signal.SIGKILL)
    def wait(self) -> None: time.sleep(60)
    def leave(self) -> None: os._exit(3)
    def stumble(self, frame: np.ndarray, blob: bytes, note: str, options: dict) -> None:
        raise RuntimeError("the model is gone")
    def stumble_over(self, file: Path, note: str) -> None: raise RuntimeError("the file is odd")
    def shout(self) -> None:
        for _ in range(30):
            print("\\x01" * 4000)
        os._exit(3)
    def look(self, path: str, content: str = "") -> str:
        try:
            if content:
                Path(path, "made").write_text(content)
            return str(os.listdir(path))
        except OSError as exc:
            return type(exc).__name__
"""
FRAGILE_TOOLS = {
    **dict.fromkeys(
        ["segfault", "take", "suicide", "wait", "leave", "stumble", "stumble_over", "shout", "look"], ""
    ),
    "hang": "timeout_s = 0.5",
}
FOLDER = "/srv/plugins/detector"
STACK = f"""Fatal Python error: Segmentation fault

Thread 0x00007f1111111111 (most recent call first):
  File "/venv/lib/python3.11/site-packages/torch/nn.py", line 324 in wait

Current thread 0x00007f2222222222 (most recent call first):
  File "INNERMOST", line 519 in work
  File "{FOLDER}/plugin.py", line 30 in detect

Extension modules: msgspec._core, numpy.core._multiarray, cv2, torch._C (total: 4)
"""


@pytest.fixture
async def engine(plugins: Path, data_dir: Path) -> AsyncIterator[Engine]:
    write_plugin(plugins, "fragile", FRAGILE, FRAGILE_TOOLS, "memory_mib = 160")
    async with hosting(plugins, data_dir) as engine:
        yield engine


async def crashed(engine: Engine, tool: str, **arguments: Any) -> Crash:
    """The bundle of a call's worker."""
    outcome = await engine.run("fragile", tool, arguments, request_id="the-request")
    assert isinstance(outcome, Broke), outcome
    crash = (await engine.crashes("fragile"))[0]
    assert (crash.reason_code, crash.reason) == (outcome.reason_code, engine.health("fragile").reason)
    assert (crash.plugin, crash.tool, crash.request_id) == ("fragile", tool, "the-request")
    assert crash.doing == f"`{tool}`"
    assert crash.ran_ms is not None
    assert 0 < crash.ran_ms < 60_000
    assert crash.memory.limit_bytes == 160 * 2**20
    return crash


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def in_the_way(path: Path) -> None:
    path.parent.mkdir()
    path.write_text("not a folder")


def files(data_dir: Path) -> list[Path]:
    return sorted((data_dir / "crashes").glob("*/*"))


async def test_a_segfault_leaves_its_stack_its_output_and_its_arguments_as_hashes(
    engine: Engine, data_dir: Path
) -> None:
    pid = engine.health("fragile").pid
    crash = await crashed(engine, "segfault", password=SECRET, n=7)
    assert (crash.by, crash.signal, crash.exit_code) == (By.ITSELF, "SIGSEGV", None)
    assert (crash.signal_sender, crash.pid, crash.incarnation) == (Sender.UNKNOWN, pid, 1)
    assert crash.native_library == "_ctypes"
    assert "plugin.py" in crash.stack
    assert crash.stack.count("most recent call first") >= 2  # all threads
    assert crash.output == "about to read nowhere"
    assert crash.error is None
    assert crash.memory.limit is None
    assert crash.arguments == (
        Argument("password", "text", len(SECRET), sha256(SECRET.encode())),
        Argument("n", "json", 1, sha256(b"7")),
    )
    assert crash.truncated == ()
    (path,) = files(data_dir)
    assert path.name.endswith(f"-1-{pid}.json")
    assert path.stat().st_mode & 0o077 == 0
    assert SECRET not in path.read_text()


async def test_a_hang_was_ended_by_the_engine_and_says_how_long_it_ran(engine: Engine, data_dir: Path) -> None:
    crash = await crashed(engine, "hang", password=SECRET)
    assert (crash.by, crash.signal, crash.signal_sender) == (By.ENGINE, "SIGKILL", Sender.ENGINE)
    assert crash.reason_code is ReasonCode.TOOL_TIMEOUT
    assert crash.ran_ms is not None
    assert crash.ran_ms >= 500
    assert "in hang" in crash.stack
    assert SECRET not in files(data_dir)[0].read_text()


async def test_memory_of_the_tree_names_the_limit_and_whose_it_was(engine: Engine) -> None:
    crash = await crashed(engine, "take", password=SECRET)
    assert (crash.by, crash.memory.limit) == (By.ENGINE, "tree")
    assert crash.memory.peak_bytes > crash.memory.limit_bytes
    processes = crash.memory.processes
    assert len(processes) >= 2
    assert crash.pid in {process.pid for process in processes}
    assert all(process.command for process in processes)
    assert [p.resident_bytes for p in processes] == sorted((p.resident_bytes for p in processes), reverse=True)


async def test_a_signal_to_itself_is_told_from_one_that_came_from_outside(engine: Engine) -> None:
    own = await crashed(engine, "suicide")
    assert (own.by, own.signal, own.signal_sender) == (By.ITSELF, "SIGKILL", Sender.ITSELF)
    assert "in `suicide`" in own.signal_sent_at
    await engine.restart("fragile")
    running = asyncio.create_task(engine.run("fragile", "wait"))
    await next_event(engine, "plugin.call.started", "fragile", after=engine.log.state.durable)
    os.kill(engine.health("fragile").pid or 0, signal.SIGTERM)
    await running
    foreign, older = await engine.crashes("fragile")  # the newest first
    assert (foreign.by, foreign.signal, foreign.signal_sender) == (By.OUTSIDE, "SIGTERM", Sender.UNKNOWN)
    assert foreign.incarnation == 2
    assert foreign.tool == "wait"
    assert older == own


async def test_an_exit_leaves_its_status(engine: Engine) -> None:
    crash = await crashed(engine, "leave")
    assert (crash.by, crash.exit_code, crash.signal, crash.signal_sender) == (By.ITSELF, 3, None, None)


async def test_an_exception_leaves_its_type_its_message_its_place_and_the_hashes_of_large_arguments(
    engine: Engine,
) -> None:
    frame = np.arange(300_000, dtype="<u2").reshape(500, 600)
    blob = os.urandom(200_000)
    options = {"n": 1, "mask": frame[:200]}
    crash = await crashed(engine, "stumble", frame=frame, blob=blob, note="ü", options=options)
    assert crash.by is By.ITSELF
    assert crash.error is not None
    assert (crash.error.error_type, crash.error.message) == ("RuntimeError", "the model is gone")
    assert "in `stumble`" in crash.error.where
    mask = frame[:200].tobytes()
    shown = b'{"n":1,"mask":"sha256:%s"}' % sha256(mask).encode()
    assert crash.arguments == (
        Argument("frame", "array", 600_000, sha256(frame.tobytes())),
        Argument("blob", "bytes", 200_000, sha256(blob)),
        Argument("note", "text", 2, sha256("ü".encode())),
        Argument("options", "json", len(shown) + len(mask), sha256(shown)),
    )


async def test_arguments_that_filled_the_arena_are_hashed_from_there(engine: Engine) -> None:
    options = {"numbers": list(range(40_000))}
    crash = await crashed(engine, "stumble", frame=np.zeros(3), blob=b"b", note=SECRET * 3_000, options=options)
    kinds = {argument.name: (argument.form, argument.size_bytes) for argument in crash.arguments}
    assert kinds["frame"] == ("array", 24)
    assert kinds["note"] == ("text", len(SECRET) * 3_000)
    assert kinds["options"][0] == "msgpack"
    assert crash.arguments[2].sha256 == sha256((SECRET * 3_000).encode())


async def test_a_crash_in_the_start_leaves_a_bundle_too(plugins: Path, data_dir: Path) -> None:
    write_plugin(
        plugins, "dies", "import ctypes\nprint('loading')\nctypes.string_at(0)\nclass Plugin: pass", ["t"]
    )
    raises = (
        "class Plugin:\n    def __init__(self, context): raise KeyError('truck')\n    def validate(self): pass"
    )
    write_plugin(plugins, "raises", raises, ["t"])
    async with hosting(plugins, data_dir) as engine:
        (dead,) = await engine.crashes("dies")
        assert (dead.doing, dead.by, dead.signal, dead.output) == ("import", By.ITSELF, "SIGSEGV", "loading")
        assert (dead.tool, dead.ran_ms, dead.arguments, dead.request_id) == (None, None, (), None)
        (raised,) = await engine.crashes("raises")
        assert raised.reason_code is ReasonCode.INIT_ERROR
        assert raised.error is not None
        assert raised.error.error_type == "KeyError"


async def test_what_ends_in_good_health_leaves_nothing(engine: Engine, data_dir: Path) -> None:
    assert (await engine.run("fragile", "look", {"path": "/"})).ok
    await engine.restart("fragile")
    assert await engine.crashes("fragile") == []
    assert files(data_dir) == []


async def test_bundles_are_bounded_in_number_and_outlive_the_engine(plugins: Path, data_dir: Path) -> None:
    write_plugin(plugins, "fragile", FRAGILE, FRAGILE_TOOLS)
    async with hosting(plugins, data_dir, crash_bundles=2) as engine:
        for _ in range(3):
            await engine.run("fragile", "leave")
            await engine.restart("fragile")
        kept = await engine.crashes("fragile")
        assert [crash.incarnation for crash in kept] == [3, 2]
    assert len(files(data_dir)) == 2
    async with hosting(plugins, data_dir) as engine:
        assert await engine.crashes("fragile") == kept


async def test_a_bundle_is_bounded_in_size_and_says_what_was_cut(engine: Engine, data_dir: Path) -> None:
    crash = await crashed(engine, "shout")
    assert "output" in crash.truncated
    assert files(data_dir)[0].stat().st_size <= MAX_BYTES


def test_the_bound_holds_for_the_worst_bundle_there_can_be(tmp_path: Path) -> None:
    worst = "\x01" * 100_000
    crash = msgspec.convert(
        {
            "plugin": "p" * 64,
            "incarnation": 2**60,
            "pid": 2**31,
            "time": "2026-01-01T00:00:00.000000Z",
            "reason_code": "worker_signal",
            "by": "itself",
            "exit_code": None,
            "signal": "SIGSEGV",
            "signal_sender": "itself",
            "memory": {
                "limit": "tree",
                "limit_bytes": 2**62,
                "peak_bytes": 2**62,
                "processes": [Process(2**31, "\x01" * 15, 2**62)] * 16,
            },
            "error": Failure(worst, worst, worst),
            "extension_modules": [worst] * 1000,
            "ran_ms": 1e300,
            "arguments": [Argument("a" * 200, "msgpack", 2**62, "f" * 64)] * 32,
            "truncated": (),
            **dict.fromkeys(("reason", "signal_sent_at", "stack", "native_library", "output"), worst),
            **dict.fromkeys(("doing", "tool", "request_id"), worst),
        },
        Crash,
        from_attributes=True,
    )
    data = encode(crash)
    assert len(data) <= MAX_BYTES
    cut = set(msgspec.json.decode(data, type=Crash).truncated)
    assert cut >= {"stack", "output", "error", "reason", "extension_modules"}


async def test_a_folder_that_cannot_be_written_is_a_counted_fault_and_in_nobodys_way(
    plugins: Path, data_dir: Path
) -> None:
    write_plugin(plugins, "fragile", FRAGILE, FRAGILE_TOOLS)
    in_the_way(data_dir / "crashes")
    with capture_logs() as logs:
        async with Engine(settings_for(plugins, data_dir)) as engine:
            outcome = await engine.run("fragile", "leave")
            assert outcome.reason_code is ReasonCode.WORKER_EXIT
            assert await engine.crashes("fragile") == []
            assert engine.faults["crashes"].count == 1
            assert "crashes" in next(part.detail for part in engine.parts() if part.name == "faults")
            assert (await engine.restart("fragile")).state == "INITIALIZED"
            await until(lambda: any(entry["log_level"] == "error" for entry in logs))
    (told,) = [entry for entry in logs if entry["log_level"] == "error"]
    assert "a crash bundle of fragile" in told["stack"]


async def test_a_foreign_or_torn_file_among_the_bundles_hides_none(engine: Engine, data_dir: Path) -> None:
    crash = await crashed(engine, "leave")
    (data_dir / "crashes" / "fragile" / "99990101T000000.000000Z-1-1.json").write_bytes(b'{"plugin": "fra')
    assert await engine.crashes("fragile") == [crash]


async def test_a_plugin_can_neither_read_nor_write_bundles(engine: Engine, data_dir: Path) -> None:
    await crashed(engine, "leave")
    await engine.restart("fragile")
    assert engine._spawner.exposed == ""
    folder = str(data_dir / "crashes")
    for content in ("", "x"):
        outcome = await engine.run("fragile", "look", {"path": folder, "content": content})
        assert outcome.value in ("FileNotFoundError", "PermissionError", "OSError")


async def test_over_http_an_uploads_hash_stays_after_the_upload_is_gone(plugins: Path, data_dir: Path) -> None:
    write_plugin(plugins, "fragile", FRAGILE, FRAGILE_TOOLS)
    write_honest(plugins)
    content = os.urandom(300_000)
    async with serving(plugins, data_dir) as lab:
        sent = form({"file": ("clip.mp4", content)}, note=SECRET)
        async with lab.http.post("/v1/plugins/fragile/tools/stumble_over/run", data=sent) as response:
            assert response.status == 502
        status, crashes = await lab.get("/v1/plugins/fragile/crashes")
        assert status == 200
        assert [(a["name"], a["form"], a["size_bytes"], a["sha256"]) for a in crashes[0]["arguments"]] == [
            ("note", "text", len(SECRET), sha256(SECRET.encode())),
            ("file", "file", 300_000, sha256(content)),
        ]
        assert SECRET not in str(crashes)
        assert await lab.get("/v1/plugins/honest/crashes") == (200, [])
        status, problem = await lab.get("/v1/plugins/fragil/crashes")
        assert status == 404
        assert "did you mean `fragile`" in problem["error"]
        await lab.run("restart", plugin="nobody")
        assert (await lab.http.post("/v1/plugins/fragile/restart")).status == 200
        assert (await lab.run("segfault", "fragile", password=SECRET, n=7))[0] == 502
        _, crashes = await lab.get("/v1/plugins/fragile/crashes")
        assert [(a["name"], a["form"], a["sha256"]) for a in crashes[0]["arguments"]] == [
            ("password", "text", sha256(SECRET.encode())),
            ("n", "json", sha256(b"7")),
        ]


async def test_the_command_line_lists_them(plugins: Path, data_dir: Path, tmp_path: Path) -> None:
    write_plugin(plugins, "fragile", FRAGILE, FRAGILE_TOOLS)
    write_honest(plugins)
    async with server_process(plugins, data_dir) as server:

        async def shown(*words: str) -> Any:
            return await asyncio.to_thread(holdfast, *words, "--url", server.url, cwd=tmp_path)

        assert (await shown("run", "fragile", "suicide")).returncode == 1
        listed, as_json, none, unknown = await asyncio.gather(
            shown("crashes", "fragile"),
            shown("crashes", "fragile", "--json"),
            shown("crashes", "honest"),
            shown("crashes", "nobody"),
        )
    assert (listed.returncode, as_json.returncode, none.returncode, unknown.returncode) == (0, 0, 0, 2)
    head, row = listed.stdout.splitlines()
    assert head.split()[:4] == ["TIME", "BY", "EXIT", "DURING"]
    assert "itself" in row
    assert "SIGKILL" in row
    assert "worker_signal: it sent SIGKILL to itself" in row
    (crash,) = msgspec.json.decode(as_json.stdout, type=list[Crash])
    assert crash.signal_sender is Sender.ITSELF
    assert len(none.stdout.splitlines()) == 1
    assert "nobody" in unknown.stderr


async def test_an_unknown_plugin_has_none(engine: Engine) -> None:
    with pytest.raises(UnknownPlugin, match="did you mean `fragile`"):
        await engine.crashes("fragil")


def death(status: ExitStatus, code: ReasonCode = ReasonCode.WORKER_SIGNAL, **known: Any) -> Death:
    seen = Evidence(**{"folder": FOLDER, "doing": "`work`", **known})
    return Death(1, 7, 0, status, seen, Cause(code, "why"), None, None, ())


KILL, SEGV = ExitStatus(signal=9), ExitStatus(signal=11)
MEMORY = ReasonCode.MEMORY_LIMIT


@pytest.mark.parametrize(
    ("dead", "by", "sender", "limit"),
    [
        (death(KILL, ReasonCode.TOOL_TIMEOUT, ending=Ending.TIMEOUT), By.ENGINE, Sender.ENGINE, None),
        (death(KILL, MEMORY, ending=Ending.MEMORY), By.ENGINE, Sender.ENGINE, "tree"),
        (death(KILL, ReasonCode.PROTOCOL_ERROR, ending=Ending.PROTOCOL), By.ENGINE, Sender.ENGINE, None),
        (death(KILL, ReasonCode.TOOL_EXCEPTION, ending=Ending.FAILED), By.ITSELF, Sender.ENGINE, None),
        (death(KILL, MEMORY, ending=Ending.FAILED, oom_kills=1), By.ITSELF, Sender.ENGINE, "process"),
        (death(KILL, MEMORY, oom_kills=1), By.KERNEL_MEMORY, Sender.KERNEL, "machine"),
        (death(ExitStatus(wire.EXIT_NO_MEMORY), MEMORY), By.ITSELF, None, "process"),
        (death(KILL, ReasonCode.KILLED_EXTERNALLY), By.OUTSIDE, Sender.UNKNOWN, None),
        (death(ExitStatus(), ReasonCode.KILLED_EXTERNALLY), By.OUTSIDE, None, None),
        (death(SEGV), By.ITSELF, Sender.UNKNOWN, None),
        (death(KILL, stack="self-signal 9 at plugin.py:3 in `f`\n"), By.ITSELF, Sender.ITSELF, None),
        (death(ExitStatus(code=3), ReasonCode.WORKER_EXIT), By.ITSELF, None, None),
    ],
)
def test_the_four_ways_to_die_are_told_apart(
    dead: Death, by: By, sender: Sender | None, limit: str | None
) -> None:
    assert (ended_by(dead), signal_sender(dead)[0], memory_limit(dead)) == (by, sender, limit)


@pytest.mark.parametrize(
    ("innermost", "library"),
    [
        ("/venv/lib/python3.11/site-packages/cv2/__init__.py", "cv2"),
        ("/venv/lib/python3.11/site-packages/numpy/linalg/linalg.py", "numpy"),
        ("/usr/lib/python3.11/ctypes/__init__.py", "_ctypes"),
        ("/usr/lib/python3.11/json/decoder.py", None),
        (f"{FOLDER}/plugin.py", None),
        ("/srv/plugins/detector/cv2/__init__.py", None),
    ],
)
def test_a_native_library_is_named_only_where_the_stack_shows_it(innermost: str, library: str | None) -> None:
    stack = STACK.replace("INNERMOST", innermost)
    assert native_library(death(SEGV, stack=stack)) == library
    assert extension_modules(stack) == ("numpy.core._multiarray", "cv2", "torch._C")
    assert native_library(death(ExitStatus(code=0), stack=stack)) is None


def test_no_evidence_at_all_names_nothing() -> None:
    assert native_library(death(SEGV)) is None
    assert extension_modules("") == ()


@pytest.mark.parametrize("data", [b"", b"\xc1", b"[1]", b"\x81\xc7", b"\xd4\x09\x01", b"\x81\xa1a\xd4\x09\x01"])
@pytest.mark.parametrize("encoding", ["python", "json", "form"])
def test_arguments_that_nobody_can_read_are_hashed_as_a_whole(data: bytes, encoding: str) -> None:
    arena_fd = os.memfd_create("arena")
    call = InFlight("work", "r", 1.0, wire.Encoded(encoding, data), '{"properties": {}}', arena_fd)
    try:
        assert call.fingerprints() == (Argument("", encoding, len(data), sha256(data)),)
    finally:
        call.close()
        os.close(arena_fd)


def test_a_name_that_is_no_parameter_is_not_shown() -> None:
    call = InFlight("work", "r", 1.0, wire.Encoded("json", b'{"s3cret": 1}'), '{"properties": {}}', -1)
    assert call.fingerprints() == (Argument("?", "json", 1, sha256(b"1")),)


async def test_too_many_deaths_for_a_slow_disk_are_counted(tmp_path: Path) -> None:
    faults: list[str] = []
    store = CrashStore(tmp_path, 5, lambda name, exc: faults.append(f"{name}: {exc}"))
    for _ in range(80):
        store.note("p", death(SEGV))
    await store.close()
    assert len(faults) == 80 - 64
    assert "crashes: 64 crash bundles wait" in faults[0]
    store.note("p", death(SEGV))  # after the end
    assert len(faults) == 80 - 64 + 1
    await until(lambda: len(files(tmp_path.parent)) == 0)
    assert len(await asyncio.to_thread(store.read, "p")) <= 5
