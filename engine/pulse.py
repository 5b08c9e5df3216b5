"""Notices when the event loop is held up: how late it is, and the stack of what holds it."""

from __future__ import annotations

import asyncio
import sys
import threading
import time
import traceback

import structlog

log = structlog.get_logger(__name__)


class Pulse:
    """A beat on the loop, and a thread that listens for it.

    Args:
        interval_s: between two beats; a beat costs a few microseconds.
        alarm_s: a loop that has not beaten for this long is called blocked, once per block.

    Attributes:
        lag_s: by how much the last beat came late, in seconds.
        blocks: how often the loop was blocked.
    """

    def __init__(self, interval_s: float = 0.25, alarm_s: float = 1.0) -> None:
        self.lag_s = 0.0
        self.blocks = 0
        self._interval_s = interval_s
        self._alarm_s = alarm_s
        self._beat_s = 0.0
        self._stopped = threading.Event()

    async def run(self) -> None:
        """Beat until cancelled."""
        loop = asyncio.get_running_loop()
        self._beat_s = time.monotonic()
        listener = threading.Thread(
            target=self._listen, args=(threading.get_ident(),), name="holdfast-pulse", daemon=True
        )
        listener.start()
        try:
            while True:
                due_s = loop.time() + self._interval_s
                await asyncio.sleep(self._interval_s)
                self.lag_s = max(0.0, loop.time() - due_s)
                self._beat_s = time.monotonic()
        finally:
            self._stopped.set()  # the thread ends by itself: joining it here would block the loop

    def _listen(self, loop_thread: int) -> None:
        told = 0.0  # the beat after which a block was last told of
        while not self._stopped.wait(self._interval_s):
            beat_s = self._beat_s
            held_s = time.monotonic() - beat_s - self._interval_s
            if held_s < self._alarm_s or beat_s == told:
                continue
            told = beat_s
            frame = sys._current_frames().get(loop_thread)  # noqa: SLF001 - the documented way to another thread's stack
            stack = "".join(traceback.format_stack(frame)) if frame is not None else ""
            log.error("event_loop_blocked", for_s=round(held_s, 3), stack=stack)
            self.blocks += 1
