"""cgroup v2: when it is used and what it does then.

Most of it against a tree of plain files, in which `Kernel` follows the rules of Linux that matter here; then,
where there is one, against the real thing.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import json
import os
import select
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support import hosting, write_honest, write_plugin

from engine.errors import ReasonCode
from engine.sandbox import cgroup, evidence
from engine.sandbox.cgroup import ENGINE_LEAF, Cgroups, NotUsed, adopt
from engine.sandbox.evidence import By, Death, Sender
from engine.sandbox.verdict import Evidence, ExitStatus, verdict

MIB = 1024 * 1024
MOUNTS = (
    "20 1 0:19 / /proc rw - proc proc rw\n30 24 0:26 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw\n"
)
UNIT = "/system.slice/holdfast.service"
BOTH = "memory pids"


class Kernel:
    """What Linux does when its files are written to; notes what was done, in order."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.mount = root / "sys/fs/cgroup"
        self.done: list[str] = []
        self.refuses: int | None = None  # the number of the deed that fails

    def boot(self, own: str = UNIT, mounts: str = MOUNTS, more: str = "") -> Path:
        """A machine with the engine in the cgroup `own`, alone; returns that."""
        (self.root / "proc/self").mkdir(parents=True)
        (self.root / "proc/self/cgroup").write_text(f"{more}0::{own}\n")
        (self.root / "proc/self/mountinfo").write_text(mounts)
        path = self.mount
        self.populate(path)
        (path / "cgroup.type").unlink()
        for name in own.strip("/").split("/"):
            if name:
                path /= name
                self.populate(path)
        (path / "cgroup.procs").write_text(f"{os.getpid()}\n")
        return path

    def populate(self, path: Path, kind: str = "domain", controllers: str = f"cpu io {BOTH}") -> None:
        """Make a cgroup as the kernel would."""
        path.mkdir(parents=True, exist_ok=True)
        for name, text in {
            "cgroup.type": kind,
            "cgroup.controllers": controllers,
            "cgroup.procs": "",
            "cgroup.subtree_control": "",
            "cgroup.kill": "",
            "cgroup.events": "populated 0\nfrozen 0\n",
            "memory.max": "max",
            "memory.current": "0",
            "memory.swap.max": "max",
            "memory.oom.group": "0",
            "memory.events": "low 0\nhigh 0\nmax 0\noom 0\noom_kill 0\noom_group_kill 0\n",
            "memory.stat": "anon 0\ninactive_file 0\nactive_file 0\n",
            "memory.peak": "0",
            "pids.max": "max",
            "pids.current": "0",
        }.items():
            (path / name).write_text(text)

    def note(self, deed: str, path: Path) -> None:
        self.done.append(f"{deed} {path.relative_to(self.mount)}")
        if len(self.done) - 1 == self.refuses:
            raise OSError(errno.EROFS, "Read-only file system", str(path))

    def mkdir(self, path: Path) -> None:
        self.note("mkdir", path)
        path.mkdir()
        self.populate(path)

    def rmdir(self, path: Path) -> None:
        self.note("rmdir", path)
        if procs(path) or any(child.is_dir() for child in path.iterdir()):
            raise OSError(errno.EBUSY, "Device or resource busy", str(path))
        shutil.rmtree(path)

    def write(self, path: Path, value: int | str) -> None:
        self.note(f"{value} >", path)
        if path.name == "cgroup.procs":
            if (path.parent / "cgroup.subtree_control").read_text():
                raise OSError(errno.EBUSY, "Device or resource busy", str(path))
            for other in self.mount.rglob("cgroup.procs"):
                other.write_text("".join(f"{pid}\n" for pid in procs(other.parent) if pid != str(value)))
            path.write_text(f"{path.read_text()}{value}\n")
        elif path.name == "cgroup.subtree_control":
            if procs(path.parent) and "+" in str(value):
                raise OSError(errno.EBUSY, "Device or resource busy", str(path))
            enabled = set(path.read_text().split())
            for word in str(value).split():
                (enabled.add if word[0] == "+" else enabled.discard)(word[1:])
            path.write_text(" ".join(sorted(enabled)))
        elif path.name == "cgroup.kill":
            for below in path.parent.rglob("cgroup.procs"):
                below.write_text("")
            for below in path.parent.rglob("cgroup.events"):
                below.write_text("populated 0\nfrozen 0\n")
        else:
            assert path.exists(), f"the kernel has no {path}"
            path.write_text(f"{value}\n")


def folders(path: Path) -> list[Path]:
    """Those in a folder."""
    return [child for child in path.iterdir() if child.is_dir()]


def children(path: Path) -> list[str]:
    """The names of the cgroups in one."""
    return sorted(child.name for child in folders(path))


def procs(path: Path) -> list[str]:
    """Who is in a cgroup."""
    return (path / "cgroup.procs").read_text().split()


def delegate(path: Path) -> None:
    """Mark it as systemd does."""
    os.setxattr(path, "user.delegate", b"1")


def picture(root: Path) -> dict[str, str]:
    """All there is, and what is in it."""
    return {
        str(path.relative_to(root)): path.read_text() if path.is_file() else "folder" for path in root.rglob("*")
    }


@pytest.fixture
def kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Kernel:
    """One that has not booted."""
    fake = Kernel(tmp_path / "machine")
    for name in ("mkdir", "rmdir", "write"):
        monkeypatch.setattr(cgroup, f"_{name}", getattr(fake, name))
    return fake


@contextlib.contextmanager
def adopted(kernel: Kernel) -> Iterator[Cgroups]:
    """What is delegated, and closed in the end."""
    found = adopt("one", kernel.root)
    assert isinstance(found, Cgroups), found
    try:
        yield found
    finally:
        assert found.close()


# Whether.


def only_v1(kernel: Kernel) -> None:
    kernel.boot()
    (kernel.root / "proc/self/cgroup").write_text("4:memory:/\n3:pids:/\n1:name=systemd:/\n")


def hybrid(kernel: Kernel) -> None:
    kernel.boot(more="9:name=systemd:/\n5:cpu,cpuacct:/\n4:memory:/user\n")


def not_mounted(kernel: Kernel) -> None:
    kernel.boot(mounts="20 1 0:19 / /proc rw - proc proc rw\n")


def elsewhere_mounted(kernel: Kernel) -> None:
    kernel.boot(mounts="30 24 0:26 /system.slice/other.service /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n")


def outside_its_namespace(kernel: Kernel) -> None:
    kernel.boot()
    (kernel.root / "proc/self/cgroup").write_text("0::/../../else\n")


def the_machines_root(kernel: Kernel) -> None:
    kernel.boot("/")


def a_login_session(kernel: Kernel) -> None:
    kernel.boot("/user.slice/user-0.slice/session-3.scope")


def of_another_user(kernel: Kernel) -> None:
    os.chown(kernel.boot(), 12345, 12345)


def threaded(kernel: Kernel) -> None:
    own = kernel.boot()
    delegate(own)
    (own / "cgroup.type").write_text("threaded\n")


def root_of_threads(kernel: Kernel) -> None:
    own = kernel.boot()
    delegate(own)
    (own / "cgroup.type").write_text("domain threaded\n")


def without_memory(kernel: Kernel) -> None:
    own = kernel.boot()
    delegate(own)
    (own / "cgroup.controllers").write_text("cpu io pids\n")


def without_any(kernel: Kernel) -> None:
    own = kernel.boot()
    delegate(own)
    (own / "cgroup.controllers").write_text("\n")


def without_kill(kernel: Kernel) -> None:
    own = kernel.boot()
    delegate(own)
    (own / "cgroup.kill").unlink()


def not_alone(kernel: Kernel) -> None:
    own = kernel.boot()
    delegate(own)
    (own / "cgroup.procs").write_text(f"1\n{os.getpid()}\n77\n")


def not_alone_beside_its_subgroup(kernel: Kernel) -> None:
    own = kernel.boot(f"{UNIT}/engine")
    delegate(own.parent)
    (own.parent / "cgroup.procs").write_text("77\n")


@pytest.mark.parametrize(
    ("machine", "why"),
    [
        (only_v1, "cgroup v1 has the controllers memory and pids; boot with the unified hierarchy"),
        (hybrid, "cgroup v1 has the controllers memory; boot"),
        (not_mounted, "no cgroup2 file system is mounted"),
        (elsewhere_mounted, "no cgroup2 file system is mounted that shows the engine's own cgroup"),
        (outside_its_namespace, "no cgroup2 file system is mounted that shows the engine's own cgroup"),
        (the_machines_root, "the machine's root cgroup"),
        (a_login_session, "session-3.scope is not delegated to the engine; under systemd, set Delegate=yes"),
        (of_another_user, f"{UNIT} is not delegated"),
        (threaded, "of the type `threaded`"),
        (root_of_threads, "of the type `domain threaded`"),
        (without_memory, "has no controller memory; enable it in the cgroups above"),
        (without_any, "has no controller memory and pids"),
        (without_kill, "there is no cgroup.kill; Linux 5.14"),
        (not_alone, r"other processes (1, 77) are in holdfast.service"),
        (not_alone_beside_its_subgroup, "other processes (77) are in holdfast.service"),
    ],
)
def test_where_it_cannot_be_used_nothing_is_touched_and_the_reason_says_why(
    machine: Callable[[Kernel], None], why: str, kernel: Kernel
) -> None:
    machine(kernel)
    before = picture(kernel.root)
    found = adopt("one", kernel.root)
    assert isinstance(found, NotUsed)
    assert why in found.why
    assert found.text() == f"cgroup v2: not used: {found.why}; see docs/cgroups.md"
    assert (kernel.done, picture(kernel.root)) == ([], before)


def by_systemd(kernel: Kernel) -> Path:
    own = kernel.boot()
    delegate(own)
    return own


def to_a_subgroup(kernel: Kernel) -> Path:
    own = kernel.boot(f"{UNIT}/engine")
    delegate(own.parent)
    return own.parent


def to_a_container(kernel: Kernel) -> Path:
    own = kernel.boot("/")
    (own / "cgroup.type").write_text("domain\n")  # the root of a namespace is not that of the machine
    return own


def in_a_bind_mount(kernel: Kernel) -> Path:
    own = kernel.boot()
    delegate(own)
    mounts = f"30 24 0:26 {UNIT} /run/my\\040cgroup rw - cgroup2 cgroup2 rw\n"
    (kernel.root / "proc/self/mountinfo").write_text(mounts)
    (kernel.root / "run").mkdir()
    (kernel.root / "run/my cgroup").symlink_to(own)
    kernel.mount = kernel.root / "run/my cgroup"
    return kernel.mount


def as_before(kernel: Kernel) -> Path:
    own = kernel.boot(f"{UNIT}/{ENGINE_LEAF}")
    (own.parent / "cgroup.subtree_control").write_text(BOTH)
    return own.parent


@pytest.mark.parametrize("machine", [by_systemd, to_a_subgroup, to_a_container, in_a_bind_mount, as_before])
def test_what_is_delegated_is_found(machine: Callable[[Kernel], Path], kernel: Kernel) -> None:
    delegated = machine(kernel)
    with adopted(kernel) as found:
        assert found.delegated == delegated
        assert found.text() == f"cgroup v2: used: each worker has its own below {delegated}"
        assert procs(delegated) == []
        (ours,) = [path for path in delegated.iterdir() if path.is_dir() and str(os.getpid()) in procs(path)]
        assert ours.name == ("engine" if machine is to_a_subgroup else ENGINE_LEAF)
        assert set((delegated / "cgroup.subtree_control").read_text().split()) == {"memory", "pids"}


def test_what_is_the_engines_users_own_is_delegated_to_it(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    own = kernel.boot()
    os.chown(own, 12345, 12345)
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    with adopted(kernel) as found:
        assert found.delegated == own


# How.


def test_the_engine_moves_first_then_come_the_controllers_then_the_leaves_and_all_goes_in_reverse(
    kernel: Kernel,
) -> None:
    by_systemd(kernel)
    with adopted(kernel) as found:
        leaf = found.leaf(512 * MIB, 128)
        leaf.end()
    at = UNIT[1:]
    assert kernel.done == [
        f"mkdir {at}/{ENGINE_LEAF}",
        f"{os.getpid()} > {at}/{ENGINE_LEAF}/cgroup.procs",
        f"+memory +pids > {at}/cgroup.subtree_control",
        f"mkdir {at}/holdfast-one",
        f"+memory +pids > {at}/holdfast-one/cgroup.subtree_control",
        f"mkdir {at}/holdfast-one/1",
        f"{528 * MIB} > {at}/holdfast-one/1/memory.max",
        f"1 > {at}/holdfast-one/1/memory.oom.group",
        f"0 > {at}/holdfast-one/1/memory.swap.max",
        f"384 > {at}/holdfast-one/1/pids.max",
        f"1 > {at}/holdfast-one/1/cgroup.kill",
        f"rmdir {at}/holdfast-one/1",
        f"1 > {at}/holdfast-one/cgroup.kill",
        f"rmdir {at}/holdfast-one",
    ]


@pytest.mark.parametrize("deed", range(5))
def test_a_kernel_that_refuses_half_way_finds_everything_as_it_was(deed: int, kernel: Kernel) -> None:
    by_systemd(kernel)
    before = picture(kernel.root)
    kernel.refuses = deed
    found = adopt("one", kernel.root)
    assert isinstance(found, NotUsed)
    assert "the kernel refused: Read-only file system" in found.why
    assert picture(kernel.root) == before


@pytest.mark.parametrize("deed", range(4))
def test_a_leaf_that_cannot_have_its_limits_is_not_there(deed: int, kernel: Kernel) -> None:
    by_systemd(kernel)
    with adopted(kernel) as found:
        kernel.refuses = len(kernel.done) + deed
        with pytest.raises(OSError, match="Read-only"):
            found.leaf(MIB, 1)
        assert [path.name for path in found.group.iterdir() if path.is_dir()] == []
        assert found.leaf(MIB, 1).end().removed


def test_a_kernel_that_counts_no_swap_has_no_limit_of_it(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    by_systemd(kernel)
    with adopted(kernel) as found:

        def mkdir(path: Path) -> None:
            kernel.mkdir(path)
            (path / "memory.swap.max").unlink()
            (path / "memory.peak").unlink()

        monkeypatch.setattr(cgroup, "_mkdir", mkdir)
        assert found.leaf(MIB, 1).end() == (0, 0, False, True)


def test_a_leaf_tells_in_the_end_what_happened(kernel: Kernel) -> None:
    by_systemd(kernel)
    with adopted(kernel) as found:
        leaf = found.leaf(256 * MIB, 16)
        (leaf.path / "memory.events").write_text("low 0\nhigh 0\nmax 812\noom 1\noom_kill 4\noom_group_kill 1\n")
        (leaf.path / "memory.peak").write_text(f"{272 * MIB}\n")
        assert leaf.end() == (272 * MIB, 4, True, True)


def test_who_was_killed_for_the_machines_memory_was_not_at_the_leafs_limit(kernel: Kernel) -> None:
    by_systemd(kernel)
    with adopted(kernel) as found:
        leaf = found.leaf(256 * MIB, 16)
        (leaf.path / "memory.events").write_text("low 0\nhigh 0\nmax 0\noom 0\noom_kill 2\n")
        assert (leaf.end().oom_kills, found.leaf(MIB, 1).end().at_limit) == (2, False)


def test_a_process_that_does_not_die_is_not_waited_for_for_ever(
    kernel: Kernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    by_systemd(kernel)
    monkeypatch.setattr(cgroup, "_REMOVE_S", 0.05)
    with adopted(kernel) as found:
        leaf = found.leaf(MIB, 1)

        def write(path: Path, value: int | str) -> None:
            if path.parent == leaf.path:
                (path.parent / "cgroup.events").write_text("populated 1\nfrozen 0\n")
            else:
                kernel.write(path, value)

        with monkeypatch.context() as deaf:
            deaf.setattr(cgroup, "_write", write)
            assert not leaf.end().removed
        assert leaf.path.is_dir()


def test_what_a_killed_engine_left_is_ended_and_removed_and_what_a_living_one_has_is_not(kernel: Kernel) -> None:
    delegated = by_systemd(kernel)
    for name in ("holdfast-dead", "holdfast-alive"):
        for path in (delegated / name, delegated / name / "1", delegated / name / "2"):
            kernel.populate(path)
        (delegated / name / "2/cgroup.procs").write_text("4242\n")
        (delegated / name / "2/cgroup.events").write_text("populated 1\nfrozen 0\n")
    kernel.populate(delegated / "not-ours")
    lock = os.open(delegated / "holdfast-alive", os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    try:
        with adopted(kernel):
            names = {path.name for path in delegated.iterdir() if path.is_dir()}
            assert names == {ENGINE_LEAF, "holdfast-one", "holdfast-alive", "not-ours"}
            assert procs(delegated / "holdfast-alive/2") == ["4242"]
            at = UNIT[1:]
            assert f"1 > {at}/holdfast-dead/cgroup.kill" in kernel.done
            assert not any("kill" in deed and "alive" in deed for deed in kernel.done)
    finally:
        os.close(lock)


# What is said.


def killed(**known: Any) -> Evidence:
    return Evidence(folder="/srv/greedy", doing="`work`", memory_limit_bytes=256 * MIB, **known)


@pytest.mark.parametrize(
    ("known", "reason", "limit"),
    [
        (
            {"oom_kills": 3, "cgroup_limit": True},
            "killed by the kernel for memory during `work`, at its cgroup's limit: its limit is 256 MiB; use less",
            "tree",
        ),
        (
            {"oom_kills": 1},
            "the kernel ended it for want of memory during `work`: its limit is 256 MiB",
            "machine",
        ),
    ],
)
def test_the_kernels_kill_for_memory_is_told_as_that(known: dict[str, Any], reason: str, limit: str) -> None:
    status, found = ExitStatus(signal=signal.SIGKILL), killed(**known)
    cause = verdict(status, found).cause
    assert cause is not None
    assert cause.reason_code is ReasonCode.MEMORY_LIMIT
    assert cause.reason.startswith(reason)
    death = Death(1, 7, 0, status, found, cause, None, None, ())
    assert evidence.ended_by(death) is By.KERNEL_MEMORY
    assert evidence.signal_sender(death) == (Sender.KERNEL, "")
    assert evidence.memory_limit(death) == limit


async def test_readyz_says_whether_cgroups_are_used(plugins: Path, data_dir: Path) -> None:
    write_honest(plugins)
    async with hosting(plugins, data_dir) as engine:
        (part,) = [part for part in engine.parts() if part.name == "cgroup"]
        assert part.ok
        assert part.detail.startswith(("cgroup v2: used: ", "cgroup v2: not used: "))


# The real thing.


def mounted_cgroup2() -> Path | None:
    """A cgroup2 file system of this machine, with whatever controllers."""
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        fields, _, kind = line.partition(" - ")
        if kind.startswith("cgroup2 "):
            return Path(fields.split()[4])
    return None


@pytest.fixture
def real_cgroup() -> Iterator[Path]:
    """A cgroup of this machine, made for the test and empty. It may have no controllers."""
    mounted = mounted_cgroup2()
    if mounted is None:
        pytest.skip("no cgroup2 file system is mounted here")
    path = mounted / f"holdfast-test-{os.getpid()}"
    try:
        path.mkdir()
    except OSError as exc:
        pytest.skip(f"no cgroup can be made here: {exc}")
    yield path
    if path.exists():
        assert cgroup._kill_and_remove(path)


DAEMON = """
import os, sys
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        os.setsid()
        print(os.getpid(), flush=True)
        os.closerange(0, 100)
        while True:
            import signal; signal.pause()
    os._exit(0)
os.wait()
"""


def test_a_double_fork_into_another_session_does_not_leave_the_cgroup_and_dies_with_it(real_cgroup: Path) -> None:
    leaf = real_cgroup / "1"
    leaf.mkdir()
    fd = os.open(leaf / "cgroup.procs", os.O_WRONLY)
    code = f"import os; os.write({fd}, b'0\\n'); os.close({fd})\n{DAEMON}"
    told = subprocess.run(  # as the fork server's child does it: by a descriptor, into which it writes 0
        [sys.executable, "-c", code], pass_fds=[fd], stdout=subprocess.PIPE, check=True, timeout=20
    ).stdout
    os.close(fd)
    daemon = int(told)
    assert procs(leaf) == [str(daemon)]
    pidfd = os.pidfd_open(daemon)
    assert cgroup._kill_and_remove(leaf)
    assert not leaf.exists()
    dead = select.poll()
    dead.register(pidfd, select.POLLIN)
    assert dead.poll(20_000)
    os.close(pidfd)


@pytest.fixture
def real_delegation(real_cgroup: Path) -> Path:
    """The same with the controllers, delegated as systemd does it."""
    available = (real_cgroup.parent / "cgroup.controllers").read_text().split()
    if lacking := [name for name in cgroup.CONTROLLERS if name not in available]:
        pytest.skip(
            f"cgroup v2 has no controller {' and '.join(lacking)} here; cgroup v1 holds them, or nothing does"
        )
    above = real_cgroup.parent / "cgroup.subtree_control"
    missing = [name for name in cgroup.CONTROLLERS if name not in above.read_text().split()]
    try:
        for name in missing:
            cgroup._write(above, f"+{name}")
        delegate(real_cgroup)
    except OSError as exc:
        pytest.skip(f"no cgroup with memory and pids can be had here: {exc}")
    return real_cgroup


HOST = """
import asyncio, json, sys
from pathlib import Path
from support import settings_for
from engine import Engine
from pathlib import Path

async def main(root, data, tool):
    async with Engine(settings_for(Path(root), Path(data))) as engine:
        (part,) = [part for part in engine.parts() if part.name == "cgroup"]
        health = engine.health("greedy")
        print(json.dumps({"part": part.detail, "state": health.state, "pid": health.pid,
                          "cgroup": Path(f"/proc/{health.pid}/cgroup").read_text().strip(),
                          "own": Path("/proc/self/cgroup").read_text().strip()}), flush=True)
        outcome = await engine.run("greedy", tool)
        crashes = await engine.crashes("greedy")
        group = engine._spawner._cgroups.group
        print(json.dumps({"reason": engine.health("greedy").reason, "code": engine.health("greedy").reason_code,
                          "value": outcome.value if outcome.ok else None,
                          "by": crashes[0].by if crashes else None,
                          "limit": crashes[0].memory.limit if crashes else None,
                          "peak": crashes[0].memory.peak_bytes if crashes else None,
                          "leaves": sorted(path.name for path in group.iterdir() if path.is_dir()),
                          "faults": {name: fault.last for name, fault in engine.faults.items()}}), flush=True)
        if tool == "breeds":
            again = await engine.restart("greedy")
            leaves = sorted(path.name for path in group.iterdir() if path.is_dir())
            print(json.dumps({"again": again.state, "leaves": leaves}), flush=True)

asyncio.run(main(*sys.argv[1:]))
"""
GREEDY = """
import os, signal, socket
class Plugin:
    def __init__(self, context): pass
    def validate(self): pass
    def hoards_in_sockets(self) -> None:
        held = []                       # the kernel's memory, of no process: only a cgroup sees it
        while True:
            ends = socket.socketpair()
            ends[0].setblocking(False)
            ends[0].setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
            try:
                while True:
                    ends[0].send(b"x" * 65536)
            except BlockingIOError:
                held.append(ends)
    def breeds(self) -> list[int]:
        pids = []
        for _ in range(3):
            source, sink = os.pipe()
            if os.fork() == 0:
                os.setsid()
                pid = os.fork()
                if pid == 0:
                    os.write(sink, str(os.getpid()).encode())
                    while True: signal.pause()
                os._exit(0)
            os.wait()
            pids.append(int(os.read(source, 20)))
        return pids
"""


async def hosted_in(delegated: Path, tmp_path: Path, tool: str) -> tuple[list[dict[str, Any]], int]:
    """An engine that starts inside that cgroup; what it prints, and its exit status."""
    write_plugin(tmp_path / "plugins", "greedy", GREEDY, ["hoards_in_sockets", "breeds"], limits="memory_mib = 96")
    command = f'echo $$ > "{delegated}/cgroup.procs" && exec "$0" "$@"'
    process = await asyncio.create_subprocess_exec(
        *("sh", "-c", command, sys.executable, "-c", HOST),
        *(str(tmp_path / "plugins"), str(tmp_path / "data"), tool),
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parent)},
    )
    out, _ = await asyncio.wait_for(process.communicate(), 120)
    lines = [line for line in out.splitlines() if line.startswith(b"{")]
    return [json.loads(line) for line in lines], process.returncode or 0


async def test_a_real_kernel_ends_a_worker_at_its_cgroups_limit_and_the_verdict_says_so(
    real_delegation: Path, tmp_path: Path
) -> None:
    (begun, ended), code = await hosted_in(real_delegation, tmp_path, "hoards_in_sockets")
    name = real_delegation.name
    assert begun["part"] == f"cgroup v2: used: each worker has its own below {real_delegation}"
    assert begun["own"].endswith(f"/{name}/{ENGINE_LEAF}")
    assert f"/{name}/holdfast-" in begun["cgroup"]
    assert begun["cgroup"].endswith("/1")
    assert (
        "killed by the kernel for memory during `hoards_in_sockets`, at its cgroup's limit: its limit is 96 MiB"
        in (ended["reason"])
    )
    assert (ended["code"], ended["by"], ended["limit"]) == ("memory_limit", "kernel_memory", "tree")
    assert 96 * MIB <= ended["peak"] <= 112 * MIB + 4096
    assert (ended["leaves"], ended["faults"], code) == ([], {}, 0)
    assert children(real_delegation) == [ENGINE_LEAF]


async def test_a_real_leaf_goes_with_its_worker_and_everything_it_started(
    real_delegation: Path, tmp_path: Path
) -> None:
    (_, bred, restarted), code = await hosted_in(real_delegation, tmp_path, "breeds")
    assert (bred["leaves"], bred["faults"]) == (["1"], {})
    assert (restarted, code) == ({"again": "INITIALIZED", "leaves": ["2"]}, 0)
    assert not {f"{pid}" for pid in bred["value"]} & {path.name for path in folders(Path("/proc"))}
