"""Servers in processes of their own, and a load on them from another."""

from __future__ import annotations

import http.client
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import msgspec

from benchmarks.load import Load, Target

_READY_S = 60.0
_LOOK_S = 0.05
_END_S = 30.0


class Server(NamedTuple):
    """One that answers."""

    pid: int
    port: int

    def get(self, path: str) -> tuple[int, bytes]:
        """The status and the body of an answer."""
        return self._ask("GET", path, b"")

    def post(self, path: str, body: bytes) -> tuple[int, bytes]:
        """The same for a JSON body."""
        return self._ask("POST", path, body)

    def _ask(self, method: str, path: str, body: bytes) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=_READY_S)
        try:
            connection.request(method, path, body, {"Content-Type": "application/json"} if body else {})
            response = connection.getresponse()
            return response.status, response.read()
        finally:
            connection.close()

    def target(self, method: str, path: str, body: str = "") -> Target:
        """A request to it, to load it with."""
        return Target(self.port, method, path, body)


def load(targets: Sequence[Target], for_s: float) -> list[Load]:
    """Load servers in turn, from one process of its own, each for so long."""
    command = [sys.executable, "-m", "benchmarks.load", str(for_s)]
    done = subprocess.run(command, check=True, input=msgspec.json.encode(targets), stdout=subprocess.PIPE)
    return msgspec.json.decode(done.stdout, type=list[Load])


@contextmanager
def bare(body_bytes: int = 0) -> Iterator[Server]:
    """The bare handler."""
    with _server(["benchmarks.bare", str(body_bytes)]) as server:
        yield server


@contextmanager
def least(folder: Path) -> Iterator[Server]:
    """A handler that calls another process as `benchmarks.least` does, its events kept in `folder`."""
    with _server(["benchmarks.bare", "calls", str(folder)]) as server:
        yield server


@contextmanager
def holdfast(plugins: Path, settings: Mapping[str, str] | None = None) -> Iterator[Server]:
    """`holdfast serve` with these plugins, and settings by their variables, once all are in service.

    Raises:
        RuntimeError: one of them is not.
    """
    data_dir = plugins.parent / "data"
    words = ["engine", "serve", "--no-bundled", "--plugins", str(plugins), "--data", str(data_dir), "--port", "0"]
    with _server(words, settings) as server:
        end_s = time.monotonic() + _READY_S
        while server.get("/readyz")[0] != 200:
            if time.monotonic() > end_s:
                raise RuntimeError(f"not ready: {server.get('/readyz?verbose')[1].decode()}")
            time.sleep(_LOOK_S)
        for health in msgspec.json.decode(server.get("/v1/plugins")[1]):
            if health["state"] != "INITIALIZED":
                raise RuntimeError(f"{health['name']} is {health['state']}: {health['reason']}")
        yield server


@contextmanager
def _server(words: list[str], settings: Mapping[str, str] | None = None) -> Iterator[Server]:
    command = [sys.executable, "-m", *words]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, **(settings or {})})
    try:
        assert process.stdout is not None
        line = process.stdout.readline()  # the outer deadline is the probe's
        port = line.strip().rpartition(":")[2]
        if not port.isdigit():
            raise RuntimeError(f"`{' '.join(words)}` did not say where it serves: {line!r}")
        yield Server(process.pid, int(port))
        if process.poll() is not None:
            raise RuntimeError(f"`{' '.join(words)}` ended with {process.returncode}")
    finally:
        process.terminate()
        try:
            process.wait(_END_S)
        finally:
            process.kill()
            process.wait()
            if process.stdout is not None:
                process.stdout.close()
