"""What a plugin may not do to others, tried by real processes: by default, and with what `[sandbox]` asks for."""

from __future__ import annotations

import asyncio
import ctypes
import errno
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator
from importlib.util import find_spec
from pathlib import Path

import attacks
import pytest
from support import hosting, until, write_honest, write_plugin

from engine import Engine
from engine.errors import ReasonCode
from engine.loader.containment import check_sandbox
from engine.loader.manifest import read_manifest
from engine.sandbox import wire
from engine.sandbox.containment import Support, supported
from engine.sandbox.verdict import failed_start
from engine.settings import load as load_settings
from engine.worker import contain, load, mounts

CODE = Path(attacks.__file__).read_text()
DENIED = "PermissionError"
SECRET = ctypes.create_string_buffer(b"secret of the engine")  # what an attacker would read in this process

needs = pytest.mark.skipif
without_landlock = needs(not supported().signals, reason=f"no signal scope: {supported().landlock_name}")
without_seccomp = needs(not supported().seccomp, reason="no seccomp")
not_root = needs(os.geteuid() != 0, reason="only root could do this in the first place")


def write_attacker(root: Path, sandbox: str = "", name: str = "attacker", code: str = CODE) -> Path:
    """A plugin that tries what it is told, under a `[sandbox]`."""
    return write_plugin(root, name, code, ["attempt"], head=f"[sandbox]\n{sandbox}")


async def tries(engine: Engine, what: str, target: object = "", way: str = "itself") -> str:
    """What came of an attempt of the attacker's."""
    outcome = await engine.run("attacker", "attempt", {"what": what, "target": str(target), "way": way})
    assert outcome.ok, outcome
    return str(outcome.value)


@pytest.fixture
def secrets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a token in holdfast.toml."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "holdfast.toml").write_text('token = "very-secret"\n')
    return tmp_path


@pytest.fixture
async def engine(plugins: Path, data_dir: Path, secrets: Path) -> AsyncIterator[Engine]:
    """An engine with an attacker under the default sandbox, and an honest plugin."""
    write_attacker(plugins)
    write_honest(plugins)
    async with hosting(plugins, data_dir) as engine:
        yield engine


def victims(engine: Engine) -> dict[str, int]:
    """Processes that are none of the attacker's business."""
    reaper, fork_server = engine._spawner.reaper_pid, engine._spawner.fork_server_pid
    honest = engine.health("honest").pid
    assert reaper is not None
    assert fork_server is not None
    assert honest is not None
    return {"engine": os.getpid(), "reaper": reaper, "fork server": fork_server, "another worker": honest}


def process_attacks(pid: int) -> dict[str, object]:
    """Attack → target, on a process. The address is one of this process, whoever `pid` is."""
    at = f"{pid}:{ctypes.addressof(SECRET)}"
    own = ("signal", "signal_thread", "signal_pidfd", "trace", "environ", "descriptors", "steal_descriptor")
    return {
        **dict.fromkeys((*own, "limit", "nice", "scheduler"), pid),
        "peek": at,
        "vm_read": at,
        "read": f"/proc/{pid}/root/etc/passwd",
    }


# By default.


def test_every_attack_on_a_process_succeeds_from_outside_a_sandbox() -> None:
    got = {what: attacks.program(what, str(target)) for what, target in process_attacks(os.getpid()).items()}
    assert got == dict.fromkeys(got, "done")


@without_landlock
@without_seccomp
@pytest.mark.parametrize("way", list(attacks.WAYS))
async def test_a_plugin_cannot_signal_trace_or_change_the_engine(engine: Engine, way: str) -> None:
    got = {what: await tries(engine, what, target, way) for what, target in process_attacks(os.getpid()).items()}
    assert got == dict.fromkeys(got, DENIED)


@without_landlock
@without_seccomp
@pytest.mark.parametrize("victim", ["fork server", "another worker"])
async def test_a_plugin_cannot_signal_trace_or_change_its_siblings(engine: Engine, victim: str) -> None:
    pid = victims(engine)[victim]
    got = {what: await tries(engine, what, target) for what, target in process_attacks(pid).items()}
    assert got == dict.fromkeys(got, DENIED)
    assert (await engine.run("honest", "echo")).ok


@pytest.mark.parametrize("victim", ["engine", "reaper", "fork server", "another worker"])
async def test_a_plugin_cannot_have_the_kernel_end_or_starve_others_first(engine: Engine, victim: str) -> None:
    pid = victims(engine)[victim]
    score = await asyncio.to_thread(Path(f"/proc/{pid}/oom_score_adj").read_text)
    for what in ("oom_score", "share"):
        assert await tries(engine, what, pid) in ("OSError", "FileNotFoundError")  # read-only; not every kernel's
    assert await asyncio.to_thread(Path(f"/proc/{pid}/oom_score_adj").read_text) == score


@without_landlock
async def test_a_plugin_can_signal_and_look_into_itself(engine: Engine) -> None:
    pid = engine.health("attacker").pid
    assert pid is not None
    for what in ("signal", "signal_pidfd", "environ", "limit", "nice", "scheduler"):
        assert await tries(engine, what, pid) == "done", what


@pytest.mark.parametrize("way", list(attacks.WAYS))
async def test_a_plugin_cannot_read_the_data_folder_or_the_token(
    engine: Engine, secrets: Path, data_dir: Path, way: str
) -> None:
    assert engine._spawner.exposed == ""
    for hidden in (data_dir / "events.db", data_dir / "audit.jsonl", secrets / "holdfast.toml"):
        assert hidden.stat().st_size
        assert await tries(engine, "read", hidden, way) == "FileNotFoundError"
        assert await tries(engine, "read", f"/proc/{os.getpid()}/root{hidden}", way) == DENIED
    assert await tries(engine, "write", data_dir / "events.db", way) == "OSError"  # a read-only file system


async def test_the_engine_itself_goes_on_seeing_its_data_folder(engine: Engine, data_dir: Path) -> None:
    assert {"events.db", "audit.jsonl", "scratch"} <= set(os.listdir(data_dir))  # noqa: PTH208 - not async
    assert await tries(engine, "write", "made-by-the-plugin") == "done"
    assert files(str(data_dir), "scratch/*/*/made-by-the-plugin")


async def test_files_made_later_beside_the_data_folder_are_seen(engine: Engine, tmp_path: Path) -> None:
    (tmp_path / "later").write_text("x")
    assert await tries(engine, "read", tmp_path / "later") == "done"
    assert await tries(engine, "make", tmp_path / "made") == "done"
    assert await tries(engine, "rename", f"{tmp_path / 'later'}:{tmp_path / 'made' / 'renamed'}") == "done"
    assert await tries(engine, "link", f"{tmp_path / 'made' / 'renamed'}:{tmp_path / 'linked'}") == "done"


def files(folder: str, pattern: str) -> list[Path]:
    """What there is."""
    return list(Path(folder).glob(pattern))


@without_landlock
@not_root
async def test_root_in_a_worker_can_neither_mount_nor_command_the_kernel(engine: Engine, data_dir: Path) -> None:
    for what, target in {
        "mount": "/mnt",
        "unmount": data_dir,
        "namespace_mount": "/mnt",
        "device": "disk",
        "raise_limit": "",
    }.items():
        assert await tries(engine, what, target) in (DENIED, "ValueError"), what
    for switch in ("/proc/sys/kernel/core_pattern", *files("/sys/fs/cgroup", "**/cgroup.procs")):
        assert await tries(engine, "write", switch) == "OSError", switch  # a read-only file system


def is_readable_disk(path: Path) -> bool:
    """Whether it is a block device with something on it."""
    return path.is_block_device() and attacks.attempt("read", str(path)) == "done"


@not_root
async def test_root_in_a_worker_cannot_read_the_disk_below_the_file_system(engine: Engine) -> None:
    for disk in filter(is_readable_disk, files("/dev", "*")):
        assert await tries(engine, "read", disk) == "FileNotFoundError"


HONEST_WORK = """
import multiprocessing, os, signal, subprocess, sys, tempfile, threading
from multiprocessing import shared_memory
def double(n): return 2 * n
class Plugin:
    def __init__(self, context): self.scratch = context.scratch
    def validate(self): pass
    def numpy(self) -> float:
        import numpy
        return float((numpy.ones((300, 300)) @ numpy.ones((300, 300)))[0, 0])
    def cv2(self) -> list[int]:
        import cv2, numpy
        return list(cv2.resize(numpy.zeros((64, 64, 3), numpy.uint8), (32, 16)).shape)
    def torch(self) -> float:
        import torch
        return float((torch.ones(300, 300) @ torch.ones(300, 300))[0, 0])
    def processes(self) -> list[int]:
        with multiprocessing.get_context("fork").Pool(2) as pool: return pool.map(double, [1, 2])
    def spawned(self) -> str:
        return subprocess.check_output([sys.executable, "-c", "print(6 * 7)"], text=True)
    def manager(self) -> int:
        with multiprocessing.Manager() as manager: return len(manager.list([1, 2]))
    def shared(self) -> int:
        block = shared_memory.SharedMemory(create=True, size=64)
        block.buf[0] = 7
        value = block.buf[0]
        block.close(); block.unlink()
        return value
    def temporary(self) -> bytes:
        with tempfile.NamedTemporaryFile() as file:
            file.write(b"kept"); file.flush()
            return open(file.name, "rb").read()
    def ends_its_child(self) -> int:
        child = subprocess.Popen(["sleep", "60"])
        child.send_signal(signal.SIGTERM)
        return child.wait()
    def thread(self) -> str:
        named = threading.Thread(target=lambda: open("/dev/null", "w").write("x"), name="worker")
        named.start(); named.join()
        return open("/proc/self/status").read(5)
"""
WORK: dict[str, object] = {
    "processes": [2, 4],
    "spawned": "42\n",
    "manager": 2,
    "shared": 7,
    "temporary": b"kept",
    "ends_its_child": -15,
    "thread": "Name:",
    "numpy": 300.0,
    "cv2": [16, 32, 3],
    "torch": 300.0,
}


@pytest.fixture
def short_dir() -> Iterator[Path]:
    """A data folder of a short name: a manager's socket lies below it, and 108 characters are the most for one."""
    with tempfile.TemporaryDirectory(prefix="hf") as folder:
        yield Path(folder)


@pytest.mark.parametrize(
    "sandbox",
    ["", 'filesystem = "read-only"', 'filesystem = "listed"\nnetwork = false'],
    ids=["open", "ro", "listed"],
)
async def test_honest_work_goes_on_in_every_sandbox(sandbox: str, plugins: Path, short_dir: Path) -> None:
    wanted = {
        tool: value for tool, value in WORK.items() if tool not in ("numpy", "cv2", "torch") or find_spec(tool)
    }
    write_plugin(plugins, "honest", HONEST_WORK, list(wanted), head=f"[sandbox]\n{sandbox}")
    async with hosting(plugins, short_dir) as engine:
        for tool, value in wanted.items():
            outcome = await engine.run("honest", tool)
            assert outcome.ok, (tool, outcome)
            assert outcome.value == value


STRICTEST = 'network = false\nfilesystem = "listed"'


async def test_a_contained_worker_still_dies_with_the_fork_server(plugins: Path, data_dir: Path) -> None:
    write_attacker(plugins, STRICTEST)
    write_honest(plugins)
    async with hosting(plugins, data_dir) as engine:
        pid = engine.health("attacker").pid
        os.kill(victims(engine)["fork server"], signal.SIGKILL)
        await until(lambda: not os.path.exists(f"/proc/{pid}"))  # noqa: PTH110


# No network.


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    """A local server."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server


@without_seccomp
@pytest.mark.parametrize("way", list(attacks.WAYS))
async def test_without_network_no_socket_but_a_unix_one_can_be_made(
    plugins: Path, data_dir: Path, listener: socket.socket, way: str
) -> None:
    write_attacker(plugins, "network = false")
    port = listener.getsockname()[1]
    async with hosting(plugins, data_dir) as engine:
        for what in ("tcp", "udp", "tcp6", "netlink", "packet", "io_uring"):
            assert await tries(engine, what, port, way) == DENIED, what
        assert await tries(engine, "pair", way=way) == "done"


async def test_with_network_a_plugin_connects_and_sends(
    plugins: Path, data_dir: Path, listener: socket.socket
) -> None:
    write_attacker(plugins, "network = true")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as receiver:
        receiver.bind(("127.0.0.1", 0))
        receiver.setblocking(False)
        async with hosting(plugins, data_dir) as engine:
            assert await tries(engine, "tcp", listener.getsockname()[1]) == "done"
            assert await tries(engine, "udp", receiver.getsockname()[1]) == "done"
        assert receiver.recv(8) == b"x"


@without_landlock
@pytest.mark.parametrize(("network", "expected"), [("true", "done"), ("false", DENIED)])
async def test_abstract_unix_sockets_of_others_count_as_network(
    plugins: Path, data_dir: Path, network: str, expected: str
) -> None:
    write_attacker(plugins, f"network = {network}")
    name = f"holdfast-test-{os.getpid()}"
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(f"\0{name}")
        server.listen()
        async with hosting(plugins, data_dir) as engine:
            assert await tries(engine, "abstract", name) == expected


# The file system.


def outside(tmp_path: Path) -> dict[str, str]:
    """Attack → target, on files that are none of the plugin's business."""
    folder = tmp_path / "outside"
    (folder / "sub").mkdir(parents=True, exist_ok=True)
    (folder / "file").write_text("x")
    file = str(folder / "file")
    return {
        "write": file,
        "truncate": file,
        "make": str(folder / "made"),
        "rename": f"{file}:{folder / 'sub' / 'renamed'}",
        "link": f"{file}:{folder / 'linked'}",
        "remove": file,
    }


@needs(not supported().filesystem, reason="no Landlock")
@pytest.mark.parametrize("filesystem", ["read-only", "listed"])
@pytest.mark.parametrize("way", list(attacks.WAYS))
async def test_a_plugin_writes_to_its_scratch_folder_and_what_it_may_write_only(
    plugins: Path, data_dir: Path, tmp_path: Path, filesystem: str, way: str
) -> None:
    (tmp_path / "given").mkdir()
    folder = write_attacker(plugins, f'filesystem = "{filesystem}"\nwrite = ["{tmp_path / "given"}"]')
    targets = outside(tmp_path)
    async with hosting(plugins, data_dir) as engine:
        for what, target in targets.items():
            assert await tries(engine, what, target, way) in (DENIED, "OSError"), what
        assert await tries(engine, "write", folder / "plugin.py", way) == DENIED
        assert await tries(engine, "write", "/tmp/holdfast-stray", way) == DENIED
        assert await tries(engine, "write", "in-scratch", way) == "done"
        assert await tries(engine, "write", tmp_path / "given" / "file", way) == "done"
        assert await tries(engine, "read", tmp_path / "given" / "file", way) == "done"
        assert await tries(engine, "shared_memory", way=way) == "done"
    assert (tmp_path / "outside" / "file").read_text() == "x"


@needs(not supported().filesystem, reason="no Landlock")
async def test_a_plugin_reads_everything_in_a_read_only_file_system(
    plugins: Path, data_dir: Path, tmp_path: Path
) -> None:
    write_attacker(plugins, 'filesystem = "read-only"')
    async with hosting(plugins, data_dir) as engine:
        assert await tries(engine, "read", outside(tmp_path)["write"]) == "done"
        assert await tries(engine, "read", data_dir / "events.db") == "FileNotFoundError"


@needs(not supported().filesystem, reason="no Landlock")
@pytest.mark.parametrize("way", list(attacks.WAYS))
async def test_a_listed_file_system_is_the_plugins_own_and_what_it_may_read(
    plugins: Path, data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    for name in ("private", "given"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text("x")
    monkeypatch.setenv("GIVEN", str(tmp_path / "given"))
    folder = write_attacker(plugins, 'filesystem = "listed"\nread = ["${GIVEN}/file"]')
    async with hosting(plugins, data_dir) as engine:
        assert await tries(engine, "read", tmp_path / "private" / "file", way) == DENIED
        assert await tries(engine, "list", tmp_path, way) == DENIED
        assert await tries(engine, "read", "/etc/shadow", way) == DENIED
        assert await tries(engine, "read", folder / "plugin.py", way) == "done"
        assert await tries(engine, "read", tmp_path / "given" / "file", way) == "done"
        assert await tries(engine, "write", tmp_path / "given" / "file", way) == DENIED


@needs(not supported().filesystem, reason="no Landlock")
async def test_a_listed_plugin_reads_its_model_and_the_files_of_a_call(
    plugins: Path, data_dir: Path, tmp_path: Path
) -> None:
    model = tmp_path / "elsewhere" / "model.bin"
    model.parent.mkdir()
    model.write_bytes(os.urandom(64))
    head = f'[models]\nm = "{model}"\n[sandbox]\nfilesystem = "listed"'
    write_plugin(plugins, "attacker", CODE, ["attempt"], head=head)
    async with hosting(plugins, data_dir) as engine:
        upload = engine.scratch_root / "uploads" / "request" / "1.jpg"
        upload.parent.mkdir(parents=True)
        upload.write_bytes(b"jpeg")
        assert await tries(engine, "read", model) == "done"
        assert await tries(engine, "read", upload) == "done"


# Where the kernel cannot.


@pytest.mark.parametrize(
    ("sandbox", "words"),
    [
        ("network = false", ["network = false needs seccomp"]),
        ('filesystem = "read-only"', ["needs the Landlock of Linux 6.2", "this kernel has no Landlock"]),
    ],
)
async def test_a_plugin_does_not_run_with_less_than_it_asks_for(
    sandbox: str, words: list[str], plugins: Path, data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engine.loader.containment.supported", lambda: Support(landlock_abi=0, seccomp=False))
    write_attacker(plugins, sandbox)
    async with hosting(plugins, data_dir) as engine:
        health = engine.health("attacker")
        assert (health.state, health.reason_code) == ("UNAVAILABLE", "sandbox_unsupported")
        assert health.reason is not None
        assert [word for word in words if word not in health.reason] == []


async def test_a_plugin_that_asks_for_nothing_runs_on_any_kernel(
    plugins: Path, data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engine.loader.containment.supported", lambda: Support(landlock_abi=0, seccomp=False))
    write_honest(plugins)
    async with hosting(plugins, data_dir) as engine:
        assert (await engine.run("honest", "echo")).ok


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ('write = ["/no/such/place"]', ["write names /no/such/place", "does not exist"]),
        ('write = ["${NO_SUCH_VARIABLE}/x"]', ["variable NO_SUCH_VARIABLE is not set"]),
    ],
)
def test_a_path_that_cannot_be_given_is_named(lines: str, words: list[str], plugins: Path) -> None:
    folder = write_attacker(plugins, f'filesystem = "read-only"\n{lines}')
    (finding,) = check_sandbox(read_manifest(folder), folder, {})
    assert finding.reason_code is ReasonCode.SANDBOX_UNSUPPORTED
    assert [word for word in words if word not in finding.reason] == []


def test_a_data_folder_that_holds_what_workers_need_is_not_hidden(tmp_path: Path) -> None:
    above = Path(sys.prefix).parent
    assert f"{above} holds what workers need" in mounts.hide([above], tmp_path)


async def test_a_plugin_inside_the_data_folder_is_told_to_move(tmp_path: Path) -> None:
    data_dir = tmp_path / "data"
    write_honest(data_dir / "plugins")
    async with hosting(data_dir / "plugins", data_dir) as engine:
        health = engine.health("honest")
        assert (health.state, health.reason_code) == ("UNAVAILABLE", "sandbox_unsupported")
        assert "hidden from plugins" in (health.reason or "")


def test_a_kernel_that_refuses_unexpectedly_ends_the_start(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def refuse(_: wire.Start) -> None:
        raise OSError(errno.E2BIG, os.strerror(errno.E2BIG))

    monkeypatch.setattr(contain, "_apply", refuse)
    start = wire.Start("p", str(tmp_path), "p:P", {}, b"\x80", str(tmp_path), {}, 1, 1)
    with pytest.raises(load.Refused) as refused:
        contain.apply(start)
    cause = failed_start(refused.value.report, 0)
    assert cause.reason_code is ReasonCode.SANDBOX_UNSUPPORTED
    assert "could not be contained (Argument list too long)" in cause.reason


# Landlock nests sixteen deep, and a process inside may not mount: no worker can be contained, nothing hidden.
TOO_DEEP = """
import asyncio, sys
from pathlib import Path
from engine import Engine, Settings
from engine.worker import confine
from engine.worker.landlock import Access, Scope, restrict
confine.prctl(confine.PR_SET_NO_NEW_PRIVS, 1)
for _ in range(16):
    restrict(Access.MAKE_CHAR | Access.REFER, [("/", Access.REFER)], Scope(0))
async def main():
    plugins, data = map(Path, sys.argv[1:])
    settings = Settings(plugin_dirs=(plugins,), bundled=False, entry_points=False, data_dir=data)
    async with Engine(settings) as engine:
        health = engine.health("honest")
        print(health.state, health.reason_code, health.reason, engine._spawner.exposed, sep="|")
asyncio.run(main())
"""


@without_landlock
def test_a_worker_that_cannot_be_contained_runs_nothing_of_the_plugin(plugins: Path, data_dir: Path) -> None:
    ran = plugins.parent / "ran"
    write_plugin(plugins, "honest", f"open({str(ran)!r}, 'w')\nclass Plugin: pass", ["echo"])
    command = [sys.executable, "-c", TOO_DEEP, str(plugins), str(data_dir)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1], check=False)
    state, code, reason, exposed = done.stdout.splitlines()[-1].split("|")
    assert (state, code) == ("UNAVAILABLE", "sandbox_unsupported"), done.stderr
    assert "could not be contained" in reason
    assert "no mount namespace can be made here" in exposed
    assert not ran.exists()


UNPRIVILEGED = """
import ctypes, os, sys
from pathlib import Path
import attacks
from engine.sandbox import wire
from engine.worker import confine, contain, mounts
work = Path(sys.argv[1])
os.setgroups([]); os.setgid(65534); os.setuid(65534)
confine.prctl(4, 1)  # PR_SET_DUMPABLE, which a change of user takes away
engine = os.getpid()
exposed = mounts.hide([work / "data"], work / "data" / "scratch")
if os.fork():
    os.wait()
    sys.exit()
confine.prctl(confine.PR_SET_NO_NEW_PRIVS, 1)
contain.apply(wire.Start("p", str(work), "p:P", {}, b"", str(work / "data" / "scratch"), {}, 1, 1))
tried = [attacks.attempt("signal", str(engine)), attacks.attempt("trace", str(engine))]
tried += [attacks.attempt("read", str(work / "data" / "events.db"))]
tried += [attacks.attempt("unmount", str(work / "data"))]
tried += [attacks.attempt("write", str(work / "data" / "scratch" / "file"))]
print(repr(exposed), *tried, sep="|")
"""


@without_landlock
@not_root
def test_another_user_than_root_is_contained_in_a_user_namespace(short_dir: Path) -> None:
    if attacks.program("namespace_mount", str(short_dir)) == DENIED:
        pytest.skip("no user namespaces")
    scratch = short_dir / "data" / "scratch"
    scratch.mkdir(parents=True)
    (short_dir / "data" / "events.db").write_text("x")
    for path in (short_dir, short_dir / "data", scratch):
        os.chown(path, 65534, 65534)
    command = [sys.executable, "-c", UNPRIVILEGED, str(short_dir)]
    environment = {**os.environ, "PYTHONPATH": f"{Path(__file__).parent}:{Path(__file__).parents[1]}"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.stdout.strip() == f"''|{DENIED}|{DENIED}|FileNotFoundError|{DENIED}|done", done.stderr


def test_what_the_kernel_cannot_do_by_default_is_said_in_one_line() -> None:
    assert Support(7, seccomp=True).text("") == "Landlock 7, seccomp, data folder hidden"
    old = Support(5, seccomp=True).text("no mount namespace can be made here")
    assert "not prevented: signals to the engine (Landlock of Linux 6.12)" in old
    assert "reading the data folder: no mount namespace can be made here" in old
    assert Support(0, seccomp=False).missing() != Support(7, seccomp=True).missing() == []


async def test_a_config_file_of_another_name_and_what_is_to_be_hidden_are_hidden_too(
    plugins: Path, data_dir: Path, tmp_path: Path
) -> None:
    write_plugin(plugins, "attacker", CODE, ["attempt"])
    config, secret = tmp_path / "engine.toml", tmp_path / "secret"
    await asyncio.to_thread(config.write_text, f'token = "sekret"\nhidden = ["{secret}"]\n')
    await asyncio.to_thread(secret.write_text, "sekret")
    given = {"plugin_dirs": [plugins], "bundled": False, "entry_points": False, "data_dir": data_dir}
    settings = await asyncio.to_thread(load_settings, given, env={}, file=config)
    assert settings.hidden == (secret, config)
    async with Engine(settings) as engine:
        for path in (config, secret):
            assert await tries(engine, "read", path) != "done"
