"""Starts well and then breaks in every way there is: one tool for each."""

import asyncio
import ctypes
import os
import signal
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Iterator

LIBC = ctypes.CDLL(None)


class Unspeakable(Exception):
    def __str__(self):
        raise RuntimeError("no words")


class Plugin:
    def __init__(self, context):
        self.scratch = context.scratch

    def validate(self): ...

    def works(self) -> str:
        return "works"

    def waits(self) -> None:
        threading.Event().wait()

    # Python exceptions, and ways out of Python.

    def raises(self) -> None:
        raise ValueError("frame 7 has no pixels")

    def raises_without_message(self) -> None:
        raise Unspeakable

    def raises_memory_error(self) -> None:
        raise MemoryError

    def exits(self) -> None:
        sys.exit(3)

    def exits_silently(self) -> None:
        os._exit(0)

    async def async_raises(self) -> None:
        await asyncio.sleep(0)
        raise KeyError("track 12")

    # Native faults and signals.

    def reads_address_zero(self) -> None:
        ctypes.string_at(0)  # now

    def aborts(self) -> None:
        os.abort()

    def kills_itself(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def signals_itself(self) -> None:
        os.kill(os.getpid(), signal.SIGSEGV)

    def breaks_in_a_thread_later(self) -> str:
        gate = self.scratch / "gate"
        os.mkfifo(gate)

        def fault():
            gate.read_bytes()  # until somebody opens it to write
            ctypes.string_at(0)  # later

        threading.Thread(target=fault, daemon=True).start()
        return str(gate)

    # Time.

    def loops(self) -> None:
        while True:
            pass

    def sleeps_in_c(self) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        while True:
            LIBC.sleep(1000)

    # Memory.

    def takes_4_gib(self) -> int:
        return len(bytearray(4 << 30))

    def leaks(self) -> None:
        kept = []
        while True:
            kept.append(bytearray(1 << 20))

    def leaks_objects(self) -> None:
        self.kept = []
        while True:
            self.kept.append([None])

    def spreads_over_children(self) -> None:
        hold = "held = b'x' * (80 << 20); input()"
        children = [subprocess.Popen([sys.executable, "-c", hold], stdin=subprocess.PIPE) for _ in range(4)]
        for child in children:
            child.wait()

    # Results.

    def returns_a_lock(self) -> object:
        return {"boxes": [threading.Lock()]}

    def returns_bytes_keys(self) -> dict:
        return {b"car": 1}

    def returns_itself_in_a_list(self) -> list:
        boxes: list = []
        boxes.append(boxes)
        return boxes

    # Descriptors and output.

    def prints_100_mb_and_breaks(self) -> None:
        for _ in range(100):
            print("x" * (1 << 20))
        raise RuntimeError("printed enough")

    def closes_descriptors(self) -> None:
        os.write(1, b"to descriptor 1\n")
        os.write(2, b"to descriptor 2\n")
        os.closerange(0, 65536)
        threading.Event().wait()

    def leaves_grandchildren(self) -> None:
        """Two daemons as the textbook has them (double fork, new session), one of them deaf to SIGTERM."""
        for deaf in (False, True):
            if os.fork() == 0:
                os.setsid()
                if os.fork() == 0:
                    if deaf:
                        signal.signal(signal.SIGTERM, signal.SIG_IGN)
                    signal.pause()
                os._exit(0)
            os.wait()
        raise RuntimeError("the daemons are on their own now")

    # Streams.

    def stream_breaks(self) -> Iterator[int]:
        yield 1
        yield 2
        raise ValueError("frame 3 is torn")

    async def async_stream_breaks(self) -> AsyncIterator[int]:
        yield 1
        await asyncio.sleep(0)
        raise ValueError("frame 2 is torn")

    def stream_hangs(self) -> Iterator[int]:
        yield 1
        threading.Event().wait()
