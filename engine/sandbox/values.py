"""Arguments and results as MessagePack: what crosses inside a frame, and what crosses in the arena.

Plain values, dataclasses and short bytes go inline. Arrays, and anything whose encoding is long, go through the
arena where there is one. Both sides encode the same way; they differ in what an array becomes.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable
from pathlib import PurePath
from typing import Any, Protocol, TypeAlias

from msgspec import msgpack

from engine.sandbox.arena import THRESHOLD_BYTES, Arena, Span

# MessagePack extension codes of what MessagePack itself does not know.
EXT_ARENA_BYTES = 1  # (offset, length): bytes in the arena
EXT_ARENA_ARRAY = 2  # (typestr, shape, offset, length): an array in the arena
EXT_ARENA_VALUE = 3  # (offset, length): the encoding of the whole value, in the arena
EXT_ARRAY = 4  # (typestr, shape, data): an array, inline
EXT_FILE = 5  # path: a file that the caller sent

# Of plain values: numbers, texts, containers. They grow when they are decoded, up to fifty times (an empty list is
# one byte and becomes 56), and the engine decodes on its event loop. Bytes and arrays do not count.
MAX_VALUE_BYTES = 8 * 1024 * 1024
_MAX_DIMENSIONS = 64  # numpy's own limit
_MAX_EMPTY = 2**31  # the other dimensions of an array that has no elements

# From typestr, shape, data, and where in the arena the data lies, if there.
MakeArray: TypeAlias = Callable[[str, tuple[int, ...], memoryview, Span | None], Any]

# The typestr of numpy's array interface: byte order, kind, bytes per element (characters for `U`), unit of time.
# Only kinds that hold their own bytes: numbers, booleans, times, text.
_TYPESTR = re.compile(r"[<>|=]([biufcmMSUV])(\d{1,9})(?:\[\w{1,8}\])?")
_BUFFERS = (bytes, bytearray)  # a union would be made anew for each of a million items
_SEQUENCES = (list, tuple)
_pack = msgpack.encode


class TooManyValues(ValueError):
    """More plain values than the other side would want to decode at once."""


class NoJsonForm(ValueError):
    """A value that decodes and cannot be shown to a caller."""


class FilePart:
    """A file among the arguments of a form."""

    def __init__(self, path: str) -> None:
        self.path = path


class Payloads(Protocol):
    """Where large parts go: an arena."""

    def write(self, data: memoryview | bytes | bytearray) -> Span:
        """Keep `data`. Returns where it lies. Raises ArenaFull."""


class Encoder:
    """Encodes what the other side is to have.

    Args:
        arena: where large parts go; None puts everything inline.
    """

    def __init__(self, arena: Payloads | None) -> None:
        self._arena = arena
        self._encoder = msgpack.Encoder(enc_hook=self._hook)

    def encode(self, value: Any, max_value_bytes: int | None = None) -> bytes:
        """The MessagePack of a value.

        Args:
            value: JSON-able values, dataclasses, bytes, paths, and arrays (anything with numpy's array interface).
            max_value_bytes: of its plain values.

        Raises:
            TypeError, ValueError, OverflowError, RecursionError, UnicodeEncodeError: it has no encoding.
            ArenaFull: it is larger than the arena.
            TooManyValues: its plain values are longer than `max_value_bytes`.
        """
        arena = self._arena
        # Not its `encode`: where no memory is left for the output, msgspec 0.22 crashes there instead of raising.
        encoded = bytearray()
        self._encoder.encode_into(value if arena is None else _outsourced(value, arena), encoded)
        if max_value_bytes is not None and len(encoded) > max_value_bytes:
            raise TooManyValues(f"{len(encoded)} bytes of plain values, at most {max_value_bytes}")
        if arena is not None and len(encoded) >= THRESHOLD_BYTES:
            return _pack(msgpack.Ext(EXT_ARENA_VALUE, _pack(arena.write(memoryview(encoded)))))
        return bytes(encoded)

    def _hook(self, part: Any) -> Any:
        if isinstance(part, PurePath):
            return str(part)
        if isinstance(part, FilePart):
            return msgpack.Ext(EXT_FILE, part.path.encode())
        array = _array_parts(part)
        if array is None:
            raise TypeError(f"a value of type `{type(part).__name__}` has no JSON form")
        typestr, shape, data = array
        if not shape:
            return part.item()
        if self._arena is not None and len(data) >= THRESHOLD_BYTES:
            return msgpack.Ext(EXT_ARENA_ARRAY, _pack((typestr, shape, *self._arena.write(data))))
        return msgpack.Ext(EXT_ARRAY, _pack((typestr, shape, data)))


def _outsourced(value: Any, arena: Payloads) -> Any:
    """The value with its long bytes in the arena: itself, or what it holds where it is a dict or a list."""
    if isinstance(value, dict):
        if _holds_long(value.values()):
            return {key: _outsourced(part, arena) if _is_long(part) else part for key, part in value.items()}
    elif isinstance(value, _SEQUENCES):
        if _holds_long(value):
            return [_outsourced(part, arena) if _is_long(part) else part for part in value]
    elif _is_long(value):
        return msgpack.Ext(EXT_ARENA_BYTES, _pack(arena.write(value)))
    return value


def _holds_long(parts: Iterable[Any]) -> bool:
    for part in parts:  # noqa: SIM110 - `any` would call a function or resume a generator for each of a million
        if isinstance(part, _BUFFERS) and len(part) >= THRESHOLD_BYTES:
            return True
    return False


def _is_long(value: Any) -> bool:
    return isinstance(value, _BUFFERS) and len(value) >= THRESHOLD_BYTES


def _array_parts(value: Any) -> tuple[str, tuple[int, ...], memoryview] | None:
    """The typestr, shape and data of anything with numpy's array interface; without importing numpy."""
    interface = getattr(value, "__array_interface__", None)
    if not isinstance(interface, dict):
        return None
    typestr: str = interface["typestr"]
    if _TYPESTR.fullmatch(typestr) is None:
        raise TypeError(f"an array of dtype {typestr} holds Python objects; convert it to numbers first")
    shape = tuple(int(size) for size in interface["shape"])
    if 0 in shape:
        return typestr, shape, memoryview(b"")
    data = interface["data"]
    if isinstance(data, bytes):
        return typestr, shape, memoryview(data)
    try:
        return typestr, shape, memoryview(value).cast("B")
    except (TypeError, ValueError, BufferError):  # not contiguous, or a format that memoryview does not know
        return typestr, shape, memoryview(value.tobytes())


# Typed: nothing else is made of what the other side may have written.
_span = msgpack.Decoder(tuple[int, int])
_arena_array = msgpack.Decoder(tuple[str, list[int], int, int])
_inline_array = msgpack.Decoder(tuple[str, list[int], bytes])


class Unpacks(Protocol):
    """Decodes MessagePack values; see `engine.sandbox.untrusted`."""

    def decode(self, data: Any) -> Any:
        """A value."""

    def nested(self, data: Any) -> Any:
        """A part of it that lies elsewhere."""


class _Trusting:
    """For what the engine has sent."""

    def __init__(self, extension: Callable[[int, Any], Any]) -> None:
        self.decode = self.nested = msgpack.Decoder(ext_hook=extension).decode


class Decoder:
    """Decodes what the other side encoded.

    Args:
        arena: where its large parts lie.
        files: whether a `FilePart` may come.
        make_array: builds an array. The data is a view of the arena or of the frame: an implementation that
            keeps it must copy it, or see to it that the other side does not overwrite it.
        unpacker: what decodes MessagePack, given what is to be done with extensions; msgspec, if None.
    """

    def __init__(
        self,
        arena: Arena,
        make_array: MakeArray,
        *,
        files: bool = False,
        unpacker: Callable[[Callable[[int, Any], Any]], Unpacks] | None = None,
    ) -> None:
        self._arena = arena
        self._make_array = make_array
        self._files = files
        self._left_bytes = 0  # of the arena that the present value may still refer to
        self._in_arena = False
        self._decoder = _Trusting(self._extension) if unpacker is None else unpacker(self._extension)

    def decode(self, data: Any) -> Any:
        """The value.

        Raises:
            Exception: any, where it is not what `encode` makes; the other side is then in breach.
        """
        # What a value refers to is bounded by the arena, however often it refers to it: every part counts again.
        self._left_bytes, self._in_arena = self._arena.size, False
        return self._decoder.decode(data)

    @property
    def used_arena(self) -> bool:
        """Whether the last value lay in the arena, or a part of it."""
        return self._in_arena or self._left_bytes < self._arena.size

    def _take(self, length: int) -> None:
        self._left_bytes -= length
        if self._left_bytes < 0:
            raise ValueError("it refers to more bytes than the arena has")

    def _extension(self, code: int, data: memoryview) -> Any:
        if code == EXT_FILE and self._files:
            return FilePart(bytes(data).decode())
        if code == EXT_ARENA_BYTES:
            offset, length = _span.decode(data)
            self._take(length)
            return self._arena.copy(offset, length)
        if code == EXT_ARENA_VALUE:
            offset, length = _span.decode(data)
            if self._in_arena or length > MAX_VALUE_BYTES:
                raise ValueError("a value in the arena is too long, or in a value in the arena")
            self._in_arena = True
            return self._decoder.nested(self._arena.copy(offset, length))
        if code == EXT_ARENA_ARRAY:
            typestr, shape, offset, length = _arena_array.decode(data)
            self._take(length)
            return self._array(typestr, shape, self._arena.view(offset, length), (offset, length))
        if code == EXT_ARRAY:
            typestr, shape, content = _inline_array.decode(data)
            return self._array(typestr, shape, memoryview(content), None)
        raise ValueError(f"unknown extension {code}")

    def _array(self, typestr: str, shape: list[int], data: memoryview, span: Span | None) -> Any:
        parsed = _TYPESTR.fullmatch(typestr)
        if parsed is None:
            raise ValueError(f"no element type {typestr!r}")
        size = int(parsed[2]) * (4 if parsed[1] == "U" else 1)
        # Bounded before it is multiplied: the product of a million large numbers takes for ever.
        longest = _MAX_EMPTY if 0 in shape else len(data)
        sane = len(shape) <= _MAX_DIMENSIONS and all(0 <= n <= longest for n in shape)
        if not sane or math.prod(shape) * size != len(data):
            raise ValueError(f"an array of {typestr} and shape {shape} does not have {len(data)} bytes")
        return self._make_array(typestr, tuple(shape), data, span)
