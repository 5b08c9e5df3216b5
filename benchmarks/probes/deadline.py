"""From the moment a deadline passes until the worker is dead and health says FAILED."""

from __future__ import annotations

import asyncio
import os
import select
import time

from benchmarks.probes import Plan
from benchmarks.probes.hosting import hosting, run, write_plain
from benchmarks.stats import percentile
from engine import Engine

TIMEOUTS = 200
TIMEOUT_S = 0.05
_PLUGIN = "plain-0"
_TOOLS = ("spin", "spin_in_c")  # a loop in Python, and one that holds the GIL
_WAIT_S = 20.0
_LOOK_S = 0.0002


def deadline(plan: Plan) -> dict[str, float]:
    """One timeout after another, of both kinds in turn, a restart in between."""
    return run(_deadline(plan))


async def _deadline(plan: Plan) -> dict[str, float]:
    late_ms = []
    async with hosting(write_plain(plan.folder / "plugins", 1, TIMEOUT_S)) as engine:
        for number in range(round(plan.of(TIMEOUTS))):
            late_ms.append(await _late_s(engine, _TOOLS[number % len(_TOOLS)]) * 1e3)
            await engine.restart(_PLUGIN)
    return {
        "p50_ms": percentile(late_ms, 0.5),
        "p99_ms": percentile(late_ms, 0.99),
        "max_ms": max(late_ms),
        "timeouts": len(late_ms),
    }


async def _late_s(engine: Engine, tool: str) -> float:
    pid = engine.health(_PLUGIN).pid
    if pid is None:
        raise RuntimeError(f"{_PLUGIN} has no worker: {engine.health(_PLUGIN).reason}")
    worker = os.pidfd_open(pid)
    try:
        seen = asyncio.get_running_loop().run_in_executor(None, _dead_and_failed_s, engine, worker)
        started_s = time.monotonic()
        outcome = await engine.run(_PLUGIN, tool)
        if outcome.reason_code != "tool_timeout":
            raise RuntimeError(f"`{tool}` ended otherwise: {outcome.error}")
        return await seen - (started_s + TIMEOUT_S)
    finally:
        os.close(worker)


def _dead_and_failed_s(engine: Engine, worker: int) -> float:
    """When both were seen. In a thread: health may be read from any, and the engine's loop must not be asked."""
    dead = select.poll()
    dead.register(worker, select.POLLIN)
    if not dead.poll(_WAIT_S * 1000):
        raise RuntimeError(f"the worker still lives after {_WAIT_S:g} s")
    end_s = time.monotonic() + _WAIT_S
    while engine.health(_PLUGIN).state != "FAILED":
        if time.monotonic() > end_s:
            raise RuntimeError(f"health does not say FAILED after {_WAIT_S:g} s")
        time.sleep(_LOOK_S)
    return time.monotonic()
