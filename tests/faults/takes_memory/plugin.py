"""Takes memory, and disk in its scratch folder, in every way that a limit per process does not see."""

# ruff: noqa: PTH101, PTH102, PTH103, PTH108, PTH123
import contextlib
import ctypes
import mmap
import os
import subprocess
import sys
import threading
import time
from multiprocessing import shared_memory

MIB = 1 << 20
BLOCK = b"x" * MIB
CHILDREN = 4
MADV_DONTNEED = 4
SYS_EXIT = {"x86_64": 60, "aarch64": 93}[os.uname().machine]


def fill(seconds_by_mib=0.0):
    """Private memory, touched; stops where it is refused."""
    held = []
    try:
        while True:
            held.append(bytearray(BLOCK))
            time.sleep(seconds_by_mib)
    except MemoryError:
        pass
    threading.Event().wait()


def in_children(work):
    for _ in range(CHILDREN):
        if os.fork() == 0:
            try:
                work()
            finally:
                os._exit(1)
    threading.Event().wait()


class Plugin:
    def __init__(self, context):
        self.scratch = context.scratch

    def validate(self): ...

    def slowly(self) -> None:
        in_children(lambda: fill(0.005))

    def at_once(self) -> None:
        """One process: refused by its own limit."""
        held = []
        while True:
            held.append(bytearray(BLOCK))

    def in_children(self) -> None:
        in_children(fill)

    def by_writing_to_shared_pages(self) -> None:
        pages = mmap.mmap(-1, 100 * MIB, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        for at in range(0, len(pages), MIB):
            pages[at : at + MIB] = BLOCK

        def write():
            for at in range(0, len(pages), MIB):
                pages[at : at + MIB] = bytes(MIB)
            threading.Event().wait()

        in_children(write)

    def by_mapping_shared_memory(self) -> None:
        self.held = []
        while True:
            block = mmap.mmap(-1, 16 * MIB)
            for _ in range(16):
                block.write(BLOCK)
            self.held.append(block)

    def by_a_second_thread(self) -> None:
        """Of a child whose first thread has ended: by its own number it is a zombie that holds nothing."""
        if os.fork() == 0:
            threading.Thread(target=self.by_mapping_shared_memory).start()
            ctypes.CDLL(None).syscall(SYS_EXIT, 0)  # of this thread alone
        threading.Event().wait()

    def in_an_unlinked_file_of_a_second_thread(self) -> None:
        if os.fork() == 0:
            threading.Thread(target=self.in_an_unlinked_mapping).start()
            ctypes.CDLL(None).syscall(SYS_EXIT, 0)
        threading.Event().wait()

    def by_letting_go_of_shared_pages(self) -> None:
        """Then they are resident in no process, and still there."""
        self.held = []
        while True:
            block = mmap.mmap(-1, MIB)
            block.write(BLOCK)
            block.madvise(MADV_DONTNEED)
            self.held.append(block)

    def in_dev_shm(self) -> None:
        with open("/dev/shm/hoard", "wb", buffering=0) as file:
            while True:
                file.write(BLOCK)

    def by_mapping_dev_shm(self) -> None:
        self.held = []
        while True:
            block = shared_memory.SharedMemory(create=True, size=MIB)
            block.buf[:] = BLOCK
            self.held.append(block)

    def in_memfds(self) -> None:
        while True:
            fd = os.memfd_create("hoard")
            for _ in range(8):
                os.write(fd, BLOCK)

    def in_memfds_of_a_child(self) -> None:
        code = "import os, threading\nfor _ in range(400): os.write(os.memfd_create('hoard'), b'x' * (1 << 20))\n"
        subprocess.run([sys.executable, "-c", code + "threading.Event().wait()"])

    def in_closed_memfds(self) -> None:
        """Held by a mapping alone, of which no page was touched."""
        self.held = []
        while True:
            fd = os.memfd_create("hoard")
            os.write(fd, BLOCK)
            self.held.append(mmap.mmap(fd, MIB))
            os.close(fd)

    def in_one_file(self) -> None:
        with open("hoard", "wb", buffering=0) as file:
            while True:
                file.write(BLOCK)

    def in_many_files(self) -> None:
        for number in range(1 << 20):
            os.makedirs(f"hoard/{number // 100}", exist_ok=True)
            with open(f"hoard/{number // 100}/{number}", "wb") as file:
                file.write(BLOCK[:65536])

    def in_empty_files(self) -> None:
        """Of no size at all: 64 MiB are 16384 of them."""
        for number in range(20_000):
            os.close(os.open(str(number), os.O_CREAT | os.O_WRONLY))
        threading.Event().wait()

    def in_an_unlinked_file(self) -> None:
        with open("hoard", "wb", buffering=0) as file:
            os.unlink("hoard")
            while True:
                file.write(BLOCK)

    def in_an_unlinked_mapping(self) -> None:
        with open("hoard", "w+b", buffering=0) as file:
            os.unlink("hoard")
            for _ in range(100):
                file.write(BLOCK)
            self.held = mmap.mmap(file.fileno(), 100 * MIB)
        threading.Event().wait()

    def too_deep(self) -> None:
        for _ in range(40):
            os.mkdir("d" * 200)
            os.chdir("d" * 200)
        with open("hoard", "wb", buffering=0) as file:
            for _ in range(100):
                file.write(BLOCK)
        threading.Event().wait()

    def behind_a_closed_door(self) -> None:
        os.mkdir("closed")
        with open("closed/hoard", "wb", buffering=0) as file:
            for _ in range(100):
                file.write(BLOCK)
        os.chmod("closed", 0)
        threading.Event().wait()

    def shares_memory(self) -> int:
        """Not hostile: 150 MiB that are mapped three times, by two processes, are held once."""
        block = shared_memory.SharedMemory(create=True, size=150 * MIB)
        for at in range(0, block.size, MIB):
            block.buf[at : at + MIB] = BLOCK
        again = shared_memory.SharedMemory(block.name)
        total = sum(again.buf[:: mmap.PAGESIZE])
        code = (
            "import sys; from multiprocessing.shared_memory import SharedMemory\n"
            f"b = SharedMemory({block.name!r}); print(sum(b.buf[::{mmap.PAGESIZE}])); sys.stdout.flush(); input()"
        )
        child = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        total += int(child.stdout.readline())
        threading.Event().wait(1.2)  # so that the watch has looked, and from scratch
        child.communicate(b"\n")
        again.close()
        block.close()
        with contextlib.suppress(FileNotFoundError):  # the child's resource tracker may have been first
            block.unlink()
        return total

    def keeps_within_its_scratch(self) -> int:
        """Not hostile: writes 400 MiB, sparse, linked, and a little at a time, and never holds more than 64."""
        with open("sparse", "wb") as file:
            file.truncate(1 << 30)
        with open("linked", "wb") as file:
            file.write(BLOCK * 20)
        for number in range(20):
            os.link("linked", f"link{number}")
        os.unlink("linked")
        written = 0
        for _ in range(20):
            with open("now", "wb") as file:
                written += file.write(BLOCK * 20)
            os.unlink("now")
        for number in range(20):
            os.unlink(f"link{number}")
        return written
