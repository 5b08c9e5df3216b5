"""How calls are timed: one after another, and several in flight."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Any, TypeAlias

from benchmarks.stats import percentile

Call: TypeAlias = Callable[[int], object]
AsyncCall: TypeAlias = Callable[[int], Awaitable[object]]

CALLS_S = 1.5  # one after another
IN_FLIGHT = 8
IN_FLIGHT_S = 1.5
_WARM_CALLS = 300


def latencies(call: Call, for_s: float, warm_calls: int = _WARM_CALLS) -> list[float]:
    """Seconds of each call, one after another. `call` gets numbers from 0 to 255, and has to be right."""
    for n in range(warm_calls):
        call(n % 256)
    found = []
    end_s = time.perf_counter() + for_s
    n = 0
    while (started_s := time.perf_counter()) < end_s:
        call(n % 256)
        found.append(time.perf_counter() - started_s)
        n += 1
    return found


async def async_latencies(call: AsyncCall, for_s: float, warm_calls: int = _WARM_CALLS) -> list[float]:
    """The same for a coroutine."""
    for n in range(warm_calls):
        await call(n % 256)
    found = []
    end_s = time.perf_counter() + for_s
    n = 0
    while (started_s := time.perf_counter()) < end_s:
        await call(n % 256)
        found.append(time.perf_counter() - started_s)
        n += 1
    return found


async def async_per_s(call: AsyncCall, for_s: float) -> float:
    """Calls per second with `IN_FLIGHT` of them at a time."""
    started_s = time.perf_counter()
    end_s = started_s + for_s

    async def go_on() -> int:
        n = 0
        while time.perf_counter() < end_s:
            await call(n % 256)
            n += 1
        return n

    counts = await asyncio.gather(*(go_on() for _ in range(IN_FLIGHT)))
    return sum(counts) / (time.perf_counter() - started_s)


def per_s(submit: Callable[[int], Any], wait: Callable[[Any], object], for_s: float) -> float:
    """Calls per second of a pool with one worker, the oldest of `IN_FLIGHT` waited for and replaced."""
    started_s = time.perf_counter()
    end_s = started_s + for_s
    flying = deque((n, submit(n)) for n in range(IN_FLIGHT))
    done = 0
    n = IN_FLIGHT
    while flying:
        sent, future = flying.popleft()
        if wait(future) != sent % 256:
            raise RuntimeError("a call was answered with another one's value")
        done += 1
        if time.perf_counter() < end_s:
            flying.append((n, submit(n % 256)))
            n += 1
    return done / (time.perf_counter() - started_s)


def in_us(found: list[float]) -> dict[str, float]:
    """The median and the 99th percentile, in microseconds."""
    return {"p50_us": percentile(found, 0.5) * 1e6, "p99_us": percentile(found, 0.99) * 1e6}
