"""A mount namespace for the fork server, and so for every worker: what a plugin must not see is not there.

Made once, before the first worker, so a worker's start costs nothing more. A path-based ruleset (Landlock) could
only list what *is* to be seen: it would have to name every sibling on the way to the data folder, and would hide
whatever appears beside them later. Here, one folder is covered and the rest of the file system is as it was.

Leaving is not possible from inside: a worker has no right to mount or unmount (`landlock`), and may not look
through /proc into a process that is outside (ptrace's rule, again Landlock's).

As root by `unshare(CLONE_NEWNS)`; as another user in a user namespace of its own, where the kernel allows one.
Constants are from linux/mount.h and linux/sched.h.
"""

from __future__ import annotations

import contextlib
import os
import stat
import struct
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from engine.worker import native
from engine.worker.native import checked, syscall

_CLONE_NEWNS = 0x00020000
_CLONE_NEWUSER = 0x10000000
_CLONE_NEWIPC = 0x08000000
_MS_REMOUNT = 32
_SHM = b"/dev/shm"
_MS_NOSUID_NODEV_NOEXEC = 2 | 4 | 8
_MS_BIND = 4096
_MS_REC = 16384
_MS_SLAVE = 1 << 19
_MOUNT_SETATTR = 442  # on every architecture
_MOUNT_ATTR = struct.Struct("=QQQQ")  # attr_set, attr_clr, propagation, userns_fd
_MOUNT_ATTR_RDONLY = 1
_AT_FDCWD = -100
_AT_RECURSIVE = 0x8000

_SHM_FILE_BYTES = 4096  # of its size, so many files of this size: each costs the kernel memory beside it

# Through these, who writes there commands the kernel (core_pattern, sysrq, cgroup.kill); containers do the same.
_KERNEL_SWITCHES = ("/sys", "/proc/sys", "/proc/sysrq-trigger", "/proc/irq", "/proc/bus")


def hide(private: Sequence[Path], keep: Path) -> str:
    """Enter a mount namespace in which `private` is hidden; needs a process with one thread.

    Args:
        private: folders, which are then empty, and files, which then are. Those that do not exist are passed over.
        keep: a folder that stays to be seen, inside one of them or not.

    Returns:
        "" or, in words, why this could not be done. Nothing is half done then.
    """
    present = [path.resolve() for path in private if path.exists()]
    for path in present:
        if needed := next((each for each in _interpreter() if each.is_relative_to(path)), None):
            return f"{path} holds what workers need ({needed}); put the data folder elsewhere"
    # In a child first: half a namespace cannot be left again.
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            _enter(present, keep.resolve())
            code = 0
        except OSError as exc:
            code = min(exc.errno or 1, 255)
        finally:
            os._exit(code)
    errno = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if errno:
        return f"no mount namespace can be made here ({os.strerror(errno)}); allow one, or run plugins elsewhere"
    _enter(present, keep.resolve())
    return ""


def own_shm() -> str:
    """In a worker: a /dev/shm, and POSIX message queues, of its own, which are gone when its last process is.

    Needs a process with one thread.

    Returns:
        "" or, in words, why this could not be done.
    """
    try:
        checked(native.unshare(_CLONE_NEWNS | _CLONE_NEWIPC), "unshare(CLONE_NEWNS | CLONE_NEWIPC)")
        _mount(None, b"/", None, _MS_REC | _MS_SLAVE)
        _mount(b"holdfast", _SHM, b"tmpfs", _MS_NOSUID_NODEV_NOEXEC, b"size=1m,mode=1777")
    except OSError as exc:
        fact = f"{_SHM.decode()} is shared with other processes ({exc.strerror})"
        return f"{fact}: what is left there outlives the plugin"
    return ""


def limit_shm(size_bytes: int) -> None:
    """Let it hold that much."""
    options = b"size=%d,nr_inodes=%d" % (size_bytes, max(1024, size_bytes // _SHM_FILE_BYTES))
    _mount(b"holdfast", _SHM, b"tmpfs", _MS_NOSUID_NODEV_NOEXEC | _MS_REMOUNT, options)


def seal_proc() -> None:
    """In a worker with a mount namespace of its own: /proc can be read only.

    Otherwise a plugin of the engine's user could make the engine the first that the kernel's OOM killer takes, or
    the last that gets a processor. Both stand below /proc/PID, where Landlock does not tell processes apart.
    """
    _set_read_only(b"/proc", 0)


def _interpreter() -> Iterator[Path]:
    """What workers import from."""
    for path in (sys.prefix, sys.base_prefix, *sys.path, __file__):
        if path:
            yield Path(path).resolve()


def _enter(private: Sequence[Path], keep: Path) -> None:
    root = os.geteuid() == 0
    try:
        checked(native.unshare(_CLONE_NEWNS), "unshare(CLONE_NEWNS)")
    except PermissionError:
        root = False
        _enter_user_namespace()
    _mount(None, b"/", None, _MS_REC | _MS_SLAVE)
    for path in private:
        if path.is_dir():
            _cover(path, keep)
        else:
            _mount(b"/dev/null", os.fsencode(path), None, _MS_BIND)
    for switches in map(os.fsencode, _KERNEL_SWITCHES):
        if Path(os.fsdecode(switches)).exists():
            _mount(switches, switches, None, _MS_BIND | _MS_REC)
            _set_read_only(switches, _AT_RECURSIVE)
    if root:  # whom a disk's permissions do not stop
        for device in _disks():
            _mount(b"/dev/null", os.fsencode(device), None, _MS_BIND)


def _enter_user_namespace() -> None:
    """Be allowed to mount, as the same user and group."""
    uid, gid = os.geteuid(), os.getegid()
    checked(native.unshare(_CLONE_NEWUSER | _CLONE_NEWNS), "unshare(CLONE_NEWUSER)")
    Path("/proc/self/setgroups").write_text("deny")
    Path("/proc/self/uid_map").write_text(f"{uid} {uid} 1")
    Path("/proc/self/gid_map").write_text(f"{gid} {gid} 1")


def _cover(folder: Path, keep: Path) -> None:
    """Put an empty, read-only folder over one; with `keep` in its old place, if that was inside."""
    inside = keep != folder and keep.is_relative_to(folder)
    kept = os.open(keep, os.O_PATH | os.O_CLOEXEC) if inside else None
    try:
        covered = os.fsencode(folder)
        _mount(b"holdfast", covered, b"tmpfs", _MS_NOSUID_NODEV_NOEXEC, b"size=64k,mode=755")
        if kept is not None:
            keep.mkdir(mode=0o700, parents=True)
            _mount(b"/proc/self/fd/%d" % kept, os.fsencode(keep), None, _MS_BIND | _MS_REC)
        _set_read_only(covered, 0)
    finally:
        if kept is not None:
            os.close(kept)


def _disks() -> Iterator[str]:
    for folder, subfolders, names in os.walk("/dev"):
        if folder == "/dev":
            subfolders[:] = [name for name in subfolders if name not in ("shm", "pts", "mqueue", "hugepages")]
        for name in names:
            path = os.path.join(folder, name)  # noqa: PTH118 - hundreds of them, each of them a string
            with contextlib.suppress(FileNotFoundError):
                if stat.S_ISBLK(os.lstat(path).st_mode):
                    yield path


def _mount(source: bytes | None, target: bytes, kind: bytes | None, flags: int, data: bytes | None = None) -> None:
    checked(native.mount(source, target, kind, flags, data), "mount")


def _set_read_only(path: bytes, flags: int) -> None:
    attributes = _MOUNT_ATTR.pack(_MOUNT_ATTR_RDONLY, 0, 0, 0)
    syscall("mount_setattr", _MOUNT_SETATTR, _AT_FDCWD, path, flags, attributes, len(attributes))
