"""An answer's head: what HTTP asks for, whichever version the caller speaks."""

from __future__ import annotations

from email.utils import parsedate_to_datetime
from pathlib import Path

import pytest
from aiohttp.test_utils import make_mocked_request
from http_support import Lab, raw_request, rest_of, serving
from support import write_honest

from engine.api.response import Response


async def answer(lab: Lab, *head: str) -> tuple[str, dict[str, str], bytes, bool]:
    """The status line, the headers, the body, and whether the connection ended with it."""
    async with raw_request(lab, *head) as reader:
        told = (await reader.readuntil(b"\r\n\r\n")).decode("ascii").split("\r\n")
        headers = dict(line.split(": ", 1) for line in told[1:-2])
        ends = headers.get("Connection") == "close" or (
            told[0].startswith("HTTP/1.0") and "Connection" not in headers
        )
        body = await rest_of(reader) if ends else await reader.readexactly(len(b'{"alive":true}'))
        return told[0], headers, body, ends


@pytest.mark.parametrize(
    ("version", "sent", "said", "ends"),
    [
        ("1.1", [], None, False),
        ("1.1", ["Connection: close"], "close", True),
        ("1.0", [], None, True),
        ("1.0", ["Connection: keep-alive"], "keep-alive", False),
    ],
)
async def test_the_head_of_an_answer(
    plugins: Path, data_dir: Path, version: str, sent: list[str], said: str | None, ends: bool
) -> None:
    write_honest(plugins)
    async with serving(plugins, data_dir) as lab:
        status, headers, body, ended = await answer(lab, f"GET /livez HTTP/{version}", *sent)
    assert (status, body, ended) == (f"HTTP/{version} 200 OK", b'{"alive":true}', ends)
    assert headers.pop("Connection", None) == said
    assert parsedate_to_datetime(headers.pop("Date")).tzinfo is not None
    assert headers.pop("Server")
    assert headers == {"Content-Type": "application/json", "Content-Length": str(len(body))}


async def test_head_tells_the_length_and_sends_nothing_of_it(plugins: Path, data_dir: Path) -> None:
    write_honest(plugins)
    async with serving(plugins, data_dir) as lab:
        status, headers, body, _ = await answer(lab, "HEAD /livez HTTP/1.1", "Connection: close")
        async with lab.http.head("/v1/plugins/nope/health") as unknown:
            assert unknown.status == 404
            assert int(unknown.headers["Content-Length"]) > 0
    assert (status, headers["Content-Length"], body) == ("HTTP/1.1 200 OK", str(len('{"alive":true}')), b"")


@pytest.mark.parametrize("value", ["a\r\nSet-Cookie: b", "a\nb", "a\rb", "\0"])
async def test_a_header_cannot_begin_another_one(value: str) -> None:
    with pytest.raises(ValueError, match="not printable"):
        await Response(b"{}", headers={"X-Request-Id": value}).prepare(make_mocked_request("GET", "/"))
