"""A storm: eight hostile plugins restarted and called without pause, beside one honest plugin, over HTTP.

Bounded: six seconds by default, `HOLDFAST_STORM_S=60` for the whole of it. Timings are printed, not asserted.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import shutil
import time
from collections import Counter
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import aiohttp
import psutil
import pytest
from http_support import serving
from support import descendants, until, write_honest
from zoo import FAULTS

STORM_S = float(os.environ.get("HOLDFAST_STORM_S", "6"))
IDLE_S = 2.0  # of reading health beforehand
WARM_UP_S = max(2.0, STORM_S / 4)  # of storm: the log keeps its latest 8192 events in memory, and is to be full
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
    "/v1/plugins/",
    "/readyz",
]


class Watcher:
    """Reads every health route in turn, and keeps what was answered and how long it took."""

    def __init__(self, http: aiohttp.ClientSession) -> None:
        self._http = http
        self.answers: Counter[tuple[str, int]] = Counter()
        self.took_s: list[float] = []

    async def read(self, over: Callable[[], bool]) -> None:
        for path in itertools.cycle(HEALTH):
            if over():
                return
            began_s = time.perf_counter()
            async with self._http.get(path) as answer:
                assert await answer.read()
            self.took_s.append(time.perf_counter() - began_s)
            self.answers[path, answer.status] += 1

    def p99_ms(self) -> float:
        return sorted(self.took_s)[int(len(self.took_s) * 0.99)] * 1000


async def storm(http: aiohttp.ClientSession, during_s: float) -> tuple[Watcher, Counter[str]]:
    """Restart and call the zoo, call the honest plugin and read health, all without pause."""
    end_s = time.monotonic() + during_s
    seen: Counter[str] = Counter()
    watcher = Watcher(http)

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
        for each in [*work, honest(), watcher.read(over)]:
            group.create_task(each)
    return watcher, seen


@pytest.mark.timeout(120 + 2 * STORM_S)
@pytest.mark.contract(1, 4)
async def test_in_a_storm_of_breaking_plugins_health_answers_and_the_honest_one_serves(
    plugins: Path, data_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for folder in ZOO:
        shutil.copytree(FAULTS / folder, plugins / folder)
    write_honest(plugins)
    processes = descendants()
    async with (
        serving(plugins, data_dir, stop_grace_s=0.3) as lab,
        # The engine's memory is measured in this process, and aiohttp's own test client keeps every response.
        aiohttp.ClientSession(lab.http.make_url("/")) as http,
    ):
        end_s = time.monotonic() + IDLE_S
        idle = Watcher(http)
        await idle.read(lambda: time.monotonic() >= end_s)
        await storm(http, WARM_UP_S)
        engine = psutil.Process()
        before = engine.memory_info().rss
        watcher, seen = await storm(http, STORM_S)
        growth = (engine.memory_info().rss - before) / MIB
        # The last to be called may still be on their way out.
        await until(lambda: len(list(lab.engine.scratch_root.iterdir())) <= len(ZOO) + 1)
    with capsys.disabled():
        print(
            f"\nstorm of {STORM_S:g} s: {dict(seen)}; {watcher.answers.total()} health reads, "
            f"p99 {watcher.p99_ms():.1f} ms (idle {idle.p99_ms():.1f} ms); engine {growth:+.1f} MiB"
        )
    assert {status for _, status in watcher.answers} == {200}
    assert seen["honest"]
    assert growth < MAX_GROWTH_MIB
    await until(lambda: descendants() == processes)
