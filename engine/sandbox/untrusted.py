"""Decoding what a plugin may have written, on the event loop: bounded in time and memory by its size.

Not by msgspec, which makes a tuple of an array that is the key of a map. The hash of a tuple of numbers is no
secret: with keys that were chosen so, 350 kB keep a dict busy for seconds, and 8 MiB for most of an hour.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgpack  # type: ignore[import-untyped]  # it ships no types

from engine.sandbox.values import NoJsonForm, TooManyValues

# Of one value. An empty list is one byte and becomes 56, so bytes alone say little.
MAX_CONTAINERS = 262_144
_KEYS = (str, int, float)  # what an honest worker sends


class Unpacker:
    """Decodes one MessagePack value after the other.

    Args:
        extension: makes the value of an extension's code and data.
    """

    def __init__(self, extension: Callable[[int, Any], Any]) -> None:
        self._extension = extension
        self._containers = 0

    def decode(self, data: Any) -> Any:
        """The value.

        Raises:
            TooManyValues: it has more lists, maps and extensions than a value may have.
            NoJsonForm: it has a key that is neither text nor a number.
            Exception: it is none, or nested deeper than 511.
        """
        self._containers = 0
        return self.nested(data)

    def nested(self, data: Any) -> Any:
        """A part of the value that lies elsewhere: what it contains counts with the rest."""
        return msgpack.unpackb(
            data,
            object_pairs_hook=self._map,
            list_hook=self._list,
            ext_hook=self._ext,
            strict_map_key=False,  # of keys, `_map` takes care
            timestamp=3,
        )

    def _count(self) -> None:
        self._containers += 1
        if self._containers > MAX_CONTAINERS:
            raise TooManyValues(f"more than {MAX_CONTAINERS} lists and maps")

    def _map(self, pairs: list[tuple[Any, Any]]) -> dict[Any, Any]:
        self._count()
        for key, _ in pairs:
            if key.__class__ not in _KEYS:
                kind = "tuple" if isinstance(key, list) else type(key).__name__
                raise NoJsonForm(f"a key of type `{kind}` has no JSON form; use text")
        return dict(pairs)

    def _list(self, items: list[Any]) -> list[Any]:
        self._count()
        return items

    def _ext(self, code: int, data: bytes) -> Any:
        self._count()
        return self._extension(code, data)
