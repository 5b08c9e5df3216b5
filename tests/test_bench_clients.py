"""The benchmark's own clients: were they to count wrong, its figures would mean nothing."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from benchmarks.load import CONNECTIONS, Connection, Target, run
from benchmarks.probes.serving import bare
from benchmarks.readers import follow

_STREAM_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"


@contextmanager
def answering(answer: Callable[[socket.socket], None]) -> Iterator[int]:
    """A server that answers one connection; its port."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.recv(65536)
                answer(connection)

        thread = threading.Thread(target=serve)
        thread.start()
        yield listener.getsockname()[1]
        thread.join()


def event(number: int, kind: str = "holdfast.plugin.log") -> bytes:
    """One event, as the server sends it."""
    data = b'{"time":"2026-01-02T03:04:05.000006Z","sequence":%d}' % number
    return b"id: %d\nevent: %b\ndata: %b\n\n" % (number, kind.encode(), data)


def chunked(text: bytes, size: int) -> bytes:
    """A text in chunks of a size that respects nothing."""
    pieces = [text[at : at + size] for at in range(0, len(text), size)]
    return b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces)


def send_in_bits(connection: socket.socket, data: bytes, size: int) -> None:
    """One `send` for each few bytes."""
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    for at in range(0, len(data), size):
        connection.sendall(data[at : at + size])


@pytest.mark.parametrize("body_bytes", [0, 300_000])
def test_the_load_counts_whole_answers_of_a_real_server(body_bytes: int) -> None:
    with bare(body_bytes) as server:
        (load,) = run([Target(server.port, "GET", "/")], 0.3)
    assert load.body_bytes == (body_bytes or len(b'{"ok": true}'))
    assert load.per_s > CONNECTIONS
    assert 0 < load.p50_us <= load.p99_us


def test_servers_that_are_loaded_in_turn_are_counted_apart() -> None:
    with bare() as small, bare(300_000) as large:
        found = run([Target(small.port, "GET", "/"), Target(large.port, "GET", "/")], 0.3)
    assert [load.body_bytes for load in found] == [len(b'{"ok": true}'), 300_000]
    assert found[0].per_s > found[1].per_s > CONNECTIONS


@pytest.mark.parametrize("size", [1, 7, 1000])
def test_an_answer_in_bits_is_one_answer(size: int) -> None:
    head = b"HTTP/1.1 200 OK\r\ncontent-LENGTH: 500\r\nX: y\r\n\r\n"
    with answering(lambda connection: send_in_bits(connection, head + b"z" * 500, size)) as port:
        connection = Connection(port, b"GET / HTTP/1.1\r\n\r\n")
        connection.ask()
        with connection.socket:
            while connection.receive() is None:
                pass
    assert connection.body_bytes == 500


@pytest.mark.parametrize(
    "answer", [b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\n\r\n", b"HTTP/1.1 200 OK\r\n\r\n", b""]
)
def test_the_load_does_not_count_an_error_as_an_answer(answer: bytes) -> None:
    with answering(lambda connection: connection.sendall(answer)) as port:
        connection = Connection(port, b"GET / HTTP/1.1\r\n\r\n")
        connection.ask()
        with connection.socket, pytest.raises(RuntimeError, match=r"answered|without its length|hung up"):
            connection.receive()


@pytest.mark.parametrize(("chunk", "bits"), [(10_000, 10_000), (10_000, 5), (17, 10_000), (17, 3), (1, 1)])
def test_a_reader_counts_every_line_however_it_is_cut(chunk: int, bits: int) -> None:
    text = b"retry: 1000\n\n" + event(8) + b": keep-alive\n\n" + event(9, "holdfast.worker.started") + event(10)
    data = _STREAM_HEAD + chunked(text, chunk)
    with answering(lambda connection: send_in_bits(connection, data, bits)) as port:
        seen = follow(port, 1, lines=2, after=7, for_s=30)
    assert (seen.lines, seen.holes, seen.done) == (2, 0, 1)
    assert sum(seen.delays_ms.values()) == 2


def test_a_reader_notices_an_event_that_is_missing() -> None:
    text = event(8) + event(10)
    with answering(lambda connection: connection.sendall(_STREAM_HEAD + chunked(text, 10_000))) as port:
        seen = follow(port, 1, lines=2, after=7, for_s=30)
    assert (seen.lines, seen.holes) == (2, 1)
