"""Signals, native code, and every way not to come back."""

import asyncio
import ctypes
import gc
import os
import re
import signal
import sys
import threading

LIBC = ctypes.CDLL(None)


class Plugin:
    def __init__(self, context):
        self.scratch = context.scratch

    def validate(self): ...

    def works(self) -> str:
        return "works"

    def stops_itself(self) -> None:
        os.kill(os.getpid(), signal.SIGSTOP)

    def kills_its_parent(self) -> None:
        os.kill(os.getppid(), signal.SIGKILL)

    def terminates_itself_by_raise(self) -> None:
        signal.raise_signal(signal.SIGABRT)

    def sets_an_alarm(self) -> None:
        signal.setitimer(signal.ITIMER_REAL, 0.05)
        threading.Event().wait()

    def answers_every_signal(self) -> None:
        for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
            LIBC.signal(int(number), ctypes.c_void_p(1))  # SIG_IGN, faulthandler's too
        while True:
            pass

    def blocks_every_signal(self) -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        while True:
            pass

    def signalled_itself_before_it_hung(self) -> None:
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
        os.kill(os.getpid(), signal.SIGUSR1)
        while True:
            pass  # here

    def holds_the_gil(self) -> None:
        ctypes.PyDLL(None).sleep(1000)

    def loops_in_a_regular_expression(self) -> None:
        re.match(r"(a+)+$", "a" * 64 + "b")

    def recurses(self) -> None:
        self.recurses()

    def recurses_past_the_stack(self) -> None:
        sys.setrecursionlimit(1_000_000_000)

        # Through C, a few hundred bytes of its stack each time. In one line: it may end on entering the function.
        deeper = lambda _=None: sorted([1], key=deeper)  # noqa: E731
        deeper()

    def hangs_in_a_collection(self) -> None:
        gc.callbacks.append(lambda *_: threading.Event().wait())
        gc.collect()

    async def cancels_itself(self) -> None:
        asyncio.current_task().cancel()
        await asyncio.sleep(0)

    async def blocks_its_event_loop(self) -> None:
        asyncio.get_running_loop().run_until_complete(asyncio.sleep(0))

    def exits_in_a_thread_later(self) -> str:
        gate = self.scratch / "gate"
        os.mkfifo(gate)
        threading.Thread(target=lambda: (gate.read_bytes(), os._exit(7)), daemon=True).start()
        return str(gate)

    def raises_in_a_thread(self) -> str:
        thread = threading.Thread(target=lambda: 1 / 0)
        thread.start()
        thread.join()
        return "raised there, not here"

    # A start in good health, an end that never comes: for the stop.

    def hangs_at_exit(self) -> str:
        import atexit

        atexit.register(threading.Event().wait)
        return "wait for it"

    def collects_for_ever_at_exit(self) -> str:
        import atexit

        gc.disable()  # none before its end
        gc.callbacks.append(lambda *_: threading.Event().wait())
        atexit.register(gc.collect)
        return "wait for it"

    def raises_at_exit(self) -> str:
        import atexit

        atexit.register(lambda: 1 / 0)
        return "wait for it"

    def leaves_a_thread_running(self) -> str:
        threading.Thread(target=threading.Event().wait).start()
        return "wait for it"

    def kills_itself_at_exit(self) -> str:
        import atexit

        atexit.register(os.kill, os.getpid(), signal.SIGKILL)
        return "wait for it"
