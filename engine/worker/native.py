"""Calls of the C library that the standard library does not offer."""

from __future__ import annotations

import ctypes
import os

libc = ctypes.CDLL(None, use_errno=True)


def checked(result: int, what: str) -> int:
    """The result of a call, unless it failed.

    Raises:
        OSError: the call returned -1; with its `errno` and `what` was called.
    """
    if result == -1:
        errno = ctypes.get_errno()
        raise OSError(errno, f"{what}: {os.strerror(errno)}")
    return result


def syscall(what: str, number: int, *arguments: int | bytes | None) -> int:
    """A system call by its number. Raises `OSError` as `checked` does."""
    words = [ctypes.c_long(each) if isinstance(each, int) else each for each in arguments]
    return checked(libc.syscall(ctypes.c_long(number), *words), what)
