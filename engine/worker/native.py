"""Calls of the C library that the standard library does not offer."""

from __future__ import annotations

import ctypes
import os
import signal
from collections.abc import Iterable

libc = ctypes.CDLL(None, use_errno=True)

# Looked up now: a name is searched for in every library, and workers do not look again.
capget, capset, prctl, mount, unshare = libc.capget, libc.capset, libc.prctl, libc.mount, libc.unshare
_syscall, _sigprocmask = libc.syscall, libc.sigprocmask

_SIGNAL_SET_BYTES = 128  # sizeof(sigset_t)
_NO_SIGNALS = bytes(_SIGNAL_SET_BYTES)
_SIG_SETMASK = int(signal.SIG_SETMASK)


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
    return checked(_syscall(ctypes.c_long(number), *words), what)


def signal_fd(signals: Iterable[int]) -> int:
    """A descriptor that is readable when one of these signals, which have to be blocked, is pending.

    Raises:
        OSError: none can be had.
    """
    bits = sum(1 << (number - 1) for number in signals)
    wanted = bits.to_bytes(_SIGNAL_SET_BYTES, "little")
    return checked(libc.signalfd(-1, wanted, os.O_NONBLOCK | os.O_CLOEXEC), "signalfd")


def unblock_signals() -> None:
    """Let every signal through. What `signal.pthread_sigmask` does, without its names for each of them."""
    checked(_sigprocmask(_SIG_SETMASK, _NO_SIGNALS, None), "sigprocmask")
