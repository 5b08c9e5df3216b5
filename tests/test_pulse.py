"""A blocked event loop is noticed while it is blocked."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import structlog
from support import hosting, write_honest

from engine.pulse import Pulse

LONG_S = 20.0


def hold_the_loop(pulse: Pulse) -> None:
    """Blocks the event loop until the pulse has noticed."""
    deadline_s = time.monotonic() + LONG_S
    while pulse.blocks == 0 and time.monotonic() < deadline_s:
        pass


async def test_a_blocked_loop_is_told_of_once_with_the_stack_of_what_holds_it() -> None:
    pulse = Pulse(interval_s=0.01, alarm_s=0.1)
    beating = asyncio.create_task(pulse.run())
    await asyncio.sleep(0)
    with structlog.testing.capture_logs() as logs:
        hold_the_loop(pulse)
    beating.cancel()
    await asyncio.gather(beating, return_exceptions=True)
    (entry,) = [line for line in logs if line["event"] == "event_loop_blocked"]
    assert "hold_the_loop" in entry["stack"]
    assert pulse.blocks == 1


async def test_the_engine_shows_its_pulse(plugins: Path, data_dir: Path) -> None:
    write_honest(plugins)
    async with hosting(plugins, data_dir) as engine:
        (part,) = [part for part in engine.parts() if part.name == "loop"]
        assert part.ok
        text, _ = engine.metrics.render()
    assert b"holdfast_loop_lag_seconds" in text
    assert b"holdfast_loop_blocks_total" in text
