"""Forms of every shape against a running server: valid ones, taken apart and put together wrongly.

`HOLDFAST_FUZZ=20000 pytest tests/test_clients_fuzz.py` looks further, at random; what it finds goes into `KEPT`.
"""

from __future__ import annotations

import asyncio
import os
from contextlib import AsyncExitStack
from pathlib import Path
from typing import NamedTuple

from client_support import (
    Address,
    Reply,
    address_of,
    attacked,
    connect,
    hang_up,
    healthy,
    left_uploads,
    parsed,
    to_the_end,
)
from http_support import Lab
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from support import until

FURTHER = int(os.environ.get("HOLDFAST_FUZZ", "0"))
LOOK = settings(
    max_examples=FURTHER or 200,
    derandomize=not FURTHER,
    database=None,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)


class Request(NamedTuple):
    """A request of a form; `chunks` is how the body is cut, where it is sent without a length."""

    tool: str
    kind: bytes
    body: bytes
    accept: bytes = b"*/*"
    excess_bytes: int = 0  # that the length says beyond what is sent, or below it
    chunks: tuple[int, ...] | None = None

    def bytes(self) -> bytes:
        """As it is sent."""
        head = [
            b"POST /v1/plugins/lab/tools/%b/run HTTP/1.1" % self.tool.encode(),
            b"Host: localhost",
            b"Connection: close",
            b"Content-Type: " + self.kind,
            b"Accept: " + self.accept,
        ]
        if self.chunks is None:
            head.append(b"Content-Length: %d" % max(0, len(self.body) + self.excess_bytes))
            return b"\r\n".join([*head, b"", b""]) + self.body
        cut, rest = b"", self.body
        for size in self.chunks:
            piece, rest = rest[:size], rest[size:]
            cut += b"%x\r\n%b\r\n" % (len(piece), piece) if piece else b""
        cut += b"%x\r\n%b\r\n" % (len(rest), rest) if rest else b""
        return b"\r\n".join([*head, b"Transfer-Encoding: chunked", b"", b""]) + cut + b"0\r\n\r\n"


NEW_LINE = st.sampled_from([b"\r\n"] * 8 + [b"\n", b"\r", b"\r\r\n", b""])
NAME = st.one_of(
    st.sampled_from(
        [b"file", b"note", b"count", b"data", b"_charset_", b"", b"../x", b'a"b', b"\xff", b"a;b", b"\x00"]
    ),
    st.binary(max_size=12),
)
QUOTES = st.sampled_from([b'"%b"'] * 6 + [b"%b", b"'%b'", b'"%b', b'%b"', b"utf-8''%b", b"=?utf-8?q?%b?="])
KIND = st.sampled_from(
    [
        *(
            b"text/plain",
            b"application/json",
            b"text/plain; charset=utf-16",
            b"text/plain; charset=nope",
            b"",
            b"/",
        ),
        *(b"multipart/mixed; boundary=C", b"multipart/mixed", b"multipart/form-data; boundary=B", b"multipart/"),
    ]
)


@st.composite
def headers(draw: st.DrawFn) -> bytes:
    """The lines of a part's head."""
    key = draw(st.sampled_from([b"name", b"name", b"name", b"NAME", b"name*", b"nom", b"name*0"]))
    fields = [b"form-data", key + b"=" + draw(QUOTES).replace(b"%b", draw(NAME))]
    if draw(st.booleans()):
        key = draw(st.sampled_from([b"filename"] * 4 + [b"filename*", b"filename*1", b"FileName"]))
        fields.append(key + b"=" + draw(QUOTES).replace(b"%b", draw(NAME)))
    fields = draw(st.permutations(fields)) if draw(st.integers(0, 3)) == 0 else fields
    lines = [b"Content-Disposition: " + draw(st.sampled_from([b"; ", b";", b",", b" ;; "])).join(fields)]
    for name, value in draw(
        st.lists(
            st.one_of(
                st.tuples(st.just(b"Content-Type"), KIND),
                st.tuples(
                    st.just(b"Content-Transfer-Encoding"),
                    st.sampled_from([b"binary", b"base64", b"quoted-printable", b"x-uue", b"7BIT", b""]),
                ),
                st.tuples(
                    st.just(b"Content-Encoding"), st.sampled_from([b"gzip", b"identity", b"deflate", b"br"])
                ),
                st.tuples(
                    st.just(b"Content-Length"), st.sampled_from([b"0", b"1", b"5", b"-1", b"9" * 30, b"x", b"+1"])
                ),
                st.tuples(st.binary(max_size=8), st.binary(max_size=8)),
                st.just((b"Content-Disposition", b'form-data; name="again"')),
            ),
            max_size=3,
        )
    ):
        lines.append(name + draw(st.sampled_from([b": "] * 5 + [b":", b" : ", b""])) + value)
    return b"".join(line + draw(NEW_LINE) for line in lines)


@st.composite
def forms(draw: st.DrawFn) -> bytes:
    """A form that is right but here and there."""
    content = st.one_of(
        st.sampled_from(
            [b"", b"1", b"x" * 70_000, b"--B", b"\r\n--B", b"\r\n--B-", b"\r\n--C\r\n", b"--B--", b"\xff\xfe"]
        ),
        st.binary(max_size=60),
    )
    separator = st.sampled_from([b"--B"] * 9 + [b"--C", b"-B", b"--B--", b"--B ", b""])
    form = draw(st.sampled_from([b""] * 5 + [b"preamble\r\n", b"\r\n", b"--"]))
    for _ in range(draw(st.integers(0, 4))):
        form += (
            draw(separator) + draw(NEW_LINE) + draw(headers()) + draw(NEW_LINE) + draw(content) + draw(NEW_LINE)
        )
    form += draw(
        st.sampled_from([b"--B--\r\n"] * 6 + [b"--B--", b"--B\r\n", b"", b"--B--\r\nepilogue\r\n--B\r\n"])
    )
    for _ in range(draw(st.integers(0, 2))):
        at, to = sorted(draw(st.tuples(st.integers(0, len(form)), st.integers(0, len(form)))))
        put = draw(st.one_of(st.binary(max_size=6), st.just(form[at:to]), st.just(b"")))
        form = form[:at] + put + form[draw(st.sampled_from([at, to])) :]
    return form


REQUESTS = st.builds(
    Request,
    tool=st.sampled_from(["size", "reverse", "echo", "count"]),
    kind=st.sampled_from(
        [b"multipart/form-data; boundary=B"] * 12
        + [b'multipart/form-data; boundary="B"', b"multipart/form-data; boundary=", b"multipart/form-data"]
        + [
            b"multipart/form-data; boundary=" + b"B" * 71,
            b"multipart/form-data; boundary=\xff",
            b"multipart/form-data;",
        ]
    ),
    body=forms(),
    accept=st.sampled_from([b"*/*", b"*/*", b"application/x-ndjson"]),
    excess_bytes=st.sampled_from([0] * 10 + [-3, -1, 1, 100]),
    chunks=st.one_of(st.none(), st.none(), st.lists(st.integers(1, 40), max_size=12).map(tuple)),
)

_PART = b'--B\r\nContent-Disposition: form-data; name="file"; filename="f"\r\n'
KEPT = [
    Request("size", b"multipart/form-data; boundary=B", _PART + b"\r\nx\r\n--B--\r\n"),
    # The bound of a part is split between two chunks.
    Request("size", b"multipart/form-data; boundary=B", _PART + b"\r\nx\r\n--B--\r\n", chunks=(len(_PART) + 5, 1)),
    # A part's own length ends it where no bound is.
    Request("size", b"multipart/form-data; boundary=B", _PART + b"Content-Length: 1\r\n\r\nxyz\r\n--B--\r\n"),
    Request("size", b"multipart/form-data; boundary=B", _PART + b"Content-Length: -1\r\n\r\nxyz\r\n--B--\r\n"),
    # aiohttp takes `_charset_` for itself and reads the next part without looking for the bound.
    Request(
        "echo",
        b"multipart/form-data; boundary=B",
        b'--B\r\nContent-Disposition: form-data; name="_charset_"\r\n\r\n',
    ),
]


async def send(address: Address, request: Request) -> Reply:
    """The answer; the client says that nothing more comes where the length promised more."""
    reader, writer = await connect(address)
    writer.write(request.bytes())
    if request.excess_bytes > 0 and request.chunks is None:
        writer.write_eof()
    reply = parsed(await to_the_end(reader))
    await hang_up()
    return reply


async def hold(lab: Lab, request: Request) -> None:
    """The property: an answer that is the caller's, nothing left, everything in service."""
    reply = await send(address_of(lab), request)
    promised_more = request.excess_bytes > 0 and request.chunks is None
    assert reply.status in (200, 400, 404, 408, 413, 415, 422) or (promised_more and reply.status == 0), reply
    if reply.status >= 400:
        assert reply.json["reason_code"], reply
    await until(lambda: not left_uploads(lab))
    assert lab.engine.health("lab").state in ("INITIALIZED", "RUNNING")
    await healthy(address_of(lab))
    assert not lab.engine.faults, lab.engine.faults


def test_a_form_of_any_shape_is_answered_and_leaves_nothing(plugins: Path, data_dir: Path) -> None:
    with asyncio.Runner() as runner:
        stack = AsyncExitStack()
        lab = runner.run(stack.enter_async_context(attacked(plugins, data_dir)))

        def look(request: Request) -> None:
            runner.run(hold(lab, request))

        for kept in KEPT:
            look = example(kept)(look)
        try:
            LOOK(given(REQUESTS)(look))()
        finally:
            runner.run(stack.aclose())
