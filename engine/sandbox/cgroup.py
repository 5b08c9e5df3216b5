"""cgroup v2, where a part of its tree is delegated to the engine: memory limits that the kernel itself keeps.

    delegated                 given to us: by systemd (`Delegate=yes`), a container's runtime, chown
      ├─ holdfast-engine      the engine and the fork server: a cgroup with children must hold no process itself
      └─ holdfast-ID          this engine's workers; locked for as long as it lives
           ├─ 1               a worker and everything it starts: memory.max, pids.max
           └─ 2

A worker is put into its leaf before any plugin code runs, and nothing that it starts can leave that: another
session, a double fork and another parent make no difference. So its end, `cgroup.kill`, is everybody's.

`adopt` alone decides whether cgroups are used: for all workers, or, with a reason, for none. All of this blocks.
See Documentation/admin-guide/cgroup-v2.rst of Linux, and CGROUP_DELEGATION of systemd.
"""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import os
import re
import select
import time
from pathlib import Path
from typing import Final, NamedTuple

CONTROLLERS: Final = ("memory", "pids")
ENGINE_LEAF: Final = "holdfast-engine"
_GROUP: Final = "holdfast-"
# The plugin's report that it ran out of memory (RLIMIT_DATA) needs some, and so do its page tables.
RESERVE_BYTES: Final = 16 * 1024 * 1024
# The watch ends a plugin that has more processes than it may, and says so; a fork that fails would say less. This
# is for those that are faster than the watch.
PIDS_MARGIN: Final = 256
_REMOVE_S: Final = 5.0  # for processes that were killed to be gone
_OCTAL = re.compile(r"\\([0-7]{3})")


class NotUsed(NamedTuple):
    """Cgroups are not used; `why` is for people."""

    why: str

    def text(self) -> str:
        """One line for people."""
        return f"cgroup v2: not used: {self.why}; see docs/cgroups.md"


class End(NamedTuple):
    """What a leaf tells in the end."""

    peak_bytes: int  # 0: the kernel does not tell (before Linux 5.19)
    oom_kills: int  # processes that the kernel ended for want of memory, here or on the machine
    at_limit: bool  # the leaf was at its own limit and nothing in it could be freed
    removed: bool  # False: a process in it does not die


class Leaf:
    """The cgroup of one worker.

    Raises (from all that reads or writes): OSError.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        # Opened by us: the permission to enter is asked of whoever opened it, and workers see a read-only /sys.
        self.procs_fd: int | None = os.open(path / "cgroup.procs", os.O_WRONLY | os.O_CLOEXEC)

    def close(self) -> None:
        """Nobody else enters."""
        fd, self.procs_fd = self.procs_fd, None
        if fd is not None:
            os.close(fd)

    def end(self) -> End:
        """Kill what is left in it, wait until that is gone, and remove it."""
        self.close()
        events = _pairs(self.path / "memory.events")
        peak_bytes = 0
        with contextlib.suppress(FileNotFoundError):
            peak_bytes = int(_read(self.path / "memory.peak"))
        removed = _kill_and_remove(self.path)
        return End(peak_bytes, events.get("oom_kill", 0), events.get("oom", 0) > 0, removed)


class Cgroups:
    """The leaves of one engine's workers. Made by `adopt`."""

    def __init__(self, delegated: Path, group: Path, lock: int) -> None:
        self.delegated = delegated
        self.group = group
        self._lock = lock
        self._numbers = itertools.count(1)

    def text(self) -> str:
        """One line for people."""
        return f"cgroup v2: used: each worker has its own below {self.delegated}"

    def leaf(self, memory_bytes: int, processes: int) -> Leaf:
        """A new leaf, with its limits set.

        Raises:
            OSError: the kernel refused; nothing is left of it.
        """
        path = self.group / str(next(self._numbers))
        _mkdir(path)
        try:
            _write(path / "memory.max", memory_bytes + RESERVE_BYTES)
            _write(path / "memory.oom.group", 1)  # all of it or nothing: half a plugin is of no use
            if (path / "memory.swap.max").exists():  # not where the kernel counts no swap
                _write(path / "memory.swap.max", 0)
            _write(path / "pids.max", processes + PIDS_MARGIN)
            return Leaf(path)
        except BaseException:
            _rmdir(path)
            raise

    def close(self) -> bool:
        """End whatever is left of the workers and remove their cgroups. The engine stays in its leaf.

        Returns:
            Whether nothing is left.
        """
        try:
            return _kill_and_remove(self.group)
        finally:
            os.close(self._lock)


def adopt(instance: str, root: Path = Path("/")) -> Cgroups | NotUsed:
    """Take over what is delegated to this process: move it into a leaf, remove what dead engines left behind.

    Args:
        instance: names this engine among those that share a delegated cgroup.
        root: of the file system; another one in tests.

    Returns:
        The cgroups, ready for leaves; or why they are not used, and then nothing was changed.
    """
    try:
        found = _find(root)
        if isinstance(found, NotUsed):
            return found
        own, delegated = found
        if (why := _unfit(own, delegated)) is not None:
            return NotUsed(why)
        return _take(own, delegated, instance)
    except OSError as exc:
        what = f" ({exc.filename})" if exc.filename else ""
        return NotUsed(f"the kernel refused: {exc.strerror}{what}")


def _find(root: Path) -> tuple[Path, Path] | NotUsed:
    """Our own cgroup, and the one that is delegated to us: that, or its parent."""
    memberships = [line.split(":", 2) for line in _read(root / "proc/self/cgroup").splitlines()]
    on_v1 = {name for number, names, _ in memberships if number != "0" for name in names.split(",")}
    if taken := [name for name in CONTROLLERS if name in on_v1]:
        return NotUsed(f"cgroup v1 has the controllers {' and '.join(taken)}; boot with the unified hierarchy")
    path = next((path for number, _, path in memberships if number == "0"), None)
    own = None if path is None else _mounted(root, path)
    if path is None or own is None or ".." in path.split("/"):
        return NotUsed("no cgroup2 file system is mounted that shows the engine's own cgroup")
    if not (own / "cgroup.type").exists():
        return NotUsed("the engine runs in the machine's root cgroup, which is not to be delegated")
    owner = own.stat().st_uid
    if own.name == ENGINE_LEAF:  # an engine of this process has been here
        return own, own.parent
    if _marked(own) or (path == "/" and os.access(own, os.W_OK)):  # "/": the root of a cgroup namespace
        return own, own
    if _marked(own.parent):  # systemd's DelegateSubgroup
        return own, own.parent
    if owner != 0 and owner == os.geteuid():
        return own, own
    return NotUsed(f"{path} is not delegated to the engine; under systemd, set Delegate=yes for its unit")


def _mounted(root: Path, path: str) -> Path | None:
    """Where a cgroup is in the file system."""
    for line in _read(root / "proc/self/mountinfo").splitlines():
        # number parent device root mount-point options … - type source options; see proc(5).
        fields, _, kind = line.partition(" - ")
        shown, mount_point = (_unescaped(field) for field in fields.split()[3:5])
        prefix = shown.rstrip("/")
        if kind.split()[0] == "cgroup2" and (path == shown or path.startswith(prefix + "/")):
            return root / mount_point.lstrip("/") / path[len(prefix) :].lstrip("/")
    return None


def _unescaped(field: str) -> str:
    return _OCTAL.sub(lambda found: chr(int(found[1], 8)), field)


def _marked(path: Path) -> bool:
    """Whether systemd has marked it as delegated; for those without privileges, since its version 251."""
    for name in ("user.delegate", "trusted.delegate"):
        with contextlib.suppress(OSError):
            if os.getxattr(path, name) == b"1":
                return True
    return False


def _unfit(own: Path, delegated: Path) -> str | None:
    """Why what is delegated cannot be used, in words."""
    kind = _read(delegated / "cgroup.type")
    if kind != "domain":
        return f"{delegated.name} is of the type `{kind}`, and memory is counted in a `domain` only"
    available = _read(delegated / "cgroup.controllers").split()
    if missing := [name for name in CONTROLLERS if name not in available]:
        return f"{delegated.name} has no controller {' and '.join(missing)}; enable it in the cgroups above"
    if not (own / "cgroup.kill").exists():
        return "there is no cgroup.kill; Linux 5.14 has it"
    if others := [pid for pid in _read(delegated / "cgroup.procs").split() if pid != str(os.getpid())]:
        return (
            f"other processes ({', '.join(others[:3])}) are in {delegated.name}, and a cgroup with children may "
            f"hold none; start the engine alone in it"
        )
    return None


def _take(own: Path, delegated: Path, instance: str) -> Cgroups:
    """Move in. Invariant: where this raises, everything is as it was."""
    with contextlib.ExitStack() as undo:
        if own == delegated:
            engine = delegated / ENGINE_LEAF
            if not engine.exists():
                _mkdir(engine)
                undo.callback(_rmdir, engine)
            _write(engine / "cgroup.procs", os.getpid())
            undo.callback(_write, delegated / "cgroup.procs", os.getpid())
        _enable(delegated, undo)
        _remove_stale(delegated)
        group = delegated / f"{_GROUP}{instance}"
        _mkdir(group)
        undo.callback(_rmdir, group)
        lock = os.open(group, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        undo.callback(os.close, lock)
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        _enable(group, undo)
        undo.pop_all()
    return Cgroups(delegated, group, lock)


def _enable(path: Path, undo: contextlib.ExitStack) -> None:
    """Have the controllers in the children of a cgroup."""
    control = path / "cgroup.subtree_control"
    enabled = _read(control).split()
    if new := [name for name in CONTROLLERS if name not in enabled]:
        _write(control, " ".join(f"+{name}" for name in new))
        undo.callback(_write, control, " ".join(f"-{name}" for name in new))


def _remove_stale(delegated: Path) -> None:
    """What engines left behind that are gone: the lock on it ended with them."""
    for group in sorted(delegated.glob(f"{_GROUP}*")):
        if group.name == ENGINE_LEAF:
            continue
        with contextlib.suppress(OSError):  # it lives, or another engine was faster
            lock = os.open(group, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                _kill_and_remove(group)
            finally:
                os.close(lock)


def _kill_and_remove(path: Path) -> bool:
    """End everything in a cgroup and below, and remove it; whether that came to pass in time."""
    _write(path / "cgroup.kill", 1)
    deadline = time.monotonic() + _REMOVE_S
    with (path / "cgroup.events").open() as events:
        changed = select.poll()
        changed.register(events, select.POLLPRI)
        while "populated 0" not in events.read():  # zombies do not count
            left_s = deadline - time.monotonic()
            if left_s <= 0:
                return False
            changed.poll(left_s * 1000)
            events.seek(0)
    for folder, _, _ in os.walk(path, topdown=False):
        _rmdir(Path(folder))
    return True


def _mkdir(path: Path) -> None:
    path.mkdir()  # the kernel puts its files there


def _rmdir(path: Path) -> None:
    path.rmdir()  # the files in it are the kernel's and go with it


def _read(path: Path) -> str:
    return path.read_text().strip()


def _write(path: Path, value: int | str) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)  # makes no file where the kernel has none
    try:
        os.write(fd, f"{value}\n".encode())
    except OSError as exc:
        raise OSError(exc.errno, exc.strerror, str(path)) from exc
    finally:
        os.close(fd)


def _pairs(path: Path) -> dict[str, int]:
    """A flat keyed file, as `memory.events`."""
    return {name: int(value) for name, value in (line.split() for line in _read(path).splitlines())}
