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
    # Read by hand: uvloop's `connect_read_pipe` closes a pipe twice, and by then the number may be another
    # thread's (its issue 763).
    reading, writing = os.pipe()
    try:
        os.set_blocking(reading, False)
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
        return await _attend(process, reading, timeout_s, until)
    finally:
        os.close(reading)


async def _attend(
    process: asyncio.subprocess.Process, reading: int, timeout_s: float, until: bytes | None
) -> ChildResult:
    kept = bytearray()
    ended: int | None = None
    timed_out = False
    try:
        async with asyncio.timeout(timeout_s):
            if not await _collect(reading, kept, until):
                ended = await process.wait()
    except TimeoutError:
        timed_out = True
    finally:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        await _reap(process)
    return ChildResult(output=kept.decode("utf-8", "replace"), exit_code=ended, timed_out=timed_out)


async def _collect(reading: int, kept: bytearray, until: bytes | None) -> bool:
    """Read into `kept` until the output ends (False) or a line that begins with `until` is whole (True)."""
    loop, readable = asyncio.get_running_loop(), asyncio.Event()
    loop.add_reader(reading, readable.set)
    try:
        while True:
            await readable.wait()
            readable.clear()
            try:
                chunk = os.read(reading, _KEPT_BYTES)
            except BlockingIOError:
                continue
            if not chunk:
                return False
            kept += chunk
            start = -1 if until is None else kept.rfind(b"\n" + until)
            if start >= 0 and kept.find(b"\n", start + 1) >= 0:
                return True
            del kept[:-_KEPT_BYTES]
    finally:
        loop.remove_reader(reading)


async def _reap(process: asyncio.subprocess.Process) -> None:
    reaping = asyncio.ensure_future(process.wait())
    with suppress(TimeoutError):
        await asyncio.shield(asyncio.wait_for(reaping, _REAP_S))
