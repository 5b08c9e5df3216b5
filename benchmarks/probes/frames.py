"""A 1080p frame through Holdfast, and in turn with it, copied once."""

from __future__ import annotations

import contextlib
import math
import mmap
import os
import socket
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from benchmarks.probes import Plan
from benchmarks.probes.hosting import hosting, run, value_of, write_frames, write_plain
from benchmarks.probes.timing import async_latencies, latencies
from benchmarks.stats import percentile

FRAMES_S = 1.5
TURNS = 15
COPIES_S = 0.01  # in each turn: the engine waits meanwhile
WARM_FRAMES, AGAIN_FRAMES = 20, 2
_SHAPE = (1080, 1920, 3)


def make_frame() -> Any:
    """A frame that does not compress and is not zero anywhere in particular."""
    return np.random.default_rng(1).integers(0, 256, _SHAPE, np.uint8)


def stamp(frame: Any, n: int) -> Any:
    """The frame, with a pixel that tells it from the one before."""
    frame[540, 960, 1] = n
    return frame


def check(pixel: Any, n: int) -> None:
    """The answer is to the frame that was sent.

    Raises:
        RuntimeError: it is not.
    """
    if int(pixel) != n:
        raise RuntimeError(f"the frame's pixel came back as {pixel}, not {n}")


def in_ms(found: list[float]) -> float:
    """The median in milliseconds."""
    return percentile(found, 0.5) * 1e3


def copy(plan: Plan) -> dict[str, float]:
    """Its bytes copied once into memory that is there: nothing is faster than this.

    `in_ms`, `both_ms` and `arena_ms` are what in, and in and out, come to where nothing is isolated, checked or
    recorded: see `_between_processes`.
    """
    source, target = make_frame(), make_frame()

    def once(n: int) -> None:
        np.copyto(target, stamp(source, n))

    figures = {"p50_ms": in_ms(latencies(once, plan.of(FRAMES_S / 2), WARM_FRAMES))}
    for name, copies_out in (("in_ms", 0), ("both_ms", 1), ("arena_ms", 2)):
        with _between_processes(copies_out) as work:
            figures[name] = in_ms(latencies(work, plan.of(FRAMES_S / 2), WARM_FRAMES))
    return figures


@contextlib.contextmanager
def _between_processes(copies_out: int) -> Iterator[Callable[[int], None]]:
    """A frame into shared memory, where another process looks at a pixel of it.

    With one copy out, that process then copies a frame of its own into shared memory. With two, it is copied from
    there into memory of this process, as has to be done where the other one could still write to it.
    """
    size = math.prod(_SHAPE)
    shared = [np.frombuffer(mmap.mmap(-1, size), np.uint8).reshape(_SHAPE) for _ in range(2)]
    source, answer, other = make_frame(), make_frame(), make_frame()
    ours, theirs = socket.socketpair()
    child = os.fork()
    if child == 0:
        try:
            ours.close()
            while said := theirs.recv(1):
                check(shared[0][540, 960, 1], said[0])
                if copies_out:
                    np.copyto(shared[1], stamp(other, said[0]))
                theirs.send(said)
        finally:
            os._exit(0)
    theirs.close()

    def work(n: int) -> None:
        np.copyto(shared[0], stamp(source, n))
        ours.send(bytes([n]))
        ours.recv(1)
        if copies_out == 2:
            np.copyto(answer, shared[1])
        if copies_out:
            check((shared[1] if copies_out == 1 else answer)[540, 960, 1], n)

    try:
        yield work
    finally:
        ours.close()
        os.waitpid(child, 0)


def holdfast(plan: Plan, plugins: int) -> dict[str, float]:
    """In, and in and out, and one copy; with so many plugins registered, the one for frames among them."""
    return run(_holdfast(plan, plugins))


async def _holdfast(plan: Plan, plugins: int) -> dict[str, float]:
    folder = write_plain(plan.folder / "plugins", plugins - 1)
    write_frames(folder)
    frame = make_frame()
    async with hosting(folder) as engine:

        async def number(n: int) -> None:
            check(value_of(await engine.run("frames", "number", {"frame": stamp(frame, n)})), n)

        async def picture(n: int) -> None:
            answer = value_of(await engine.run("frames", "picture", {"frame": stamp(frame, n)}))
            check(np.asarray(answer)[540, 960, 1], n)

        target = make_frame()
        into: list[float] = []
        both: list[float] = []
        copies: list[float] = []
        for call in (number, picture):  # each to its end: the first answer of its kind makes room for it
            await async_latencies(call, 0, WARM_FRAMES)
        for _ in range(TURNS):
            into += await async_latencies(number, plan.of(FRAMES_S) / TURNS, AGAIN_FRAMES)
            both += await async_latencies(picture, plan.of(FRAMES_S) / TURNS, AGAIN_FRAMES)
            copies += latencies(lambda n: np.copyto(target, stamp(frame, n)), COPIES_S, AGAIN_FRAMES)
        return {"in_ms": in_ms(into), "both_ms": in_ms(both), "copy_ms": in_ms(copies)}
