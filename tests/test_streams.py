"""stdout and stderr of a server: whoever reads them, or does not, holds nothing up."""

from __future__ import annotations

import fcntl
import http.client
import json
import os
import select
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, TextIO

import pytest
from support import write_plugin
from test_cli import environment

from engine.cli.streams import MAX_QUEUED_BYTES, LossyStream, lossy_streams

FILLER = b"x" * 1023 + b"\n"
RESTARTS = 2000


@pytest.fixture
def pipe() -> Iterator[tuple[BinaryIO, TextIO]]:
    """Its reading end, and its writing end as a stream."""
    read_fd, write_fd = os.pipe()
    with os.fdopen(read_fd, "rb", 0) as reader, os.fdopen(write_fd, "w") as writer:
        yield reader, writer


def lost_line(count: int) -> str:
    return f"lost {count}"


def fill(fd: int) -> None:
    """Leave no room in a pipe."""
    flags = fcntl.fcntl(fd, fcntl.F_GETFL)
    fcntl.fcntl(fd, fcntl.F_SETFL, flags | os.O_NONBLOCK)
    try:
        while os.write(fd, FILLER):
            pass
    except BlockingIOError:
        fcntl.fcntl(fd, fcntl.F_SETFL, flags)


def lines_until(reader: BinaryIO, word: bytes) -> list[bytes]:
    """The lines up to the first with a word in it."""
    data = b""
    while word not in data or not data.endswith(b"\n"):
        assert select.select([reader], [], [], 20)[0], f"no {word!r} came"
        chunk = os.read(reader.fileno(), 1 << 16)
        assert chunk, f"it ended without {word!r}"
        data += chunk
    return data.splitlines()


def test_what_was_printed_is_there_when_print_returns(pipe: tuple[BinaryIO, TextIO]) -> None:
    reader, writer = pipe
    stream = LossyStream(writer, lost_line)
    for text, end in (("one", "\n"), ("tw\udc80o\nthree", "\n"), ("no end", "")):
        print(text, end=end, file=stream, flush=True)
        assert os.read(reader.fileno(), 100) == (text + end).encode("utf-8", "backslashreplace")
    assert stream.settle(0) == ""


def test_lines_that_nobody_takes_are_lost_counted_and_said_where_they_are_missing(
    pipe: tuple[BinaryIO, TextIO],
) -> None:
    reader, writer = pipe
    fill(writer.fileno())
    stream = LossyStream(writer, lost_line)
    count = 2 * MAX_QUEUED_BYTES // 100
    for number in range(count):
        print(f"{number:99}", file=stream, flush=True)
    lines = [line for line in lines_until(reader, b"lost ") if not line.startswith(b"x")]
    print("later", file=stream, flush=True)
    *kept, said = lines
    assert [int(line) for line in kept] == list(range(len(kept)))
    assert len(kept) >= MAX_QUEUED_BYTES // 100
    assert int(said.removeprefix(b"lost ")) == count - len(kept)
    assert lines_until(reader, b"later") == [b"later"]
    assert stream.settle(0) == ""


def test_a_reader_that_went_away_is_an_error_that_is_counted(pipe: tuple[BinaryIO, TextIO]) -> None:
    reader, writer = pipe
    reader.close()
    stream = LossyStream(writer, lost_line)
    for number in range(3):
        print(number, file=stream, flush=True)
    assert stream.settle(0) == f"3 lines of {writer.name} are missing: Broken pipe"


def test_what_one_stream_could_not_say_at_the_end_the_other_does(
    pipe: tuple[BinaryIO, TextIO], monkeypatch: pytest.MonkeyPatch
) -> None:
    reader, writer = pipe
    broken_fd, writable_fd = os.pipe()
    os.close(broken_fd)
    with os.fdopen(writable_fd, "w") as broken:
        monkeypatch.setattr(sys, "stdout", broken)
        monkeypatch.setattr(sys, "stderr", writer)
        with lossy_streams(lost_line):
            print("the answer")
        assert sys.stdout is broken
    assert (
        os.read(reader.fileno(), 100) == f"holdfast: 1 lines of {writable_fd} are missing: Broken pipe\n".encode()
    )


@contextmanager
def unheard(writer: TextIO, folder: Path, cwd: Path) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """A server and its port, whose stdout and stderr are a pipe that was full before it began."""
    with closing(socket.create_server(("127.0.0.1", 0))) as taken:
        port = taken.getsockname()[1]
    words = ["serve", "--no-bundled", "--port", str(port), "--plugins", str(folder), "--data", "data"]
    fill(writer.fileno())
    with subprocess.Popen(
        [sys.executable, "-m", "engine", *words],
        cwd=cwd,
        env=environment(),
        stdout=writer,
        stderr=subprocess.STDOUT,
    ) as process:
        writer.close()
        try:
            yield process, port
        finally:
            process.kill()


def connected(port: int) -> http.client.HTTPConnection:
    """A connection to a server that is about to listen."""
    while True:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
        with suppress(ConnectionRefusedError):
            connection.connect()
            return connection
        time.sleep(0.01)  # nothing announces it


def ask(connection: http.client.HTTPConnection, method: str, path: str) -> tuple[int, bytes]:
    """A request; its status and body."""
    connection.request(method, path)
    response = connection.getresponse()
    return response.status, response.read()


def test_a_server_whose_output_nobody_reads_answers_and_says_later_what_is_missing(
    pipe: tuple[BinaryIO, TextIO], tmp_path: Path
) -> None:
    reader, writer = pipe
    folder = tmp_path / "p" / ("deep" * 50) / ("deep" * 50) / ("deep" * 50)  # each line about it is a long one
    (write_plugin(folder, "broken", "", ["work"]) / "plugin.toml").write_text("name = 'broken'")
    with unheard(writer, folder, tmp_path) as (process, port), closing(connected(port)) as connection:
        assert ask(connection, "GET", "/livez")[0] == 200
        for _ in range(RESTARTS):
            status, body = ask(connection, "POST", "/v1/plugins/broken/restart")
            assert (status, json.loads(body)["state"]) == (200, "FAILED")
        assert ask(connection, "GET", "/livez")[0] == 200
        lines = [line for line in lines_until(reader, b"lines_lost") if not line.startswith(b"x")]
        process.terminate()
        assert b'"stopping"' in reader.read()
        assert process.wait(30) == 0
    assert any(line.endswith(b"serves at http://127.0.0.1:%d" % port) for line in lines)
    events = [json.loads(line) for line in lines if line.startswith(b"{")]
    left = [event for event in events if event["event"] == "plugin_left_service"]
    (lost,) = [event for event in events if event["event"] == "lines_lost"]
    assert len(left) + lost["count"] == RESTARTS + 1
    assert lost["count"] > 100


def test_a_server_whose_output_nobody_reads_ends_when_told_to(
    pipe: tuple[BinaryIO, TextIO], tmp_path: Path
) -> None:
    _, writer = pipe
    (tmp_path / "none").mkdir()
    with unheard(writer, tmp_path / "none", tmp_path) as (process, port), closing(connected(port)) as connection:
        assert ask(connection, "GET", "/livez")[0] == 200
        process.terminate()
        assert process.wait(30) == 0
