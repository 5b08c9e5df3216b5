"""The code that is called: ten faults and one honest function, the same for every peer.

Standard library only: Holdfast is given a copy of this file as a plugin, the pools import it.
"""

from __future__ import annotations

import ctypes
import itertools
import os
import sys
import threading
from collections.abc import Callable

WORKED = "worked"
ALLOCATION_BYTES = 3 << 30
_BLOCK_BYTES = 16 << 20


class Unspeakable(Exception):
    """An exception that cannot be printed."""

    def __str__(self) -> str:
        raise RuntimeError("no words")


def raises() -> None:
    """Raise."""
    raise ValueError("frame 7 has no pixels")


def exits() -> None:
    """Leave Python the polite way."""
    sys.exit(3)


def exits_at_once() -> None:
    """Leave without a word."""
    os._exit(3)


def segfaults() -> None:
    """Read address 0."""
    ctypes.string_at(0)


def aborts() -> None:
    """SIGABRT, as an assertion in C would."""
    os.abort()


def loops() -> None:
    """Never return, in Python."""
    while True:
        pass


def loops_in_c() -> None:
    """Never return, in C: the GIL is held throughout, and no Python signal handler ever runs."""
    sum(itertools.repeat(0))


def allocates() -> int:
    """Take 3 GiB block by block, every page written; returns how many bytes it got."""
    taken: list[bytes] = []
    while len(taken) * _BLOCK_BYTES < ALLOCATION_BYTES:
        taken.append(b"x" * _BLOCK_BYTES)
    return len(taken) * _BLOCK_BYTES


def returns_a_lock() -> object:
    """Return what no encoding has a form for."""
    return threading.Lock()


def raises_unspeakable() -> None:
    """Raise what cannot be printed."""
    raise Unspeakable


FAULTS: dict[str, Callable[[], object]] = {
    fault.__name__: fault
    for fault in (
        raises,
        exits,
        exits_at_once,
        segfaults,
        aborts,
        loops,
        loops_in_c,
        allocates,
        returns_a_lock,
        raises_unspeakable,
    )
}


def work() -> str:
    """The honest function."""
    return WORKED


def misbehave(fault: str) -> object:
    """Run the fault of that name."""
    return FAULTS[fault]()


class Plugin:
    """The same functions as a Holdfast plugin."""

    def __init__(self, _context: object) -> None: ...

    def validate(self) -> None:
        """Nothing to check."""

    def work(self) -> str:
        """The honest function."""
        return work()

    def misbehave(self, fault: str) -> object:
        """Run the fault of that name."""
        return misbehave(fault)
