"""The arguments of a call, from its body: JSON as it came, or a form whose files are kept on disk.

JSON is not decoded here: the worker does it, with the tool's type hints at hand. A form becomes a MessagePack
map of text and `FilePart`s; its files lie in a folder of the request's own until the call has ended.

What one body may be is in `BodyLimits`; what all of them together may hold, in memory and on disk, in `Budget`.
"""

from __future__ import annotations

import asyncio
import re
import uuid
from collections.abc import Coroutine
from contextlib import suppress
from pathlib import Path, PurePath
from typing import Any, BinaryIO, NamedTuple, TypeVar, cast

from aiohttp import BodyPartReader, MultipartReader, StreamReader, web

from engine.api.budget import Share
from engine.api.errors import Problem
from engine.errors import ReasonCode
from engine.sandbox.launcher import remove
from engine.sandbox.values import Encoder, FilePart
from engine.sandbox.wire import MAX_FRAME_BYTES, Encoded
from engine.settings import Settings

T = TypeVar("T")

_FRAME_ROOM_BYTES = 65536  # in a frame, for what goes around the arguments
_CHUNK_BYTES = 256 * 1024
_WRITE_BYTES = 1024 * 1024  # handed to a thread at once
_MAX_PARTS = 256
_NOT_PLAIN = re.compile(r"[^A-Za-z0-9._-]")
_MAX_NAME = 100
_PART_BYTES = 4096  # of memory that a part takes, about, whatever is in it
_MAX_LINES = 20_000  # of preamble and part headers: what lies inside of a part is not read by the line
_PLAIN = ("binary", "8bit", "7bit")
_FLEETING_BYTES = 64 * 1024  # in memory; less is not worth a task that outlives its request


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
    stall_s: float  # a sender that we wait for so long, and that sent less than `stall_bytes`, is refused
    stall_bytes: float

    @classmethod
    def of(cls, settings: Settings, stall_s: float) -> BodyLimits:
        """The limits from the settings, and those of the wire."""
        json_bytes = min(settings.max_json_bytes, MAX_FRAME_BYTES - _FRAME_ROOM_BYTES)
        return cls(json_bytes, settings.max_body_bytes, stall_s, stall_s * settings.min_body_bytes_per_s)


class _Sender:
    """Waits for a body while it comes fast enough; time in which nobody waits for it does not count."""

    def __init__(self, content: StreamReader, limits: BodyLimits) -> None:
        self._content = content
        self._limits = limits
        self._loop = asyncio.get_running_loop()
        self._waited_s = 0.0
        self._from_bytes = content.total_bytes

    async def wait(self, work: Coroutine[Any, Any, T]) -> T:
        """The result of `work`, which reads the body. Raises BodyRefused: 408, it comes too slowly."""
        stall_s = self._limits.stall_s
        self._credit()
        began_s = self._loop.time()
        try:
            async with asyncio.timeout(max(0.0, stall_s - self._waited_s)):
                return await work
        except TimeoutError:
            text = f"the body stopped coming, or came too slowly for {stall_s:g} s; send it again"
            raise BodyRefused(408, ReasonCode.BAD_INPUT, "BodyStalled", text) from None
        finally:
            self._waited_s += self._loop.time() - began_s
            self._credit()

    def _credit(self) -> None:
        """Patience begins anew with so many bytes, whether or not somebody waited for them."""
        if self._content.total_bytes - self._from_bytes >= self._limits.stall_bytes:
            self._waited_s, self._from_bytes = 0.0, self._content.total_bytes


class Spool:
    """The files of one request, each in a folder of its own, so that no two names meet.

    A name that comes with a file is kept for the messages that mention it, less all that is not plain.

    Args:
        root: where the request's own folder is made.
        memory: its share of what all requests may hold in memory.
        disk: and on disk.
    """

    def __init__(self, root: Path, memory: Share, disk: Share) -> None:
        self.memory = memory
        self.disk = disk
        self._root = root
        self._folder: Path | None = None  # once there is a file
        self._count = 0

    def file(self, filename: str) -> _File:
        """The next file; it exists once something was written."""
        plain = _NOT_PLAIN.sub("_", PurePath(filename).name)[-_MAX_NAME:].lstrip(".")
        self._count += 1
        if self._folder is None:
            self._folder = self._root / uuid.uuid4().hex
        return _File(self._folder / str(self._count) / (plain or "file"))

    @property
    def lasting(self) -> bool:
        """Whether there is something to remove or to give back when the call has ended."""
        return self._folder is not None or self.memory.held_bytes > _FLEETING_BYTES

    async def remove(self) -> None:
        """Remove all of it, if anything was kept."""
        if self._folder is not None:
            await asyncio.to_thread(remove, self._folder)
        self.release()

    def release(self) -> None:
        """Give back the shares."""
        self.memory.release()
        self.disk.release()


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
        Problem: 503 all requests together hold too much.
        OSError: a file could not be kept; or, as ConnectionError, the caller is gone.
    """
    if request.headers.get("Content-Encoding", "identity").lower() != "identity":
        raise _unsupported("an encoded body is not taken; send it without Content-Encoding")
    kind = request.content_type
    if kind == "multipart/form-data":
        return await _read_form(request, limits, spool)
    if not request.can_read_body:
        return Encoded("json", b"{}")
    if kind != "application/json" and "Content-Type" in request.headers:
        text = f"`{kind}` is not taken; send application/json or multipart/form-data"
        raise _unsupported(text)
    return Encoded("json", await _read_json(request, limits, spool) or b"{}")


async def _read_json(request: web.Request, limits: BodyLimits, spool: Spool) -> bytes:
    _check_size(request.content_length, limits.json_bytes)
    content = request.content
    sender = _Sender(content, limits)
    body = bytearray()
    while not content.at_eof():
        chunk = content.read_nowait() or await sender.wait(content.readany())  # no timer for what is there
        spool.memory.take(len(chunk))
        body += chunk
        _check_size(len(body), limits.json_bytes)
    return bytes(body)


async def _read_form(request: web.Request, limits: BodyLimits, spool: Spool) -> Encoded:
    _check_size(request.content_length, limits.body_bytes)
    try:
        return Encoded("form", Encoder(None).encode(await _read_parts(request, limits, spool)))
    except (BodyRefused, Problem, OSError):
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
    sender = _Sender(request.content, limits)
    while (part := await sender.wait(reader.next())) is not None:
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
        if part.headers.get("Content-Encoding", "identity").lower() != "identity":
            raise _malformed(f"argument `{name}`: a packed part is not taken; send its bytes as they are")
        spool.memory.take(len(name) + _PART_BYTES)
        if part.filename is not None:
            fields[name] = await _keep(request, part, sender, limits, spool)
        else:
            text = await _read_text(part, sender, limits.json_bytes - text_bytes, spool)
            text_bytes += len(text)
            fields[name] = text.decode()
    return fields


async def _read_text(part: BodyPartReader, sender: _Sender, left_bytes: int, spool: Spool) -> bytes:
    text = bytearray()
    while chunk := await sender.wait(part.read_chunk(_CHUNK_BYTES)):
        spool.memory.take(len(chunk))
        text += chunk
        _check_size(len(text), left_bytes, "the form's text")
    return bytes(text)


async def _keep(
    request: web.Request, part: BodyPartReader, sender: _Sender, limits: BodyLimits, spool: Spool
) -> FilePart:
    """Write a file part to disk, in a thread and never more than a little behind what came."""
    file = spool.file(part.filename or "")
    pending = bytearray()
    try:
        while chunk := await sender.wait(part.read_chunk(_CHUNK_BYTES)):
            _check_size(request.content.total_bytes, limits.body_bytes)
            spool.disk.take(len(chunk))
            pending += chunk
            if len(pending) >= _WRITE_BYTES:
                await asyncio.to_thread(file.write, pending, False)
                pending = bytearray()
        await asyncio.to_thread(file.write, pending, True)
    except BaseException:
        await asyncio.to_thread(file.close)
        raise
    return FilePart(str(file.path))


def _check_size(size_bytes: int | None, limit_bytes: int, what: str = "the body") -> None:
    if size_bytes is not None and size_bytes > limit_bytes:
        text = f"{what} is larger than the {limit_bytes} bytes that are taken; send less, or files as a form"
        raise BodyRefused(413, ReasonCode.INPUT_TOO_LARGE, "InputTooLarge", text)


def _malformed(text: str) -> BodyRefused:
    return BodyRefused(422, ReasonCode.BAD_INPUT, "BadInput", text)


def _unsupported(text: str) -> BodyRefused:
    return BodyRefused(415, ReasonCode.BAD_INPUT, "UnsupportedMediaType", text)
