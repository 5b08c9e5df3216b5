"""Arrays over the arena, without a copy, and which of them the plugin holds on to after the call."""

from __future__ import annotations

import weakref
from importlib import import_module
from typing import Any

from engine.sandbox.arena import Span
from engine.sandbox.wire import MAX_HELD


class Lender:
    """Makes the arrays of a worker's calls.

    Args:
        arena_bytes: the arena's size. A plugin that holds a quarter of it is given copies: its hoard then counts
            as its own memory, and there is room left for the next call.
    """

    def __init__(self, arena_bytes: int) -> None:
        self._enough_bytes = arena_bytes // 4
        self._held_bytes = 0
        # Invariant: an array made here lives for as long as any view of it, since it is the base of all of them.
        self._lent: list[tuple[Span, weakref.ref[Any]]] = []

    def make(self, typestr: str, shape: tuple[int, ...], data: memoryview, span: Span | None) -> Any:
        """A read-only numpy array over `data`, which lies at `span` in the arena, if there."""
        numpy = import_module("numpy")
        if span is not None and (self._held_bytes > self._enough_bytes or len(self._lent) >= MAX_HELD):
            data, span = memoryview(bytes(data)), None
        flat = numpy.frombuffer(data, numpy.dtype(typestr))
        if span is not None:
            self._lent.append((span, weakref.ref(flat)))
        return flat.reshape(shape)

    def held(self) -> tuple[Span, ...]:
        """What must not be overwritten yet."""
        if not self._lent:
            return ()
        self._lent = [(span, array) for span, array in self._lent if array() is not None]
        self._held_bytes = sum(length for (_, length), _ in self._lent)
        return tuple(span for span, _ in self._lent)
