"""How long starting takes, and what what was started weighs; beside starting a bare Python."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import time
import venv
from pathlib import Path

import msgspec

from benchmarks.forks import pss_mib
from benchmarks.probes import Plan
from benchmarks.probes.hosting import check_in_service, hosting, run, settings, write_plain
from benchmarks.probes.timing import async_latencies
from benchmarks.stats import percentile
from engine import Engine
from events.envelope import Event, Transition

PLUGINS = 100
_RESTARTS_S = 2.0
_TURNS, _PYTHONS = 8, 10
_WARM_RESTARTS = 5


def python(plan: Plan) -> dict[str, float]:
    """`python -c pass`, a hundred times one after another (fewer where it is to be quick, and scaled)."""
    times = round(plan.of(PLUGINS))
    found = _run(_bare_python(plan), times)
    return {"p50_ms": percentile(found, 0.5) * 1e3, "hundred_s": sum(found) / times * PLUGINS}


def _bare_python(plan: Plan) -> Path:
    """One in a new environment: whatever is installed in a used one may run at each start (`site`, .pth files)."""
    venv.create(plan.folder / "bare", with_pip=False)
    return plan.folder / "bare" / "bin" / "python"


def _run(python: Path, times: int) -> list[float]:
    found = []
    for _ in range(times):
        started_s = time.perf_counter()
        subprocess.run([python, "-c", "pass"], check=True)
        found.append(time.perf_counter() - started_s)
    return found


def least(plan: Plan) -> dict[str, float]:
    """The least that a start comes to, and a worker weighs: see `benchmarks.forks`."""
    file = write_plain(plan.folder / "plugins", 1) / "plain-0" / "plain.py"
    command = [sys.executable, "-m", "benchmarks.forks", str(file), "Plain", str(time.perf_counter())]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE)
    return msgspec.json.decode(done.stdout, type=dict[str, float])


def worker(plan: Plan) -> dict[str, float]:
    """From LOADED to INITIALIZED, of a trivial plugin, restarted again and again; in turn with `python -c pass`.

    `restart_ms` is the whole of `Engine.restart`: worker ended, manifest read again, the next one INITIALIZED.
    """
    return run(_worker(plan))


async def _worker(plan: Plan) -> dict[str, float]:
    async with hosting(write_plain(plan.folder / "plugins", 1)) as engine:
        starts = _Starts()
        engine.bus.subscribe(starts)

        async def restart(_: int) -> None:
            health = await engine.restart("plain-0")
            if health.state != "INITIALIZED":
                raise RuntimeError(f"{health.state}: {health.reason}")

        await async_latencies(restart, 0, _WARM_RESTARTS)
        starts.took_s.clear()
        bare, found, pythons = _bare_python(plan), [], []
        for _ in range(_TURNS):
            found += await async_latencies(restart, plan.of(_RESTARTS_S) / _TURNS, 0)
            pythons += await asyncio.to_thread(_run, bare, _PYTHONS)
    return {
        "p50_ms": percentile(starts.took_s, 0.5) * 1e3,
        "p99_ms": percentile(starts.took_s, 0.99) * 1e3,
        "restart_ms": percentile(found, 0.5) * 1e3,
        "python_p50_ms": percentile(pythons, 0.5) * 1e3,
    }


class _Starts:
    """A subscriber of the bus: how long each start took, by its own events."""

    name = "starts"

    def __init__(self) -> None:
        self.took_s: list[float] = []
        self._loaded_ns = 0

    def offer(self, event: Event) -> None:
        """Keep the time from one to the other."""
        if isinstance(event.data, Transition):
            if event.data.to == "LOADED":
                self._loaded_ns = event.time_ns
            elif event.data.to == "INITIALIZED":
                self.took_s.append((event.time_ns - self._loaded_ns) / 1e9)


def engine(plan: Plan) -> dict[str, float]:
    """A new engine with a hundred trivial plugins, until all are INITIALIZED; then what it and they weigh."""
    return run(_engine(plan))


async def _engine(plan: Plan) -> dict[str, float]:
    folder = write_plain(plan.folder / "plugins", PLUGINS)
    started_s = time.perf_counter()
    async with Engine(settings(folder)) as host:
        took_s = time.perf_counter() - started_s
        check_in_service(host)
        workers = [pss_mib(health.pid) for health in host.plugins() if health.pid is not None]
        if len(workers) != PLUGINS:
            raise RuntimeError(f"{len(workers)} workers, not {PLUGINS}")
        return {
            "start_s": took_s,
            "worker_mib": percentile(workers, 0.5),
            "heaviest_worker_mib": max(workers),
            "engine_mib": pss_mib(os.getpid()),
            "all_mib": sum(workers) + pss_mib(os.getpid()),
        }
