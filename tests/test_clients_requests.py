"""Requests that are no requests, or more than one, or far too much of one."""

from __future__ import annotations

import gzip
import hmac
import re
import zlib
from pathlib import Path
from typing import Any

import pytest
from client_support import (
    HEALTH,
    RUN,
    UPLOAD,
    address_of,
    ask,
    attacked,
    connect,
    left_uploads,
    post,
    to_the_end,
)
from http_support import connections, form, serving, write_lab
from support import until, write_honest
from test_http_tokens import token_file

from engine.api import tokens as tokens_module
from engine.api.keys import PENDING, STREAMS, UPLOADED
from engine.api.tokens import Role, Tokens
from engine.settings import Settings

JSON = "Content-Type: application/json"
FORM = "Content-Type: multipart/form-data; boundary=B"
FILE = b'--B\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n'
END = b"\r\n--B--\r\n"
ECHO = b'{"text": "x"}'
ANSWER = re.compile(rb"HTTP/1\.\d (\d{3}) ")
HOST = b"Host: localhost\r\n"


def get(target: bytes, *headers: bytes) -> bytes:
    """A request that ends its connection, of any bytes."""
    return b"\r\n".join(
        [b"GET " + target + b" HTTP/1.1", b"Host: localhost", b"Connection: close", *headers, b"", b""]
    )


GARBAGE = {
    "tls": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\x00" * 200,
    "nothing_of_http": b"hello there\r\n\r\n",
    "binary": bytes(range(256)) * 40,
    "http_2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "version": b"GET / HTTP/9.9\r\n" + HOST + b"\r\n",
    "huge_method": b"G" * 100_000 + b" / HTTP/1.1\r\n\r\n",
    "huge_target": get(b"/" + b"a" * 100_000),
    "huge_header": get(b"/livez", b"X: " + b"a" * 100_000),
    "huge_header_name": get(b"/livez", b"X" * 100_000 + b": a"),
    "many_headers": get(b"/livez", *[b"X-%d: a" % number for number in range(5000)]),
    "header_without_colon": get(b"/livez", b"nonsense"),
    "nul_in_header": get(b"/livez", b"X: a\x00b"),
    "nul_in_target": get(b"/live\x00z"),
    "control_in_target": get(b"/live\x01z"),
    "space_before_colon": get(b"/livez", b"X : a"),
    "folded_header": get(b"/livez", b"X: a", b" b"),
    "bare_line_feeds": b"GET /livez HTTP/1.1\n" + b"X: a\rb\n\n",
    "length_and_chunked": b"POST " + RUN.encode() + b" HTTP/1.1\r\n" + HOST + b"Content-Length: 4\r\n"
    b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\nGET " + HEALTH.encode() + b" HTTP/1.1\r\n" + HOST + b"\r\n",
    "two_lengths": b"POST "
    + RUN.encode()
    + b" HTTP/1.1\r\n"
    + HOST
    + b"Content-Length: 4\r\nContent-Length: 5\r\n\r\nabcde",
    "signed_length": b"POST " + RUN.encode() + b" HTTP/1.1\r\n" + HOST + b"Content-Length: +4\r\n\r\nabcd",
    "negative_length": b"POST " + RUN.encode() + b" HTTP/1.1\r\n" + HOST + b"Content-Length: -1\r\n\r\n",
    "huge_length": b"POST "
    + RUN.encode()
    + b" HTTP/1.1\r\n"
    + HOST
    + b"Content-Length: "
    + b"9" * 60
    + b"\r\n\r\n",
    "chunked_not_last": b"POST "
    + RUN.encode()
    + b" HTTP/1.1\r\n"
    + HOST
    + b"Transfer-Encoding: chunked, gzip\r\n\r\n",
    "chunked_twice": b"POST "
    + RUN.encode()
    + b" HTTP/1.1\r\n"
    + HOST
    + b"Transfer-Encoding: chunked, chunked\r\n\r\n",
    "obscured_chunked": b"POST " + RUN.encode() + b" HTTP/1.1\r\n" + HOST + b"Transfer-Encoding: xchunked\r\n\r\n",
    "chunk_size_no_number": b"POST "
    + RUN.encode()
    + b" HTTP/1.1\r\n"
    + HOST
    + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n",
    "two_hosts": b"GET /livez HTTP/1.1\r\n" + HOST + b"Host: evil.example\r\nConnection: close\r\n\r\n",
}


@pytest.mark.parametrize("case", GARBAGE)
async def test_what_is_no_request_is_refused_as_json_and_ends_the_connection(
    plugins: Path, data_dir: Path, case: str
) -> None:
    """400 for the most part; where the head could be read, what it asks for may be refused otherwise."""
    async with attacked(plugins, data_dir, request_head_s=1) as lab:
        reply = await ask(address_of(lab), GARBAGE[case])
        assert reply.status in (400, 408, 413, 415, 421, 422), reply
        assert reply.json["error"]
        assert reply.json["reason_code"]
        assert reply.headers["content-type"].startswith("application/json")
        await until(lambda: not connections(lab))


async def test_smuggled_requests_are_not_answered(plugins: Path, data_dir: Path) -> None:
    """A body that two servers would end in different places ends the connection; nothing behind it counts."""
    async with attacked(plugins, data_dir) as lab:
        for case in ("length_and_chunked", "two_lengths", "huge_length"):
            reader, writer = await connect(address_of(lab))
            writer.write(GARBAGE[case] + get(HEALTH.encode()))
            assert len(ANSWER.findall(await to_the_end(reader))) == 1, case


async def test_garbage_behind_requests_leaves_their_answers(plugins: Path, data_dir: Path) -> None:
    async with attacked(plugins, data_dir) as lab:
        whole = get(HEALTH.encode()).replace(b"Connection: close\r\n", b"")
        reader, writer = await connect(address_of(lab))
        writer.write(whole * 50)
        for _ in range(50):
            assert (await reader.readline()).split()[1] == b"200"
            await reader.readuntil(b"}")
        writer.write(whole * 3 + b"\x00garbage\r\n\r\n" + whole)
        *before, last = ANSWER.findall(await to_the_end(reader))
        assert (set(before) <= {b"200"}, last) == (True, b"400"), "what comes behind it is not answered"


NAMES = [
    *(b"..", b".", b"%2e%2e", b"..%2f..%2f..%2fetc%2fpasswd", b"..%5c..%5cetc", b"%00", b"lab%00", b"lab%00.py"),
    *(b"lab%0d%0aX-Evil:%201", b"lab%20", b"LAB", b"lab/", b"%6cab%2f", b"\xff\xfe", b"%ff%fe", b"%c0%ae%c0%ae"),
    *(
        b"l%EF%BD%81b",
        b"%F0%9F%92%A3",
        b"%ED%A0%80",
        b"__class__",
        b"__init__",
        b"%25%32%65",
        b"a" * 4000,
        b"{name}",
    ),
]


@pytest.mark.parametrize("name", NAMES)
async def test_names_with_tricks_are_unknown_names(plugins: Path, data_dir: Path, name: bytes) -> None:
    async with attacked(plugins, data_dir) as lab:
        targets = [b"/v1/plugins/%b/health", b"/v1/plugins/%b/crashes", b"/v1/plugins/%b"]
        for target in targets:
            reply = await ask(address_of(lab), get(target % name))
            # What is a dot segment or ends in a slash is another path, which may exist.
            assert reply.status in (400, 404) or (name in (b"..", b".", b"%2e%2e") and reply.status == 200), reply
            assert "x-evil" not in reply.headers
        for path in (b"/v1/plugins/%b/tools/echo/run", b"/v1/plugins/lab/tools/%b/run", b"/v1/plugins/%b/restart"):
            request = get(path % name).replace(b"GET", b"POST", 1)
            assert (await ask(address_of(lab), request)).status in (400, 404, 405)


@pytest.mark.parametrize("method", ["PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "CONNECT", "BREW", "get", "G@T"])
async def test_other_methods_are_refused(plugins: Path, data_dir: Path, method: str) -> None:
    async with attacked(plugins, data_dir) as lab:
        for path in (HEALTH, RUN, "/v1/events", "/livez"):
            request = f"{method} {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
            reply = await ask(address_of(lab), request.encode())
            assert reply.status in (400, 404, 405), (path, reply)
            assert reply.json["reason_code"]


# Bombs


def zeros(pack: Any) -> bytes:
    """100 MiB of zeros in 100 KiB."""
    return b"".join([pack.compress(bytes(1024 * 1024)) for _ in range(100)]) + bytes(pack.flush())


PACKED = {
    "gzip": zeros(zlib.compressobj(wbits=31)),
    "deflate": zeros(zlib.compressobj()),
    "gzip, gzip": gzip.compress(zeros(zlib.compressobj(wbits=31))),
    "br": b"\x8b\xff\xff" * 1000,
    "zstd": b"\x28\xb5\x2f\xfd" * 1000,
    "GZIP": gzip.compress(ECHO),
}


@pytest.mark.parametrize("encoding", PACKED)
async def test_a_packed_body_is_415_and_is_not_unpacked(plugins: Path, data_dir: Path, encoding: str) -> None:
    async with attacked(plugins, data_dir) as lab:
        for path, kind in ((RUN, JSON), (UPLOAD, FORM)):
            reply = await ask(address_of(lab), post(path, PACKED[encoding], kind, f"Content-Encoding: {encoding}"))
            assert (reply.status, reply.json["error_type"]) == (415, "UnsupportedMediaType")
            assert "Content-Encoding" in reply.json["error"]
        assert lab.engine._pulse.blocks == 0


def part(name: str, content: bytes = b"x", *headers: str, filename: str | None = None) -> bytes:
    """A part of a form."""
    named = "" if filename is None else f'; filename="{filename}"'
    lines = [f'--B\r\nContent-Disposition: form-data; name="{name}"{named}', *headers, "", ""]
    return "\r\n".join(lines).encode("latin-1") + content + b"\r\n"


NESTED = b"".join(
    b"--B%d\r\nContent-Type: multipart/mixed; boundary=B%d\r\n\r\n" % (n, n + 1) for n in range(1000)
)
FORMS = {
    "many_parts": b"".join(part(f"p{number}") for number in range(20_000)) + b"--B--\r\n",
    "many_files": b"".join(part(f"p{number}", filename="f") for number in range(2000)) + b"--B--\r\n",
    "many_headers": FILE + b"X: y\r\n" * 100_000 + b"\r\nx" + END,
    "huge_header": FILE + b"X: " + b"y" * 1_000_000 + b"\r\n\r\nx" + END,
    "huge_name": part("n" * 1_000_000) + b"--B--\r\n",
    "huge_filename": part("file", filename="f" * 1_000_000) + b"--B--\r\n",
    "nested": NESTED.replace(b"--B0", b"--B", 1),
    "nested_in_itself": b"--B\r\nContent-Type: multipart/form-data; boundary=B\r\n\r\n" * 1000 + b"--B--\r\n",
    "no_end": FILE + b"\r\n" + b"x" * 3_000_000,
    "no_line_end": b"x" * 3_000_000,
    "only_boundaries": b"--B\r\n" * 100_000,
    "blank_lines": b"\n" * 1_000_000,
    "packed_part": part("file", gzip.compress(b"x"), "Content-Encoding: gzip", filename="f") + b"--B--\r\n",
    "charset": part("_charset_", b"utf-7") + part("note", b"+AGE-") + b"--B--\r\n",
    "charset_alone": part("_charset_", b"x" * 100) + b"--B--\r\n",
}


@pytest.mark.parametrize("case", FORMS)
async def test_a_form_that_is_a_bomb_is_refused_and_leaves_nothing(
    plugins: Path, data_dir: Path, case: str
) -> None:
    async with attacked(plugins, data_dir) as lab:
        reply = await ask(address_of(lab), post(UPLOAD, FORMS[case], FORM))
        assert reply.status in (413, 422), reply
        assert reply.json["reason_code"] in ("bad_input", "input_too_large")
        assert lab.engine.health("lab").state == "INITIALIZED"
        assert lab.engine._pulse.blocks == 0


FILENAMES = [
    "../../../etc/passwd",
    "/etc/passwd",
    "..",
    ".",
    "",
    "a/../../b",
    "C:\\x",
    "a\\..\\b",
    "%2e%2e%2f",
    "\x7f",
]


@pytest.mark.parametrize(
    "filename", [*FILENAMES, "ünï", ".bashrc", "-rf", "con", "a" * 3000, "$(id)", "a\tb", "\xa0"]
)
async def test_a_file_name_never_leaves_its_folder(plugins: Path, data_dir: Path, filename: str) -> None:
    async with attacked(plugins, data_dir) as lab:
        reply = await ask(
            address_of(lab), post(UPLOAD, part("file", b"x", filename=filename) + b"--B--\r\n", FORM)
        )
        assert reply.status in (200, 422), reply
        if reply.status == 200:
            kept = Path(reply.json["value"]["path"])
            assert ".." not in kept.parts
            assert kept.is_relative_to(lab.engine.uploads)
            assert kept.parent.name == "1"
            assert len(kept.name) <= 100


# Many at once


async def test_uploads_together_are_bounded_on_disk(plugins: Path, data_dir: Path, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    async with attacked(plugins, data_dir, max_body_bytes=1_000_000, max_uploads_bytes=1_500_000) as lab:
        hold = part("file", b"x" * 900_000, filename="f") + part("gate", str(gate).encode()) + b"--B--\r\n"
        reader, writer = await connect(address_of(lab))
        writer.write(post("/v1/plugins/lab/tools/hold_file/run", hold, FORM))
        await until(lambda: lab.http.app[UPLOADED].held_bytes == 900_000)
        reply = await ask(address_of(lab), post(UPLOAD, hold, FORM))
        assert (reply.status, reply.json["reason_code"]) == (503, "service_unavailable")
        assert reply.headers["retry-after"] == "1"
        assert "max_uploads_bytes" in reply.json["error"]
        await until(lambda: len(left_uploads(lab)) == 1)
        gate.touch()
        assert b"900000" in await to_the_end(reader)
        await until(lambda: lab.http.app[UPLOADED].held_bytes == 0)
        small = part("file", b"x" * 900_000, filename="f") + b"--B--\r\n"
        assert (await ask(address_of(lab), post(UPLOAD, small, FORM))).status == 200


async def test_bodies_together_are_bounded_in_memory(plugins: Path, data_dir: Path) -> None:
    async with attacked(plugins, data_dir, max_json_bytes=1_000_000, max_pending_bytes=1_500_000) as lab:
        held = [await connect(address_of(lab)) for _ in range(2)]
        for _, writer in held:
            writer.write(post(RUN, b'{"text": "' + b"x" * 700_000, JSON, length=900_000))
        await until(lambda: lab.http.app[PENDING].held_bytes >= 1_400_000)
        reply = await ask(address_of(lab), post(RUN, b'{"text": "' + b"x" * 500_000 + b'"}', JSON))
        assert (reply.status, reply.json["reason_code"]) == (503, "service_unavailable")
        assert "max_pending_bytes" in reply.json["error"]
        form_reply = await ask(address_of(lab), post(UPLOAD, part("note", b"x" * 500_000) + b"--B--\r\n", FORM))
        assert form_reply.status == 503
        for _, writer in held:
            writer.transport.abort()
        await until(lambda: lab.http.app[PENDING].held_bytes == 0)
        assert (await ask(address_of(lab), post(RUN, b'{"text": "' + b"x" * 500_000 + b'"}', JSON))).status == 200
        async with lab.http.post(UPLOAD, data=form({"file": ("f", b"x")}, note="n")) as response:
            assert response.status == 200
        await until(lambda: lab.http.app[PENDING].held_bytes == 0)
        assert lab.http.app[STREAMS].open == 0


# Tokens


def test_every_guess_is_compared_with_every_token(
    tmp_path: Path, plugins: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Digests, all of them, by `hmac.compare_digest`, whatever is guessed: time tells nothing."""
    write_honest(plugins)
    path, made = token_file(tmp_path)
    known = Tokens(Settings(token="s3cret", token_file=path))
    compared: list[tuple[str, str]] = []

    def compare(one: str, other: str) -> bool:
        compared.append((one, other))
        return hmac_compare(one, other)

    hmac_compare = hmac.compare_digest
    monkeypatch.setattr("engine.api.tokens.hmac.compare_digest", compare)
    digests = [tokens_module.digest(token) for token in (*made.values(), "s3cret")]
    first = made[Role.READ]
    guesses = ["", "s3cret", "s3cre", *made.values(), first[:-1], first + "x", first[:-1] + "?", "x" * 10_000, "é"]
    for guess in guesses:
        compared.clear()
        known.find(guess)
        assert compared == [(digest, tokens_module.digest(guess)) for digest in digests], guess


async def test_an_unknown_token_is_told_the_same_whatever_it_looks_like(
    plugins: Path, data_dir: Path, tmp_path: Path
) -> None:
    path, made = token_file(tmp_path)
    read = made[Role.READ]
    told = set()
    write_lab(plugins)
    async with serving(plugins, data_dir, token_file=path) as lab:
        for guess in (read[:-1], read + "x", read.swapcase(), "x", "x" * 5000, made[Role.ADMIN][1:]):
            for method, target in (("GET", HEALTH), ("POST", RUN), ("POST", "/v1/plugins/lab/restart")):
                head = f"{method} {target} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
                reply = await ask(address_of(lab), f"{head}Authorization: Bearer {guess}\r\n\r\n".encode())
                told.add((reply.status, reply.json["error"], reply.headers["www-authenticate"]))
        health = get(HEALTH.encode(), b"Authorization: Bearer " + read.encode())
        assert (await ask(address_of(lab), health)).status == 200
    assert len(told) == 1
    assert next(iter(told))[0] == 401
