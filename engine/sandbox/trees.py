"""Removing a folder that a plugin filled, however deep, wide or locked it made it.

Standard library alone, for the worker side imports it. `shutil.rmtree` recurses before Python 3.13 and holds one
descriptor per level, so a plugin that nests deep enough makes a folder that it cannot remove. Here a subfolder
that is not empty is first moved up into the folder to be removed: neither stack, descriptors nor path grow with
depth.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from pathlib import Path

_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_PLACE = os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC
_NOT_EMPTY = (errno.ENOTEMPTY, errno.EEXIST)
_ROUNDS = 10  # a file system may leave an entry out of a listing while others are removed
_MOVED_AT_ONCE = 1000  # out of one folder: file systems limit how many subfolders one folder may have


def remove_tree(path: Path) -> list[str]:
    """Remove a folder and everything in it; a link is removed, and what it points to stays.

    Folders whose permissions are in the way get others. Other file systems mounted in it stay.

    Args:
        path: the folder. There may be none, or something that is not a folder, which is removed, too.

    Returns:
        What could not be removed, one line each with the kernel's reason; nothing, if it is gone.
    """
    try:
        parent = os.open(path.parent, _PLACE)
    except FileNotFoundError:
        return []
    except OSError as exc:
        return [_line(path.name, exc)]
    try:
        return _remove(path.name, parent)
    finally:
        os.close(parent)


def _remove(name: str, parent: int) -> list[str]:
    try:
        root = _open(name, parent)
    except FileNotFoundError:
        return []
    except OSError as exc:
        if exc.errno not in (errno.ENOTDIR, errno.ELOOP):
            return [_line(name, exc)]
        left: list[str] = []
        _unlink(name, parent, left)
        return left
    try:
        removal = _Removal(root)
        for _ in range(_ROUNDS):
            removal.empty()
            try:
                os.rmdir(name, dir_fd=parent)
            except FileNotFoundError:
                return []
            except OSError as exc:
                if removal.left or exc.errno not in _NOT_EMPTY:
                    return [*removal.left, _line(name, exc)]
            else:
                return []
        return [f"{name}: something is still being put there"]
    finally:
        os.close(root)


class _Removal:
    """Empties one folder.

    Args:
        root: its descriptor.
    """

    def __init__(self, root: int) -> None:
        self.left: list[str] = []
        self._root = root
        self._device = os.fstat(root).st_dev
        self._prefix = os.urandom(8).hex()  # of the names of what is moved up: no plugin can have them already
        self._moved = 0

    def empty(self) -> None:
        """One pass over all there is."""
        try:
            pending = list(self._clear(self._root))
        except OSError as exc:
            self.left.append(_line(".", exc))
            return
        while pending:
            name = pending.pop()
            try:
                pending += self._flatten(name)
            except FileNotFoundError:
                continue
            except OSError as exc:
                self.left.append(_line(name, exc))

    def _clear(self, folder: int) -> Iterator[str]:
        """Remove its files and its empty subfolders; the others' names."""
        with os.scandir(folder) as entries:
            for entry in entries:
                try:
                    if not entry.is_dir(follow_symlinks=False):
                        _unlink(entry.name, folder, self.left)
                        continue
                    os.rmdir(entry.name, dir_fd=folder)
                except FileNotFoundError:
                    continue
                except OSError as exc:
                    if exc.errno in _NOT_EMPTY:
                        yield entry.name
                    else:
                        self.left.append(_line(entry.name, exc))

    def _flatten(self, name: str) -> list[str]:
        """Remove a subfolder of the root, or move what is below it up. What is to be removed next, last one first.

        Raises:
            OSError: it stays.
        """
        folder = _open(name, self._root)
        moved: list[str] = []
        try:
            if os.fstat(folder).st_dev != self._device:
                raise OSError(errno.EXDEV, "another file system is mounted there")
            for child in self._clear(folder):
                if len(moved) == _MOVED_AT_ONCE:
                    return [name, *moved]
                try:
                    moved.append(self._move_up(child, folder))
                except OSError as exc:
                    self.left.append(_line(child, exc))
        finally:
            os.close(folder)
        try:
            os.rmdir(name, dir_fd=self._root)
        except FileNotFoundError:
            pass
        except OSError as exc:  # what was moved up is removed all the same
            self.left.append(_line(name, exc))
        return moved

    def _move_up(self, child: str, folder: int) -> str:
        self._moved += 1
        name = f"{self._prefix}-{self._moved}"
        try:
            os.rename(child, name, src_dir_fd=folder, dst_dir_fd=self._root)
        except PermissionError:  # a folder that is moved must be writable itself: its ".." changes
            _unlock(child, folder)
            os.rename(child, name, src_dir_fd=folder, dst_dir_fd=self._root)
        return name


def _open(name: str, parent: int) -> int:
    """A folder, readable and writable where that is ours to decide. Raises OSError."""
    try:
        folder = os.open(name, _FOLDER, dir_fd=parent)
    except PermissionError:
        _unlock(name, parent)
        folder = os.open(name, _FOLDER, dir_fd=parent)
    try:
        if os.fstat(folder).st_mode & stat.S_IRWXU != stat.S_IRWXU:
            os.fchmod(folder, stat.S_IRWXU)
    except PermissionError:  # it is another user's: what cannot be removed from it will be told
        pass
    except BaseException:
        os.close(folder)
        raise
    return folder


def _unlock(name: str, parent: int) -> None:
    """Give a folder its owner's permissions. Raises OSError."""
    place = os.open(name, _PLACE | os.O_NOFOLLOW, dir_fd=parent)
    try:
        os.chmod(f"/proc/self/fd/{place}", stat.S_IRWXU)  # noqa: PTH101 - by name it would follow a link
    finally:
        os.close(place)


def _unlink(name: str, folder: int, left: list[str]) -> None:
    try:
        os.unlink(name, dir_fd=folder)
    except FileNotFoundError:
        pass
    except OSError as exc:
        left.append(_line(name, exc))


def _line(name: str, exc: OSError) -> str:
    return f"{name!a:.200}: {exc.strerror or exc}"
