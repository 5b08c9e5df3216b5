"""Finds the channel's descriptor and the arenas, and speaks for the worker."""

import contextlib
import ctypes
import mmap
import os
import socket
import struct
import threading

from msgspec import msgpack

CHANNEL, ARENA_IN, ARENA_OUT = 100, 103, 104
HELLO, READY, START_FAILED, BEGAN, PROGRESS, ITEM, RESULT, FAILED, LOG = 16, 18, 19, 20, 21, 22, 23, 24, 25


def frame(*message) -> bytes:
    data = msgpack.encode(message)
    return struct.pack("!I", len(data)) + data


def say(data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(CHANNEL, view) :]


class Plugin:
    def __init__(self, context): ...

    def validate(self): ...

    def says_garbage(self) -> None:
        say(struct.pack("!I", 8) + os.urandom(4) + b"\xc1" * 4)
        threading.Event().wait()

    def announces_too_much(self) -> None:
        say(b"\xff" * 4)
        threading.Event().wait()

    def breaks_off_in_a_frame(self) -> None:
        say(frame(RESULT, 1, "x" * 1000)[:500])
        os._exit(0)

    def swallows_its_answer(self) -> str:
        say(struct.pack("!I", 10_000))  # the real answer is taken for the first bytes of this one
        return "x" * 20_000

    def greets_again(self) -> None:
        say(frame(HELLO, 1, os.getpid(), 0))
        threading.Event().wait()

    def is_ready_again(self) -> None:
        say(frame(READY, {}))
        threading.Event().wait()

    def goes_back_to_its_start(self) -> None:
        say(frame(START_FAILED, "import", "exception", "E", "forged", ""))
        threading.Event().wait()

    def speaks_of_another_call(self) -> None:
        say(frame(RESULT, 77, 1))
        threading.Event().wait()

    def answers_before_it_began(self) -> str:
        """The answer to a call that comes later."""
        say(frame(RESULT, 2, 1))
        return "too late"

    def answers_twice(self) -> str:
        say(frame(RESULT, 1, "forged"))
        return "real"

    def forks_behind_pythons_back(self) -> str:
        ctypes.CDLL(None).fork()
        return "both of us answer"

    def shuts_the_channel_down(self) -> None:
        socket.socket(fileno=os.dup(CHANNEL)).shutdown(socket.SHUT_RDWR)
        threading.Event().wait()

    def puts_another_file_there(self) -> str:
        os.dup2(os.open("/dev/null", os.O_RDWR), CHANNEL)
        return "to nobody"

    def speaks_of_a_place_outside_the_arena(self) -> None:
        say(frame(RESULT, 1, msgpack.Ext(1, msgpack.encode((1 << 40, 10)))))
        threading.Event().wait()

    def names_an_extension_that_is_none(self) -> None:
        say(frame(RESULT, 1, msgpack.Ext(99, b"\xc0")))
        threading.Event().wait()

    def forges_a_message_of_40_mb(self) -> None:
        say(frame(FAILED, 1, "exception", "ValueError", "x" * 40_000_000, "here"))
        threading.Event().wait()

    def forges_a_kind(self) -> None:
        say(frame(FAILED, 1, "unheard of", "Oops", "what a kind", "here"))
        threading.Event().wait()

    def floods_with_frames(self) -> str:
        line = frame(LOG, "info", "x" * 100)
        say(line * 20_000)
        return "flooded"

    def logs_40_mb(self) -> str:
        say(frame(LOG, "info", "x" * 40_000_000))
        return "logged"

    def claims_all_of_the_arena(self) -> str:
        say(frame(RESULT, 1, "mine", [[0, 1 << 62], [-5, -5], [1 << 62, 1 << 62]]))
        return "real"

    def scribbles_over_its_answer(self) -> bytes:
        arena = mmap.mmap(ARENA_OUT, 0)

        def scribble():
            while True:
                arena.seek(0)
                arena.write(os.urandom(65536))

        threading.Thread(target=scribble, daemon=True).start()
        return b"x" * (1 << 20)

    def shrinks_the_arena(self) -> None:
        with contextlib.suppress(PermissionError):
            os.ftruncate(ARENA_IN, 0)
        os.ftruncate(ARENA_OUT, 0)

    def closes_the_arena(self) -> bytes:
        os.close(ARENA_OUT)
        return b"x" * (1 << 20)
