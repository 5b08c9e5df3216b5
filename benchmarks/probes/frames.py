"""A 1080p frame through Holdfast, and copied once."""

from __future__ import annotations

from typing import Any

import numpy as np

from benchmarks.probes import Plan
from benchmarks.probes.hosting import hosting, run, value_of, write_frames, write_plain
from benchmarks.probes.timing import async_latencies, latencies
from benchmarks.stats import percentile

FRAMES_S = 1.5
WARM_FRAMES = 20
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

    And what in and out comes to without any isolation: each copy to or from memory of its own, as two processes
    have it. `both_ms`: in, and the other frame out. `arena_ms`: in, the other frame into the arena, and out of it.
    """
    source, target, other, arena, answer = (make_frame() for _ in range(5))

    def once(n: int) -> None:
        np.copyto(target, stamp(source, n))

    def both(n: int) -> None:
        once(n)
        np.copyto(answer, stamp(other, n))

    def by_arena(n: int) -> None:
        once(n)
        np.copyto(arena, stamp(other, n))
        np.copyto(answer, arena)

    figures = {}
    for name, work in (("p50_ms", once), ("both_ms", both), ("arena_ms", by_arena)):
        figures[name] = in_ms(latencies(work, plan.of(FRAMES_S / 2), WARM_FRAMES))
    return figures


def holdfast(plan: Plan, plugins: int) -> dict[str, float]:
    """In, and in and out; with so many plugins registered, the one for frames among them."""
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

        into = await async_latencies(number, plan.of(FRAMES_S), WARM_FRAMES)
        both = await async_latencies(picture, plan.of(FRAMES_S), WARM_FRAMES)
        return {"in_ms": in_ms(into), "both_ms": in_ms(both)}
