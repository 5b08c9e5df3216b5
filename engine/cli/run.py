"""`holdfast run`: one call, by a server or by an engine of our own, shown the same way."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from typing import IO

import msgspec
from msgspec import UNSET

from engine.cli.arguments import Form
from engine.cli.client import Answer, Client, Sink
from engine.cli.console import ExitCode, Failure, note, write_raw
from engine.cli.http import DEFAULT_URL, HttpClient
from engine.cli.progress import Bar
from engine.settings import load


class Order(msgspec.Struct, frozen=True, kw_only=True):
    """What the command line asks for."""

    plugin: str
    tool: str
    form: Form
    plugin_dirs: tuple[Path, ...] = ()
    bundled: bool = True
    url: str | None = None
    token: str | None = None
    out: Path | None = None
    json: bool = False


class Output(Sink):
    """Where items and values go: the file of `--out`, which is not touched before the first of them, or stdout."""

    def __init__(self, out: Path | None, bar: Bar, *, wrap: bool) -> None:
        self.items = 0
        self._out = out
        self._bar = bar
        self._wrap = wrap and out is None  # as over HTTP: {"item": …}
        self._file: IO[bytes] | None = None

    async def item(self, data: bytes) -> None:
        """One line of JSON."""
        self.items += 1
        line = b'{"item":%s}\n' % data if self._wrap else data + b"\n"
        if self._out is None:
            await asyncio.to_thread(self.write, line)  # who reads stdout may be slow: `holdfast run … | less`
        else:
            self.write(line)
        self._bar.item()

    def progress(self, done: float, total: float) -> None:
        """To the bar."""
        self._bar.progress(done, total)

    def write(self, data: bytes) -> None:
        """Part of the answer."""
        if self._out is None:
            write_raw(data)
            return
        try:
            if self._file is None:
                self._file = self._out.open("wb")
            self._file.write(data)
            self._file.flush()
        except OSError as exc:
            text = f"--out {self._out} cannot be written ({exc.strerror}); choose another file"
            raise Failure(ExitCode.WRONG_USE, text) from None

    def close(self) -> None:
        """No more."""
        if self._file is not None:
            self._file.close()


async def run(order: Order) -> ExitCode:
    """Make the call, and tell what it came to."""
    if order.url is not None:
        if order.plugin_dirs or not order.bundled:
            text = "--url asks a server, --plugins and --no-bundled an engine of your own; give one or the other"
            raise Failure(ExitCode.WRONG_USE, text)
        async with HttpClient(order.url, order.token) as client:
            return await _run(client, order)
    if not order.plugin_dirs and order.bundled:
        async with HttpClient(DEFAULT_URL, order.token) as client:
            if await client.answers():
                return await _run(client, order)
        note(f"no server answers at {DEFAULT_URL}; this call runs in an engine of its own")
    from engine.cli.local import LocalClient

    flags: dict[str, object] = {"bundled": False} if not order.bundled else {}
    if order.plugin_dirs:
        flags["plugin_dirs"] = order.plugin_dirs
    async with LocalClient(load(flags)) as local:
        return await _run(local, order)


async def _run(client: Client, order: Order) -> ExitCode:
    items_on_screen = order.out is None and sys.stdout.isatty()
    title = f"{order.plugin} {order.tool}"
    with Bar(title, shown=sys.stderr.isatty() and not items_on_screen) as bar:
        output = Output(order.out, bar, wrap=order.json)
        try:
            answer = await client.call(order.plugin, order.tool, order.form, output)
            if answer.reply.ok is True:
                _finish(answer, order, output)
        finally:
            output.close()
    if order.json:
        _tell_json(answer, order)
    if answer.streamed and (output.items or answer.reply.ok is True):
        where = f" in {order.out}" if order.out is not None and output.items else ""
        note(f"{title}: {output.items} items{where} after {bar.elapsed_s:.1f} s")
    if answer.reply.ok is not True:
        note(answer.reply.error or "the call failed")
    return answer.reply.exit_code


def _finish(answer: Answer, order: Order, output: Output) -> None:
    """The value of a tool that does not stream; of one that does, the file even if there was no item."""
    value = b"null" if answer.reply.value is UNSET else bytes(answer.reply.value)
    if answer.streamed:
        if order.out is not None:
            output.write(b"")
    elif order.out is not None:
        output.write(value + b"\n" if answer.content is None else answer.content)
    elif not order.json:
        output.write((msgspec.json.format(value, indent=2) if sys.stdout.isatty() else value) + b"\n")


def _tell_json(answer: Answer, order: Order) -> None:
    """The outcome as over HTTP; without its value where that went to a file."""
    reply = answer.reply
    if order.out is not None and reply.ok is True:
        reply = msgspec.structs.replace(reply, value=msgspec.Raw(b"null"))
    text = msgspec.json.encode(reply)
    write_raw((b'{"outcome":%s}' % text if answer.streamed and order.out is None else text) + b"\n")


def check_out(out: Path | None) -> None:
    """Fail before the call rather than after it."""
    if out is not None and (out.is_dir() or not out.absolute().parent.is_dir()):
        why = "is a folder" if out.is_dir() else "lies in a folder that does not exist"
        raise Failure(ExitCode.WRONG_USE, f"--out {out} {why}; choose another file")
