"""An answer that is whole: head and body are one piece, which is sent at once.

aiohttp's own `Response` would go through what only cookies, compression and streams need, and that takes longer
than most answers. What has no end, or takes long to come, is sent by `outlet`.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from email.utils import formatdate
from functools import lru_cache
from http import HTTPStatus

from aiohttp import HttpVersion, HttpVersion11, web
from aiohttp.abc import AbstractStreamWriter
from aiohttp.http import SERVER_SOFTWARE

JSON_TYPE = "application/json"
_NO_HEADERS: Mapping[str, str] = {}
_STATUS_LINES = {status.value: f"{status.value} {status.phrase}" for status in HTTPStatus}


class Response(web.StreamResponse):
    """A whole answer.

    Args:
        body: of the answer.
        status: of HTTP, one that has a body.
        headers: besides those that every answer has; ASCII.
        content_type: of the body.

    Raises (from `prepare`):
        ValueError: a header that would begin another one.
        ConnectionError: the caller is gone.
    """

    def __init__(
        self,
        body: bytes,
        *,
        status: int = 200,
        headers: Mapping[str, str] = _NO_HEADERS,
        content_type: str = JSON_TYPE,
    ) -> None:
        super().__init__(status=status)
        self._whole = body
        self._more = headers
        self._type = content_type

    async def prepare(self, request: web.BaseRequest) -> AbstractStreamWriter | None:
        """Send it."""
        self._keep_alive = request.keep_alive and self._keep_alive is not False
        head = self._head(request.version)
        await request.writer.write_eof(head if request.method == "HEAD" else head + self._whole)
        return None

    def _head(self, version: HttpVersion) -> bytes:
        more = ""
        for name, value in self._more.items():
            if not value.isprintable():
                raise ValueError(f"a header of the answer is not printable: {name}: {value!r}")
            more += f"{name}: {value}\r\n"
        if self._keep_alive is not (version >= HttpVersion11):  # what the version means by itself is not said
            more += "Connection: keep-alive\r\n" if self._keep_alive else "Connection: close\r\n"
        return (
            f"HTTP/{'1.1' if version >= HttpVersion11 else '1.0'} {_STATUS_LINES[self.status]}\r\n"
            f"Content-Type: {self._type}\r\nContent-Length: {len(self._whole)}\r\n"
            f"{_common(int(time.time()))}{more}\r\n"
        ).encode("ascii")

    async def write_eof(self, data: bytes = b"") -> None:
        """It has been sent."""


@lru_cache(maxsize=1)
def _common(now_s: int) -> str:
    return f"Date: {formatdate(now_s, usegmt=True)}\r\nServer: {SERVER_SOFTWARE}\r\n"
