"""Kills a serving engine with SIGKILL under load, again and again, and checks what was promised each time.

    python tests/kill_harness.py --rounds 200

Each round: a real server on the same data folder; subscribers that write down every event they receive; callers,
a plugin that keeps dying and is restarted; then SIGKILL once a random number of events was seen. Afterwards: no
process and no scratch file is left, every event that was seen is in the log with its number and its bytes, the
numbers have no holes, and the counters of the next start are those that the log tells.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import random
import re
import signal
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import aiohttp
import msgspec
from support import descendants, until, write_honest, write_plugin

from events.envelope import CallFinished, Gap, decode
from events.log import EventLog

ROOT = Path(__file__).parents[1]
SUBSCRIBERS = 3
CALLERS = 4

FRAGILE = """
import os, subprocess
class Plugin:
    def __init__(self, context): pass
    def validate(self): pass
    def work(self, how: str) -> str:
        if how == "die": os._exit(3)
        if how == "litter":
            open("litter", "w").write("x" * 100_000)
            subprocess.Popen(["sleep", "600"], start_new_session=True)
        return how
"""


class Promise(msgspec.Struct):
    """What the rounds came to. `broken` is empty, or the engine is at fault."""

    rounds: int = 0
    events_seen: int = 0
    events_kept: int = 0
    calls_answered: int = 0
    unclean_answers: int = 0
    broken: list[str] = []


class Server:
    """A server process and what its subscribers saw."""

    def __init__(self, plugins: Path, data_dir: Path) -> None:
        self._plugins = plugins
        self._data_dir = data_dir
        self.url = ""

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[asyncio.subprocess.Process]:
        """Serving; killed on the way out if it still lives."""
        command = ["-m", "engine", "serve", "--no-bundled", "--port", "0"]
        command += ["--plugins", str(self._plugins), "--data", str(self._data_dir)]
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            *command,
            cwd=ROOT,
            env={**os.environ, "HOLDFAST_ENTRY_POINTS": "false"},
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,
        )
        try:
            assert process.stdout is not None
            while (line := await process.stdout.readline()) and not self._found(line.decode()):
                pass
            yield process
        finally:
            if process.returncode is None:
                process.kill()
            await process.wait()

    def _found(self, line: str) -> bool:
        match = re.search(r"http://[\w.:]+", line)
        self.url = match.group() if match else ""
        return match is not None


async def subscribe(
    http: aiohttp.ClientSession, url: str, after: int, seen: dict[int, str], beat: asyncio.Event
) -> None:
    """Write down what a subscriber receives, until the server is gone."""
    with contextlib.suppress(aiohttp.ClientError, ConnectionError):
        async with http.get(f"{url}/v1/events?after={after}", headers={"Accept": "text/event-stream"}) as answer:
            async for line in answer.content:
                if line.startswith(b"data: "):
                    text = line[6:].decode().rstrip("\n")
                    number = msgspec.json.decode(text)["sequence"]
                    if seen.setdefault(number, text) != text:
                        raise AssertionError(f"event {number} came with two contents")
                    beat.set()


async def call(http: aiohttp.ClientSession, url: str, promise: Promise, rng: random.Random) -> None:
    """Call, break and restart plugins until the server is gone."""
    with contextlib.suppress(aiohttp.ClientError, ConnectionError):
        while True:
            how = rng.choice(["ok", "ok", "litter", "die", "restart"])
            if how == "restart":
                request = http.post(f"{url}/v1/plugins/fragile/restart")
            elif rng.random() < 0.5:
                request = http.post(f"{url}/v1/plugins/honest/tools/echo/run", json={"text": "hi"})
            else:
                request = http.post(f"{url}/v1/plugins/fragile/tools/work/run", json={"how": how})
            async with request as answer:
                await answer.read()
                promise.calls_answered += 1
                promise.unclean_answers += answer.status not in (200, 502, 503)


async def one_round(
    plugins: Path, data_dir: Path, seen: dict[int, str], promise: Promise, rng: random.Random
) -> None:
    """Serve, load, kill, look."""
    server = Server(plugins, data_dir)
    target = len(seen) + rng.randint(1, rng.choice([40, 400]))  # half of them while the plugins start
    async with server.running() as process, aiohttp.ClientSession() as http:
        await check_counters(http, server.url, data_dir, seen, promise)
        beat = asyncio.Event()
        last = max(seen, default=0)
        readers = [asyncio.create_task(subscribe(http, server.url, last, seen, beat)) for _ in range(SUBSCRIBERS)]
        callers = [asyncio.create_task(call(http, server.url, promise, rng)) for _ in range(CALLERS)]
        while len(seen) < target:
            beat.clear()
            await asyncio.wait_for(beat.wait(), 20)
        below = descendants(process.pid)
        process.send_signal(signal.SIGKILL)
        await process.wait()
        await asyncio.gather(*readers, *callers)
    await until(lambda: not any(alive(pid) for pid in below))
    await until(lambda: not any((data_dir / "scratch").glob("*")))
    promise.rounds += 1
    await asyncio.to_thread(check_log, data_dir, seen, promise)


def alive(pid: int) -> bool:
    """Whether the process exists and is no zombie."""
    try:
        return ") Z " not in Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False


async def check_counters(
    http: aiohttp.ClientSession, url: str, data_dir: Path, seen: dict[int, str], promise: Promise
) -> None:
    """The counters of a fresh start are at least what the events that were seen say."""
    async with http.get(f"{url}/v1/plugins") as answer:
        plugins = {health["name"]: health for health in await answer.json()}
    counted: dict[str, int] = {}
    for text in seen.values():
        event = decode(text)
        if isinstance(event.data, CallFinished) and event.data.ok and event.subject:
            counted[event.subject] = counted.get(event.subject, 0) + 1
    for name, count in counted.items():
        if plugins[name]["success_count"] < count:
            promise.broken.append(
                f"{name}: {count} successes were seen, {plugins[name]['success_count']} came back"
            )


def check_log(data_dir: Path, seen: dict[int, str], promise: Promise) -> None:
    """Everything that was seen is there, unchanged, without holes."""
    with EventLog.open(data_dir / "events.db", source="kill_harness") as log:
        kept: dict[int, str] = {}
        after = 0
        while records := log.page(after, 1000):
            kept.update((record.sequence, record.json.decode()) for record in records)
            after = records[-1].end
    promise.events_seen, promise.events_kept = len(seen), len(kept)
    promise.broken.extend(holes(kept))
    promise.broken.extend(
        f"event {number} was seen and is {'changed' if number in kept else 'gone'}"
        for number, text in seen.items()
        if kept.get(number) != text
    )


def holes(kept: dict[int, str]) -> Iterator[str]:
    """Numbers that neither an event nor a gap stands for."""
    due = 1
    for number in sorted(kept):
        if number != due:
            yield f"numbers {due} to {number - 1} are missing"
        data = decode(kept[number]).data
        due = (data.last if isinstance(data, Gap) else number) + 1


async def rounds(count: int, folder: Path, seed: int) -> Promise:
    """Run rounds on one data folder until a promise is broken."""
    plugins, data_dir = folder / "plugins", folder / "data"
    write_honest(plugins)
    write_plugin(plugins, "fragile", FRAGILE, ["work"])
    promise, rng = Promise(), random.Random(seed)
    seen: dict[int, str] = {}
    for _ in range(count):
        await one_round(plugins, data_dir, seen, promise, rng)
        if promise.broken:
            break
    return promise


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--seed", type=int, default=time.time_ns() % 1_000_000)
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="holdfast-kill-") as folder:
        promise = asyncio.run(rounds(chosen.rounds, Path(folder), chosen.seed))
    print(f"seed {chosen.seed}: {promise}")
    sys.exit(bool(promise.broken))


if __name__ == "__main__":
    main()
