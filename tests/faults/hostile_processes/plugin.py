"""Breeds: processes, threads, daemons, and children that hold what is not theirs. Each bomb is bounded."""

import ctypes
import mmap
import os
import resource
import signal
import subprocess
import sys
import threading

LIBC = ctypes.CDLL(None)
BOMB = 300
_HOLD = "input(); held = b'x' * (80 << 20); input()"


def daemon(*, deaf: bool) -> int:
    """A process of its own session whose parent is gone; it holds nothing that says whose it is. Its pid."""
    source, sink = os.pipe()
    if os.fork() == 0:
        LIBC.prctl(1, 0)  # PR_SET_PDEATHSIG: do not die with whoever forked us
        os.setsid()
        if os.fork() == 0:
            LIBC.prctl(1, 0)
            LIBC.prctl(36, 1)  # PR_SET_CHILD_SUBREAPER
            if deaf:
                signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
            os.write(sink, str(os.getpid()).encode())
            os.closerange(0, 1000)
            while True:
                LIBC.pause()
        os._exit(0)
    os.wait()
    return int(os.read(source, 20))


class Plugin:
    def __init__(self, context):
        self.scratch = context.scratch

    def validate(self): ...

    def fork_bomb(self) -> None:
        for _ in range(BOMB):
            if os.fork() == 0:
                signal.pause()
                os._exit(0)
        threading.Event().wait()

    def thread_bomb(self) -> None:
        threading.stack_size(64 * 1024)
        for _ in range(BOMB):
            threading.Thread(target=threading.Event().wait, daemon=True).start()
        threading.Event().wait()

    def thread_bomb_of_large_stacks(self) -> None:
        threading.stack_size(8 << 20)
        for _ in range(BOMB):
            threading.Thread(target=threading.Event().wait, daemon=True).start()

    def exhausts_descriptors(self) -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (1024, 1024))
        self.held = []
        while True:
            self.held.append(os.open("/dev/null", os.O_RDONLY))

    def holds_all_descriptors(self) -> str:
        try:
            self.exhausts_descriptors()
        except OSError:
            return "held"

    def leaves_a_daemon_and_exits(self) -> None:
        daemon(deaf=False)
        os._exit(9)

    def leaves_a_deaf_daemon_and_hangs(self) -> None:
        daemon(deaf=True)
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})
        LIBC.prctl(1, 0)
        threading.Event().wait()

    def returns_twice(self) -> str:
        os.fork()
        return "both of us"

    def children_hold_memory_after_the_call(self) -> str:
        self.children = [subprocess.Popen([sys.executable, "-c", _HOLD], stdin=subprocess.PIPE) for _ in range(4)]
        gate = self.scratch / "gate"
        os.mkfifo(gate)

        def release():
            gate.read_bytes()  # until somebody opens it to write
            for child in self.children:
                child.stdin.write(b"\n")
                child.stdin.flush()

        threading.Thread(target=release, daemon=True).start()
        return str(gate)

    def maps_shared_memory(self) -> None:
        self.held = []
        while True:
            block = mmap.mmap(-1, 16 << 20)  # shared and anonymous: no data segment has it
            block.write(b"x" * len(block))
            self.held.append(block)

    def maps_a_memfd(self) -> None:
        fd = os.memfd_create("hoard")
        os.ftruncate(fd, 1 << 30)
        block = mmap.mmap(fd, 1 << 30)
        while True:
            block.write(b"x" * (1 << 20))

    def shares_pages_with_children(self) -> str:
        """Not hostile: 100 MiB that eight forked children see, too, are held once."""
        self.held = b"x" * (100 << 20)
        source, sink = os.pipe()
        pids = []
        for _ in range(8):
            pid = os.fork()
            if pid == 0:
                sum(self.held[::4096])
                os.write(sink, b".")
                signal.pause()
            pids.append(pid)
        for _ in pids:
            os.read(source, 1)
        gate = threading.Event()
        gate.wait(0.4)  # so that the watch has looked
        return "shared"
