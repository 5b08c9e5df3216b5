"""Five hundred readers of the event stream while a plugin writes two hundred lines a second."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import msgspec

from benchmarks.probes import Plan
from benchmarks.probes.hosting import write_plain
from benchmarks.probes.serving import Server, holdfast
from benchmarks.readers import Seen

READERS = 500
PROCESSES = 2  # that the readers are spread over
PER_S = 200
EMIT_S = 10.0
_PATIENCE_S = 10.0  # for what is under way when the last line was written
_CPU_S = 1 / os.sysconf("SC_CLK_TCK")


def sse(plan: Plan) -> dict[str, float]:
    """Every line has to reach every reader; the engine's time is its process's own, as the kernel counts it."""
    lines = round(plan.of(EMIT_S) * PER_S)
    # More readers than the default admits, and a plugin that writes faster than it allows one to.
    settings = {"HOLDFAST_MAX_STREAMS": str(READERS), "HOLDFAST_LOG_LINES_PER_S": str(PER_S * 4)}
    with holdfast(write_plain(plan.folder / "plugins", 1), settings) as server:
        after = msgspec.json.decode(server.get("/v1/plugins/plain-0/health")[1])["as_of"]
        with _readers(server, lines, after, plan.of(EMIT_S) + _PATIENCE_S) as readers:
            before_s, started_s = _cpu_s(server.pid), time.perf_counter()
            emit = msgspec.json.encode({"lines": lines, "per_s": PER_S})
            status, answer = server.post("/v1/plugins/plain-0/tools/emit/run", emit)
            cores = (_cpu_s(server.pid) - before_s) / (time.perf_counter() - started_s)
            if status != 200:
                raise RuntimeError(answer.decode())
            seen = [_result(reader) for reader in readers]
    return {**_figures(seen, lines), "engine_cores": cores}


def _figures(seen: list[Seen], lines: int) -> dict[str, float]:
    delays_ms: dict[int, int] = {}
    for one in seen:
        for delay_ms, count in one.delays_ms.items():
            delays_ms[delay_ms] = delays_ms.get(delay_ms, 0) + count
    return {
        "missing": READERS * lines - sum(one.lines for one in seen) + sum(one.holes for one in seen),
        "p50_ms": _share_ms(delays_ms, 0.5),
        "p99_ms": _share_ms(delays_ms, 0.99),
        "max_ms": max(delays_ms, default=0),
    }


def _share_ms(delays_ms: dict[int, int], share: float) -> float:
    """The upper end of the millisecond that this share of the delays does not exceed; 0 where nothing arrived."""
    left = share * sum(delays_ms.values())
    for delay_ms in sorted(delays_ms):
        left -= delays_ms[delay_ms]
        if left <= 0:
            return delay_ms + 1
    return 0


@contextmanager
def _readers(server: Server, lines: int, after: int, for_s: float) -> Iterator[list[subprocess.Popen[str]]]:
    """All of them, connected."""
    words = [str(server.port), str(READERS // PROCESSES), str(lines), str(after), str(for_s)]
    command = [sys.executable, "-m", "benchmarks.readers", *words]
    with ExitStack() as stack:
        started = []
        for _ in range(PROCESSES):
            process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
            stack.callback(process.wait)
            stack.callback(process.kill)
            started.append(process)
        for process in started:
            if _line(process) != "ready\n":
                raise RuntimeError("the readers could not connect; the lines before this one say why")
        yield started


def _result(process: subprocess.Popen[str]) -> Seen:
    return msgspec.json.decode(_line(process), type=Seen)


def _line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline()


def _cpu_s(pid: int) -> float:
    """What a process has used of the cores, its own threads only (proc(5): utime and stime)."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) * _CPU_S
