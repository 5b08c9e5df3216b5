"""The engine's end of a worker's channel: a protocol straight on the socket."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from typing import Any, cast

import msgspec

from engine.sandbox import wire
from engine.sandbox.frames import Frames, FrameTooLong


class ProtocolBreach(Exception):
    """The worker sent what no worker sends; the message says what."""


class Channel(asyncio.BufferedProtocol):
    """Cuts the byte stream into frames and hands on the messages.

    Args:
        on_message: takes each message; may raise ProtocolBreach.
        on_lost: called once: with the breach, or with None where the other side closed.
    """

    def __init__(self, on_message: Callable[[Any], None], on_lost: Callable[[str | None], None]) -> None:
        self._on_message = on_message
        self._on_lost: Callable[[str | None], None] | None = on_lost
        self._transport: asyncio.Transport | None = None
        self._frames = Frames()
        self._soon: list[bytes] = []
        self._heard = False
        self.paused = False
        self.ended = asyncio.Event()  # nothing more will come

    async def connect(self, end: socket.socket) -> None:
        """Go over this socket, which is the channel's from now on; nothing is handed on before `hear`.

        A loop may read before whoever waits here goes on: uvloop does. Raises OSError.
        """
        try:
            await asyncio.get_running_loop().create_unix_connection(lambda: self, sock=end)
        except BaseException:
            end.close()
            raise

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """The transport is ours."""
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is one in all but inheritance

    def hear(self) -> None:
        """Hand on what has come, and from now on what comes."""
        self._heard = True
        self._deliver()

    def get_buffer(self, _sizehint: int) -> memoryview:
        """Where the transport puts what comes."""
        return self._frames.room()

    def buffer_updated(self, nbytes: int) -> None:
        """Deliver every whole frame; keep the rest."""
        self._frames.came(nbytes)
        if self._heard:
            self._deliver()

    def _deliver(self) -> None:
        try:
            while self._on_lost is not None and (frame := self._frames.take()) is not None:
                self._on_message(wire.from_worker.decode(frame))
        except (ProtocolBreach, FrameTooLong) as exc:
            self._lose(str(exc))
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as exc:
            self._lose(f"it sent a frame that is no message ({exc})")

    def connection_lost(self, _exc: Exception | None) -> None:
        """The other side closed, or the socket broke, or we have closed."""
        self._lose(None)
        self.ended.set()

    def eof_received(self) -> bool:
        """Nothing more will come: close our side too."""
        return False

    def send(self, message: wire.Message) -> None:
        """Send one message."""
        self.write(wire.frame(message))

    def write(self, frame: bytes | memoryview) -> None:
        """Send a frame, or the rest of one; nothing once the channel is lost, and the worker's death answers."""
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(frame)

    def write_soon(self, frame: bytes) -> None:
        """Like `write`, at once with whatever else is written so in this turn of the loop."""
        if not self._soon:
            asyncio.get_running_loop().call_soon(self._write_all)
        self._soon.append(frame)

    def _write_all(self) -> None:
        frames, self._soon = self._soon, []
        self.write(b"".join(frames))

    def pause(self) -> None:
        """Read nothing more: the worker waits once the socket's buffer is full."""
        if self._transport is not None and not self._transport.is_closing():
            self.paused = True
            self._transport.pause_reading()

    def resume(self) -> None:
        """Read on."""
        if self._transport is not None and not self._transport.is_closing():
            self.paused = False
            self._transport.resume_reading()

    def close(self) -> None:
        """Close our side; the worker then ends."""
        self._on_lost = None
        if self._transport is not None:
            self._transport.close()

    def _lose(self, breach: str | None) -> None:
        on_lost, self._on_lost = self._on_lost, None
        if self._transport is not None:
            self._transport.close()
        if on_lost is not None:
            on_lost(breach)
