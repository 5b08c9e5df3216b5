"""Running a throw-away child of the engine: bounded in time and output, and gone afterwards."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Mapping, Sequence
from contextlib import suppress

import msgspec

_KEPT_BYTES = 16 * 1024  # of the output's end
_REAP_S = 2.0  # after SIGKILL only a process stuck in a driver takes longer; it is left to the loop's watcher


class ChildResult(msgspec.Struct, frozen=True):
    """How a child ended. `exit_code` is negative for a signal, None if it was stopped by us."""

    output: str  # the end of stdout and stderr together
    exit_code: int | None
    timed_out: bool = False


async def run_child(
    argv: Sequence[str], *, timeout_s: float, until: bytes | None = None, env: Mapping[str, str] | None = None
) -> ChildResult:
    """Run `argv` without input, in its own session, for `timeout_s` at most.

    It is over when its output ends, or earlier when a whole line of it begins with `until`; then its process
    group is killed, whatever is left of it. Raises `OSError` if it cannot be started.
    """
    loop = asyncio.get_running_loop()
    reading, writing = os.pipe()
    reader = asyncio.StreamReader(limit=_KEPT_BYTES)
    transport, _ = await loop.connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(reader), os.fdopen(reading, "rb", buffering=0)
    )
    try:
        try:
            process = await asyncio.create_subprocess_exec(
                *argv,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=writing,
                stderr=writing,
                start_new_session=True,
                env=env,
            )
        finally:
            os.close(writing)
        return await _attend(process, reader, timeout_s, until)
    finally:
        transport.close()


async def _attend(
    process: asyncio.subprocess.Process, reader: asyncio.StreamReader, timeout_s: float, until: bytes | None
) -> ChildResult:
    kept = bytearray()
    ended: int | None = None
    timed_out = False
    try:
        async with asyncio.timeout(timeout_s):
            if not await _collect(reader, kept, until):
                ended = await process.wait()
    except TimeoutError:
        timed_out = True
    finally:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        await _reap(process)
    return ChildResult(output=kept.decode("utf-8", "replace"), exit_code=ended, timed_out=timed_out)


async def _collect(reader: asyncio.StreamReader, kept: bytearray, until: bytes | None) -> bool:
    """Read into `kept` until the output ends (False) or a line that begins with `until` is whole (True)."""
    while chunk := await reader.read(_KEPT_BYTES):
        kept += chunk
        start = -1 if until is None else kept.rfind(b"\n" + until)
        if start >= 0 and kept.find(b"\n", start + 1) >= 0:
            return True
        del kept[:-_KEPT_BYTES]
    return False


async def _reap(process: asyncio.subprocess.Process) -> None:
    reaping = asyncio.ensure_future(process.wait())
    with suppress(TimeoutError):
        await asyncio.shield(asyncio.wait_for(reaping, _REAP_S))
