"""How many events per second a whole engine keeps up with, none lost: projection, metrics, log, audit."""

from __future__ import annotations

import asyncio
import re
import time
from pathlib import Path

from benchmarks.probes import Plan
from benchmarks.probes.hosting import hosting, run
from engine import Engine
from events.cursor import Filter
from events.envelope import CallFinished, CallStarted, Gap
from events.log import EventLog

PUBLISH_S = 20.0
_SLICE = 128  # events between two turns of the loop, as busy calls would leave it
_AHEAD = 20_000  # events published and not durable yet, a fifth of what the log's backlog holds
_PAUSE_S = 0.001
_KEPT = 100_000_000  # retention must not remove what is counted afterwards
_PAGE = 1000
_PLUGIN = "plain-0"
_AUDITED = re.compile(rb'\{"sequence":(\d+),')


def publish(plan: Plan) -> dict[str, float]:
    """Publish as fast as the log takes it, then read the log and the audit back, number by number."""
    return run(_publish(plan))


async def _publish(plan: Plan) -> dict[str, float]:
    folder = plan.folder / "plugins"
    folder.mkdir()
    async with hosting(folder, retain_events=_KEPT) as engine:
        before = engine.bus.last
        started_s = time.perf_counter()
        await _for_a_while(engine, plan.of(PUBLISH_S))
        # What counts is what was durable and audited by the end, not what was published.
        kept = min(engine.log.durable, engine.audit.state.last) - before
        took_s = time.perf_counter() - started_s
        published = engine.bus.last
        await asyncio.to_thread(engine.log.flush, PUBLISH_S)
        read = await asyncio.to_thread(_count, engine.log, published)
    audited = await asyncio.to_thread(_audited, engine.audit.path, published)
    return {
        "per_s": kept / took_s,
        "events": published - before,
        "lost_in_log": published - read,
        "lost_in_audit": published - audited,
        "for_s": took_s,
    }


async def _for_a_while(engine: Engine, for_s: float) -> None:
    end_s = time.perf_counter() + for_s
    number = 0
    while time.perf_counter() < end_s:
        if engine.bus.last - engine.log.durable > _AHEAD:
            await asyncio.sleep(_PAUSE_S)
            continue
        for _ in range(_SLICE // 2):
            number += 1
            request_id = f"{number:032x}"
            engine.bus.publish(CallStarted("noop", request_id), _PLUGIN)
            engine.bus.publish(CallFinished("noop", request_id, True, 0.125), _PLUGIN)
        await asyncio.sleep(0)


def _count(log: EventLog, last: int) -> int:
    """How many of the events 1 to `last` the log has, each once; gaps do not count."""
    after = found = seen = 0
    while after < last:
        page = log.read(after, _PAGE, Filter())
        if not page.records:
            break
        for record in page.records:
            if record.type != Gap.TYPE and seen < record.sequence <= last:
                found += 1
                seen = record.sequence
        after = page.position
    return found


def _audited(path: Path, last: int) -> int:
    """How many of the events 1 to `last` have a line in the audit file, in order, each once."""
    found = seen = 0
    with path.open("rb") as lines:
        for line in lines:
            matched = _AUDITED.match(line)
            if matched is not None and seen < (number := int(matched[1])) <= last:
                found += 1
                seen = number
    return found
