"""The pipe on which a worker's fault handler writes its Python stack."""

from __future__ import annotations

import asyncio
import os

from engine.sandbox.verdict import stack_is_whole

_WAIT_S = 1.0  # for a hung worker's stack: under a millisecond, once it is given a CPU
_BYTES = 65536  # the capacity of a pipe; of more, the end is kept


class StackPipe:
    """Reads what faulthandler writes, without ever blocking.

    Args:
        fd: the reading end, non-blocking; the pipe's from now on.
    """

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._stack = b""
        self._readable = asyncio.Event()
        self._waited_for = False

    def close(self) -> None:
        """Read nothing more: the number may be another descriptor's soon. Who waits learns that nothing came."""
        self._wait_no_more()
        fd, self._fd = self._fd, -1
        os.close(fd)
        self._readable.set()

    def _wait_no_more(self) -> None:
        if self._waited_for:
            self._waited_for = False
            asyncio.get_running_loop().remove_reader(self._fd)

    async def arrived(self) -> bool:
        """Wait for a dump that was asked for, even from inside C code. False where it does not come whole."""
        if self._fd < 0:
            return False
        asyncio.get_running_loop().add_reader(self._fd, self._readable.set)
        self._waited_for = True
        try:
            async with asyncio.timeout(_WAIT_S):
                while not stack_is_whole(self._stack):
                    self._readable.clear()
                    await self._readable.wait()
                    if not self._read():
                        return False
        except TimeoutError:
            return False
        finally:
            self._wait_no_more()
        return True

    def text(self) -> str:
        """Everything that was written so far."""
        self._read()
        return self._stack.decode("utf-8", "replace")

    def _read(self) -> bool:
        """False once nothing more can come."""
        if self._fd < 0:
            return False
        try:
            chunk = os.read(self._fd, _BYTES)
        except BlockingIOError:
            return True
        self._stack = (self._stack + chunk)[-_BYTES:]
        return bool(chunk)
