"""Which arguments were in flight: their sizes and SHA-256, never their contents.

Nothing is hashed unless a worker dies. Until then there is a reference to the encoded arguments; at its death the
engine keeps a hold on what they refer to (the arena, uploaded files), and a thread hashes that afterwards.
"""

from __future__ import annotations

import contextlib
import hashlib
import mmap
import os
import stat
from collections.abc import Iterator
from typing import Any, TypeAlias

import msgspec
from msgspec import msgpack

from engine.sandbox import values, wire
from engine.sandbox.arena import THRESHOLD_BYTES
from engine.sandbox.untrusted import Unpacker

_MAX_ARGUMENTS = 32
_SCAN_BYTES = 1024 * 1024  # a longer encoding is not searched for files
# What lies in an arena the plugin may have written over, to make it refer to the same bytes again and again.
_BUDGET_BYTES = 4 * 1024 * 1024 * 1024
_CHUNK_BYTES = 1024 * 1024
_Map: TypeAlias = dict[str, msgspec.Raw]
_msgpack_map = msgpack.Decoder(_Map)
_json_map = msgspec.json.Decoder(_Map)


class Argument(msgspec.Struct, frozen=True):
    """One argument of the call that ran. An empty name: all of them together, where they could not be told apart.

    `form` says what was hashed: `text` (its UTF-8), `bytes`, `file` and `array` (their content), `json` (the value
    as JSON; an array or long bytes inside it as `"sha256:…"`), `msgpack` (a value too large to turn into JSON).
    """

    name: str
    form: str
    size_bytes: int
    sha256: str | None = None  # null: it could not be read any more


class InFlight:
    """A call whose worker dies, with a hold on what its arguments refer to, until `close`.

    Args:
        arguments: as they were sent.
        parameters: the tool's, as JSON Schema; other names are the caller's own words and are not shown.
        arena_fd: where large parts lie.
    """

    def __init__(
        self, tool: str, request_id: str, ran_s: float, arguments: wire.Encoded, parameters: str, arena_fd: int
    ) -> None:
        self.tool = tool
        self.request_id = request_id
        self.ran_s = ran_s
        self._arguments = arguments
        self._parameters = parameters
        self._arena_fd = -1
        self._files: dict[str, int] = {}
        with contextlib.suppress(Exception):  # no descriptor left, no form at all: a verdict waits for us
            if arguments.encoding == "python":
                self._arena_fd = os.dup(arena_fd)
            if arguments.encoding != "json" and len(arguments.data) <= _SCAN_BYTES:
                self._open_files()

    def close(self) -> None:
        """Let go of the arena and the files."""
        for fd in (self._arena_fd, *self._files.values()):
            if fd >= 0:
                os.close(fd)
        self._arena_fd, self._files = -1, {}

    def fingerprints(self) -> tuple[Argument, ...]:
        """Of each argument, the first 32. Blocking: hashing takes a second per gigabyte."""
        encoding, data = self._arguments.encoding, self._arguments.data
        try:
            with self._arena() as arena:
                return tuple(self._each(_Hasher(arena, self._files), encoding, data))
        except Exception:  # the arena's content may be the plugin's, and then anything at all
            return (Argument("", encoding, len(data), hashlib.sha256(data).hexdigest()),)

    def _each(self, hasher: _Hasher, encoding: str, data: bytes) -> Iterator[Argument]:
        found = _json_map.decode(data) if encoding == "json" else hasher.map(data)
        known = msgspec.json.decode(self._parameters).get("properties", ())
        for name, raw in list(found.items())[:_MAX_ARGUMENTS]:
            shown = name if name in known else "?"
            piece = hasher.json(raw) if encoding == "json" else hasher.value(raw)
            yield Argument(shown, piece.form, piece.size_bytes, piece.sha256)

    @contextlib.contextmanager
    def _arena(self) -> Iterator[memoryview]:
        if self._arena_fd < 0:
            yield memoryview(b"")
            return
        # Sealed against shrinking, so reading it cannot fault. Unmapped once the last view is gone.
        yield memoryview(mmap.mmap(self._arena_fd, 0, mmap.MAP_SHARED, mmap.PROT_READ))

    def _open_files(self) -> None:
        """Now: an upload is removed as soon as its call has ended."""
        found = _msgpack_map.decode(self._arguments.data)
        for raw in [raw for raw in found.values() if _is_extension(raw)][:_MAX_ARGUMENTS]:
            code, content = msgpack.decode(raw, ext_hook=lambda code, data: (code, bytes(data)))
            if code == values.EXT_FILE and content.decode() not in self._files:
                self._files[content.decode()] = os.open(content, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)


class _Piece:
    """What was hashed. No struct and no tuple: the JSON encoder is to ask the hook about it."""

    def __init__(self, form: str, size_bytes: int, sha256: str | None) -> None:
        self.form = form
        self.size_bytes = size_bytes
        self.sha256 = sha256


class _Hasher:
    """Hashes one call's arguments."""

    def __init__(self, arena: memoryview, files: dict[str, int]) -> None:
        self._arena = arena
        self._files = files
        self._left_bytes = _BUDGET_BYTES

    def map(self, data: Any) -> _Map:
        """The arguments by name; all of them may lie in the arena."""
        if _is_extension(data):
            offset, length = msgpack.decode(msgpack.decode(data).data)
            data = self._span(offset, length)
        return _msgpack_map.decode(data)

    def json(self, raw: msgspec.Raw) -> _Piece:
        """An argument of a JSON body: a text by its UTF-8, any other value as it was sent."""
        view = memoryview(raw)
        if view[0] == ord('"'):
            return self._piece("text", msgspec.json.decode(raw, type=str).encode())
        return self._piece("json", view)

    def value(self, raw: msgspec.Raw) -> _Piece:
        """An argument in MessagePack."""
        view = memoryview(raw)
        if _is_extension(raw):
            piece = msgpack.decode(raw, ext_hook=self._extension)
            return piece if isinstance(piece, _Piece) else self._piece("msgpack", view)
        if _is_text_or_bytes(view[0]):
            value = msgpack.decode(raw)
            return self._piece("bytes", value) if isinstance(value, bytes) else self._piece("text", value.encode())
        if len(view) >= THRESHOLD_BYTES:
            return self._piece("msgpack", view)
        return self._nested(raw)

    def _nested(self, raw: msgspec.Raw) -> _Piece:
        inside: list[_Piece] = []

        def hook(part: Any) -> str:
            inside.append(part)
            return f"sha256:{part.sha256}"

        try:
            text = msgspec.json.encode(Unpacker(self._extension).decode(raw), enc_hook=hook)
        except Exception:  # what lies in an arena, the plugin may have written over; then its bytes are hashed
            return self._piece("msgpack", memoryview(raw))
        piece = self._piece("json", text)
        piece.size_bytes += sum(part.size_bytes for part in inside)
        return piece

    def _extension(self, code: int, data: memoryview) -> _Piece:
        if code == values.EXT_FILE:
            return self._file(bytes(data).decode())
        parts = msgpack.decode(data)
        match code:
            case values.EXT_ARENA_BYTES:
                return self._piece("bytes", self._span(*parts))
            case values.EXT_ARENA_ARRAY:
                return self._piece("array", self._span(*parts[2:]))
            case values.EXT_ARRAY:
                return self._piece("array", parts[2])
        raise ValueError(f"unknown extension {code}")

    def _span(self, offset: int, length: int) -> memoryview:
        return self._arena[offset : offset + length]

    def _piece(self, form: str, data: bytes | memoryview) -> _Piece:
        self._spend(len(data))
        return _Piece(form, len(data), hashlib.sha256(data).hexdigest())

    def _file(self, path: str) -> _Piece:
        fd = self._files.get(path, -1)
        status = os.fstat(fd) if fd >= 0 else None
        if status is None or not stat.S_ISREG(status.st_mode):
            return _Piece("file", 0, None)
        digest, at = hashlib.sha256(), 0
        while chunk := os.pread(fd, _CHUNK_BYTES, at):
            self._spend(len(chunk))
            digest.update(chunk)
            at += len(chunk)
        return _Piece("file", at, digest.hexdigest())

    def _spend(self, size_bytes: int) -> None:
        self._left_bytes -= size_bytes
        if self._left_bytes < 0:
            raise ValueError("more to hash than any call can have sent")


def _is_extension(raw: Any) -> bool:
    """By the first byte; see the MessagePack specification, "Formats"."""
    first = memoryview(raw)[0]
    return 0xC7 <= first <= 0xC9 or 0xD4 <= first <= 0xD8


def _is_text_or_bytes(first: int) -> bool:
    return 0xA0 <= first <= 0xBF or 0xC4 <= first <= 0xC6 or 0xD9 <= first <= 0xDB
