"""The arguments of a call, from its body: JSON as it came, or a form whose files are kept on disk.

JSON is not decoded here: the worker does it, with the tool's type hints at hand. A form becomes a MessagePack
map of text and `FilePart`s; its files lie in a folder of the request's own until the call has ended.
"""

from __future__ import annotations

import asyncio
import re
import shutil
import uuid
from collections.abc import Coroutine
from contextlib import suppress
from pathlib import Path, PurePath
from typing import Any, BinaryIO, NamedTuple, TypeVar, cast

from aiohttp import BodyPartReader, MultipartReader, StreamReader, web

from engine.errors import ReasonCode
from engine.sandbox.values import FilePart, encode
from engine.sandbox.wire import MAX_FRAME_BYTES, Encoded

T = TypeVar("T")

_FRAME_ROOM_BYTES = 65536  # in a frame, for what goes around the arguments
_CHUNK_BYTES = 256 * 1024
_WRITE_BYTES = 1024 * 1024  # handed to a thread at once
_MAX_PARTS = 256
_NOT_PLAIN = re.compile(r"[^A-Za-z0-9._-]")
_MAX_NAME = 100
_MAX_LINES = 20_000  # of preamble and part headers: what lies inside of a part is not read by the line
_PLAIN = ("binary", "8bit", "7bit")


class BodyRefused(Exception):
    """The body does not become arguments."""

    def __init__(self, status: int, code: ReasonCode, error_type: str, error: str) -> None:
        super().__init__(error)
        self.status = status
        self.reason_code = code
        self.error_type = error_type
        self.error = error


class BodyLimits(NamedTuple):
    """What a body may be."""

    json_bytes: int  # arguments that travel in one frame: a JSON body, or a form's text
    body_bytes: int  # a form with its files
    stall_s: float  # a sender that sends nothing for so long is refused

    @classmethod
    def of(cls, max_json_bytes: int, max_body_bytes: int, stall_s: float) -> BodyLimits:
        """The limits from the settings, and those of the wire."""
        return cls(min(max_json_bytes, MAX_FRAME_BYTES - _FRAME_ROOM_BYTES), max_body_bytes, stall_s)


class Spool:
    """The files of one request, each in a folder of its own, so that no two names meet.

    A name that comes with a file is kept for the messages that mention it, less all that is not plain.
    """

    def __init__(self, root: Path) -> None:
        self._folder = root / uuid.uuid4().hex
        self._count = 0

    def file(self, filename: str) -> _File:
        """The next file; it exists once something was written."""
        plain = _NOT_PLAIN.sub("_", PurePath(filename).name)[-_MAX_NAME:].lstrip(".")
        self._count += 1
        return _File(self._folder / str(self._count) / (plain or "file"))

    @property
    def used(self) -> bool:
        """Whether there may be something to remove."""
        return self._count > 0

    async def remove(self) -> None:
        """Remove all of it, if anything was kept."""
        if self.used:
            await asyncio.to_thread(shutil.rmtree, self._folder, ignore_errors=True)


class _File:
    """A file that is written from threads, one after the other."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: BinaryIO | None = None

    def write(self, data: bytearray, last: bool) -> None:
        """Blocking. A short file takes one trip to a thread."""
        if self._file is None:
            self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._file = self.path.open("xb")
        self._file.write(data)
        if last:
            self._file.close()

    def close(self) -> None:
        """Blocking."""
        if self._file is not None:
            with suppress(OSError):  # a full disk has been told already
                self._file.close()


async def read_arguments(request: web.Request, limits: BodyLimits, spool: Spool) -> Encoded:
    """The call's arguments.

    Raises:
        BodyRefused: 413 too large, 415 a content type we do not take, 422 malformed, 408 the sender stalled.
        OSError: a file could not be kept; or, as ConnectionError, the caller is gone.
    """
    if request.headers.get("Content-Encoding", "identity").lower() != "identity":
        raise _unsupported("an encoded body is not taken; send it without Content-Encoding")
    if request.content_type == "multipart/form-data":
        return await _read_form(request, limits, spool)
    if not request.can_read_body:
        return Encoded("json", b"{}")
    if "Content-Type" in request.headers and request.content_type != "application/json":
        text = f"`{request.content_type}` is not taken; send application/json or multipart/form-data"
        raise _unsupported(text)
    return Encoded("json", await _read_json(request, limits) or b"{}")


async def _read_json(request: web.Request, limits: BodyLimits) -> bytes:
    _check_size(request.content_length, limits.json_bytes)
    body = bytearray()
    while chunk := await _patiently(request.content.readany(), limits.stall_s):
        body += chunk
        _check_size(len(body), limits.json_bytes)
    return bytes(body)


async def _read_form(request: web.Request, limits: BodyLimits, spool: Spool) -> Encoded:
    _check_size(request.content_length, limits.body_bytes)
    try:
        return Encoded("form", encode(await _read_parts(request, limits, spool), None))
    except (BodyRefused, OSError):
        raise
    except Exception as exc:  # aiohttp's reader raises whatever its parser stumbled over
        raise _malformed(f"the form cannot be read: {exc or type(exc).__name__}") from exc


class _Lines:
    """A body whose lines are counted: aiohttp reads those before the first part without a bound or a pause."""

    def __init__(self, content: StreamReader) -> None:
        self._content = content
        self._left = _MAX_LINES

    async def readline(self, **limits: int) -> bytes:
        """One line; raises BodyRefused after too many."""
        self._left -= 1
        if self._left < 0:
            raise _malformed(
                f"the form has more than {_MAX_LINES} lines of preamble and headers; begin with a part"
            )
        return await self._content.readline(**limits)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._content, name)


async def _read_parts(request: web.Request, limits: BodyLimits, spool: Spool) -> dict[str, str | FilePart]:
    reader = MultipartReader(request.headers, cast(StreamReader, _Lines(request.content)))
    fields: dict[str, str | FilePart] = {}
    text_bytes = 0
    while (part := await _patiently(reader.next(), limits.stall_s)) is not None:
        _check_size(request.content.total_bytes, limits.body_bytes)
        if not isinstance(part, BodyPartReader) or not part.name:
            raise _malformed("a part of the form has no name; send each argument as a part of its own")
        name = part.name
        if name in fields:
            raise _malformed(f"argument `{name}` came twice")
        if len(fields) == _MAX_PARTS:
            raise _malformed(f"the form has more than {_MAX_PARTS} parts")
        if part.headers.get("Content-Transfer-Encoding", "binary").lower() not in _PLAIN:
            raise _malformed(f"argument `{name}`: an encoded part is not taken; send its bytes as they are")
        if part.filename is not None:
            fields[name] = await _keep(request, part, part.filename, limits, spool)
        else:
            text = await _read_text(part, limits, limits.json_bytes - text_bytes)
            text_bytes += len(text)
            fields[name] = text.decode()
    return fields


async def _read_text(part: BodyPartReader, limits: BodyLimits, left_bytes: int) -> bytes:
    text = bytearray()
    while chunk := await _patiently(part.read_chunk(_CHUNK_BYTES), limits.stall_s):
        text += chunk
        _check_size(len(text), left_bytes, "the form's text")
    return bytes(text)


async def _keep(
    request: web.Request, part: BodyPartReader, filename: str, limits: BodyLimits, spool: Spool
) -> FilePart:
    """Write a file part to disk, in a thread and never more than a little behind what came."""
    file = spool.file(filename)
    pending = bytearray()
    try:
        while chunk := await _patiently(part.read_chunk(_CHUNK_BYTES), limits.stall_s):
            _check_size(request.content.total_bytes, limits.body_bytes)
            pending += chunk
            if len(pending) >= _WRITE_BYTES:
                await asyncio.to_thread(file.write, pending, False)
                pending = bytearray()
        await asyncio.to_thread(file.write, pending, True)
    except BaseException:
        await asyncio.to_thread(file.close)
        raise
    return FilePart(str(file.path))


async def _patiently(work: Coroutine[Any, Any, T], stall_s: float) -> T:
    try:
        async with asyncio.timeout(stall_s):
            return await work
    except TimeoutError:
        text = f"the body stopped coming for {stall_s:g} s; send it again"
        raise BodyRefused(408, ReasonCode.BAD_INPUT, "BodyStalled", text) from None


def _check_size(size_bytes: int | None, limit_bytes: int, what: str = "the body") -> None:
    if size_bytes is not None and size_bytes > limit_bytes:
        text = f"{what} is larger than the {limit_bytes} bytes that are taken; send less, or files as a form"
        raise BodyRefused(413, ReasonCode.INPUT_TOO_LARGE, "InputTooLarge", text)


def _malformed(text: str) -> BodyRefused:
    return BodyRefused(422, ReasonCode.BAD_INPUT, "BadInput", text)


def _unsupported(text: str) -> BodyRefused:
    return BodyRefused(415, ReasonCode.BAD_INPUT, "UnsupportedMediaType", text)
