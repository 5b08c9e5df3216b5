"""Calls of a no-op: Holdfast's own, through `Engine.run`; and the least that such a call comes to."""

from __future__ import annotations

import socket

from benchmarks.least import Caller, Keeper, answering
from benchmarks.probes import Plan
from benchmarks.probes.hosting import hosting, run, value_of, write_plain
from benchmarks.probes.timing import CALLS_S, IN_FLIGHT_S, async_latencies, async_per_s, in_us


def noop(plan: Plan, loop: str, plugins: int) -> dict[str, float]:
    """One in flight, then several, with that many plugins registered; the last of them is called."""
    return run(_noop(plan, plugins), loop)


async def _noop(plan: Plan, plugins: int) -> dict[str, float]:
    name = f"plain-{plugins - 1}"
    async with hosting(write_plain(plan.folder / "plugins", plugins)) as engine:

        async def call(n: int) -> None:
            if value_of(await engine.run(name, "noop", {"n": n})) != n:
                raise RuntimeError("a call was answered with another one's value")

        found = await async_latencies(call, plan.of(CALLS_S))
        return {**in_us(found), "per_s": await async_per_s(call, plan.of(IN_FLIGHT_S))}


def least(plan: Plan, loop: str) -> dict[str, float]:
    """The same calls as `benchmarks.least` makes them."""
    with answering() as end:
        return run(_least(plan, end), loop)


async def _least(plan: Plan, end: socket.socket) -> dict[str, float]:
    with Keeper(plan.folder) as keeper:
        caller = await Caller.connect(end, keeper)

        async def call(n: int) -> None:
            if await caller.call(n) != n:
                raise RuntimeError("a call was answered with another one's value")

        found = await async_latencies(call, plan.of(CALLS_S))
        return {**in_us(found), "per_s": await async_per_s(call, plan.of(IN_FLIGHT_S))}
