"""The log's file as the operating system sees it: whose it is, what it is called, whether it is still there."""

from __future__ import annotations

import contextlib
import fcntl
import os
from datetime import UTC, datetime
from pathlib import Path

from events.record import LogUnavailable

SIDE_FILES = ("-wal", "-shm")


def take_lock(path: Path) -> int:
    """A descriptor that holds the lock beside `path`, its folder made if need be.

    One engine per log; the kernel drops the lock with the process, `kill -9` included. Raises LogUnavailable.
    """
    name = path.with_name(path.name + ".lock")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        fd = os.open(name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as exc:
        step = "choose a data folder that this user can write"
        raise LogUnavailable(path, f"its folder cannot be written ({exc.strerror})", step) from exc
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as exc:
        os.close(fd)
        step = "stop it, or choose another data folder"
        raise LogUnavailable(path, "another engine has it open", step) from exc
    return fd


def identity(path: Path) -> tuple[int, int] | None:
    """Which file stands at `path`; None is none."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino


def move_aside(path: Path, label: str) -> Path:
    """Rename the database and its side files to `<name>.<label>-<UTC time>…`, over nothing that exists.

    Returns the database's new path. Raises OSError.
    """
    stamp = datetime.now(UTC).strftime("%Y%m%dT%H%M%S.%fZ")
    target, attempt = path.with_name(f"{path.name}.{label}-{stamp}"), 0
    while any(Path(f"{target}{end}").exists() for end in ("", *SIDE_FILES)):
        attempt += 1
        target = path.with_name(f"{path.name}.{label}-{stamp}.{attempt}")
    for end in ("", *SIDE_FILES):
        with contextlib.suppress(FileNotFoundError):
            Path(f"{path}{end}").rename(f"{target}{end}")
    return target


def sync_folder(folder: Path) -> None:
    """Make a created or renamed entry survive lost power."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
