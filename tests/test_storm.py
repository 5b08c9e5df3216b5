"""A storm: eight hostile plugins restarted and called without pause, beside one honest plugin, over HTTP.

Bounded: six seconds by default, `HOLDFAST_STORM_S=60` for the whole of it. Timings are printed, not asserted.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import shutil
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import msgspec
import psutil
import pytest
from http_support import server_process
from support import until, write_honest
from zoo import FAULTS

STORM_S = float(os.environ.get("HOLDFAST_STORM_S", "6"))
IDLE_S = 2.0  # of reading health beforehand
WARM_UP_S = max(2.0, STORM_S / 4)  # of storm: the log keeps its latest events in memory, and is to be full
MAX_GROWTH_MIB = 20
MIB = 1024 * 1024

# Folder, and the tools that are called in turn. Each breaks within a second.
ZOO = {
    "breaks_on_call": ["reads_address_zero", "exits_silently", "raises_without_message", "leaks", "aborts"],
    "import_raises": ["work"],
    "import_segfaults": ["work"],
    "hostile_processes": ["leaves_a_daemon_and_exits", "thread_bomb", "maps_a_memfd", "exhausts_descriptors"],
    "hostile_signals": ["answers_every_signal", "recurses_past_the_stack", "kills_its_parent", "sets_an_alarm"],
    "hostile_channel": ["says_garbage", "announces_too_much", "answers_twice", "puts_another_file_there"],
    "hostile_values": ["raises_a_cycle", "returns_10_000_levels", "raises_keyboard_interrupt"],
    "hostile_patches": ["patches_builtins", "patches_socket", "empties_the_modules"],
}
HEALTH = [
    "/v1/plugins",
    "/v1/plugins/honest/health",
    "/v1/plugins/breaks_on_call/health",
    "/livez",
    "/readyz",
]


class Watched(msgspec.Struct):
    """What the watcher saw."""

    answers: list[tuple[str, int, int]]  # path, status, how often
    p50_ms: float
    p99_ms: float
    max_ms: float


@asynccontextmanager
async def watching(url: str) -> AsyncIterator[Callable[[], Awaitable[Watched]]]:
    """Health is read without pause from a process of its own; what is given ends that and tells what it saw."""
    where = urlsplit(url)
    watcher = await asyncio.create_subprocess_exec(
        sys.executable,
        str(Path(__file__).with_name("health_watcher.py")),
        str(where.hostname),
        str(where.port),
        *HEALTH,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )

    async def told() -> Watched:
        said, _ = await watcher.communicate(b"enough\n")
        return msgspec.json.decode(said, type=Watched)

    try:
        yield told
    finally:
        if watcher.returncode is None:
            watcher.kill()
            await watcher.wait()


async def storm(http: aiohttp.ClientSession, during_s: float) -> Counter[str]:
    """Restart and call the zoo, and call the honest plugin, all without pause."""
    end_s = time.monotonic() + during_s
    seen: Counter[str] = Counter()

    async def run(plugin: str, tool: str, **arguments: Any) -> tuple[int, Any]:
        async with http.post(f"/v1/plugins/{plugin}/tools/{tool}/run", json=arguments) as answer:
            return answer.status, await answer.json()

    def over() -> bool:
        return time.monotonic() >= end_s

    async def batter(plugin: str, tools: list[str]) -> None:
        for tool in itertools.cycle(tools):
            async with http.post(f"/v1/plugins/{plugin}/restart") as answer:
                assert answer.status == 200, await answer.text()
            status, told = await run(plugin, tool)
            assert status in (200, 502, 503, 504), (plugin, tool, status, told)
            seen["restarts"] += 1
            seen[f"zoo {status}"] += 1
            if over():
                return

    async def honest() -> None:
        while not over():
            status, told = await run("honest", "echo", text=str(seen["honest"]))
            assert (status, told["value"]) == (200, str(seen["honest"])), told
            seen["honest"] += 1

    work: list[Coroutine[Any, Any, None]] = [batter(plugin, tools) for plugin, tools in ZOO.items()]
    async with asyncio.TaskGroup() as group:
        for each in [*work, honest()]:
            group.create_task(each)
    return seen


@pytest.mark.timeout(120 + 2 * STORM_S)
@pytest.mark.contract(1, 4)
async def test_in_a_storm_of_breaking_plugins_health_answers_and_the_honest_one_serves(
    plugins: Path, data_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for folder in ZOO:
        shutil.copytree(FAULTS / folder, plugins / folder)
    write_honest(plugins)
    async with (
        server_process(plugins, data_dir, stop_grace_s=0.3) as server,
        aiohttp.ClientSession(server.url) as http,
    ):
        async with watching(server.url) as told:
            await asyncio.sleep(IDLE_S)
            idle = await told()
        await storm(http, WARM_UP_S)
        engine = psutil.Process(server.process.pid)
        before = engine.memory_info().rss
        async with watching(server.url) as told:
            seen = await storm(http, STORM_S)
            stormy = await told()
        growth = (engine.memory_info().rss - before) / MIB
        # The last to be called may still be on their way out; then there are the honest one's and the uploads'.
        (scratch,) = (data_dir / "scratch").iterdir()
        await until(lambda: len(list(scratch.iterdir())) <= len(ZOO) + 2)
    with capsys.disabled():
        reads = sum(count for *_, count in stormy.answers)
        print(
            f"\nstorm of {STORM_S:g} s: {dict(seen)}; {reads} health reads, "
            f"p50 {stormy.p50_ms:.1f} ms, p99 {stormy.p99_ms:.1f} ms, at most {stormy.max_ms:.0f} ms "
            f"(idle {idle.p50_ms:.1f}, {idle.p99_ms:.1f} and {idle.max_ms:.0f} ms); engine {growth:+.1f} MiB"
        )
    assert {status for _, status, _ in stormy.answers} == {200}
    assert {path for path, *_ in stormy.answers} == set(HEALTH)
    assert seen["honest"]
    assert growth < MAX_GROWTH_MIB
