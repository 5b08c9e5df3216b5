"""The rows of the speed table, as data: what each compares, the ratio to reach, and what is plotted of it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from benchmarks.probes import PROBES


class Check(NamedTuple):
    """One condition of a row. Figures are named `<probe>.<name>`.

    Attributes:
        row: its row; several conditions may share one.
        what: in words.
        figure: what is judged.
        base: what it is divided by, in the same round; None: the figure itself is judged, in its own unit.
        reach: the ratio, or the figure, to reach.
        at_least: whether more is better.
        worst: every round has to hold, not the median of them.
        least: the same ratio without Holdfast, as a figure and its base: what comes out if nothing is checked,
            limited, watched, ended or told.
    """

    row: str
    what: str
    figure: str
    base: str | None
    reach: float
    at_least: bool = False
    worst: bool = False
    least: tuple[str, str | None] | None = None

    @property
    def figures(self) -> tuple[str, ...]:
        """All that it names."""
        return tuple(name for name in (self.figure, self.base, *(self.least or ())) if name is not None)


class Plot(NamedTuple):
    """One picture: a bar for each figure, all of one unit. A row of its name measures all of them."""

    name: str
    title: str
    figures: tuple[str, ...]


ROWS = {
    "call": "`Engine.run` of a no-op, one in flight, asyncio's own loop",
    "call-uvloop": "the same on uvloop",
    "call-p99": "the same, its slowest hundredth",
    "throughput": "calls per second, one worker, 8 in flight",
    "frame-in": "1080p frame in, a number out",
    "frame-both": "1080p frame in and out",
    "http-run": "the no-op by HTTP",
    "http-health": "one plugin's health, of 100",
    "http-list": "the health of all 100 plugins",
    "worker-start": "worker start to INITIALIZED",
    "engine-start": "engine start, 100 plugins INITIALIZED",
    "memory": "memory, 100 idle workers",
    "deadline": "deadline passed → worker dead, FAILED in health",
    "publish": "events published, 20 s",
    "sse": "500 readers, 200 events/s each",
    "flat": "with 10 and 100 plugins as with 1",
    "tracking": "tracking a clip through the sandbox",
}

_FLAT = 1.2

CHECKS = (
    Check(
        "call",
        "no-op p50, to the streams echo",
        "holdfast.p50_us",
        "echo.p50_us",
        1.25,
        least=("least.p50_us", "echo.p50_us"),
    ),
    Check(
        "call",
        "no-op p50, to pebble",
        "holdfast.p50_us",
        "pebble.p50_us",
        0.5,
        least=("least.p50_us", "pebble.p50_us"),
    ),
    Check(
        "call-uvloop",
        "no-op p50 on uvloop, to that echo",
        "holdfast-uvloop.p50_us",
        "echo.p50_us",
        0.8,
        least=("least-uvloop.p50_us", "echo.p50_us"),
    ),
    Check(
        "call-p99",
        "no-op p99, to its p50",
        "holdfast.p99_us",
        "holdfast.p50_us",
        3,
        least=("least.p99_us", "least.p50_us"),
    ),
    Check(
        "call-p99",
        "no-op p99 on uvloop, to its p50",
        "holdfast-uvloop.p99_us",
        "holdfast-uvloop.p50_us",
        3,
        least=("least-uvloop.p99_us", "least-uvloop.p50_us"),
    ),
    Check(
        "throughput",
        "8 in flight, to pebble",
        "holdfast.per_s",
        "pebble.per_s",
        1.5,
        at_least=True,
        least=("least.per_s", "pebble.per_s"),
    ),
    Check(
        "throughput",
        "8 in flight, to ProcessPoolExecutor",
        "holdfast.per_s",
        "executor.per_s",
        3,
        at_least=True,
        least=("least.per_s", "executor.per_s"),
    ),
    Check(
        "frame-in",
        "frame in, to one copy",
        "frame.in_ms",
        "frame.copy_ms",
        2.5,
        least=("copy.in_ms", "frame.copy_ms"),
    ),
    Check("frame-in", "frame in, to pebble", "frame.in_ms", "pebble-frame.in_ms", 0.1),
    Check("frame-in", "frame in, to Ray", "frame.in_ms", "ray-frame.in_ms", 0.2),
    Check(
        "frame-both",
        "frame in and out, to one copy",
        "frame.both_ms",
        "frame.copy_ms",
        4,
        least=("copy.arena_ms", "frame.copy_ms"),
    ),
    Check(
        "http-run",
        "`POST …/run`, to the bare handler",
        "http-run.per_s",
        "http-run.bare_per_s",
        0.5,
        at_least=True,
        least=("http-run.least_per_s", "http-run.bare_per_s"),
    ),
    Check(
        "http-health",
        "health, to the bare handler",
        "http-health.per_s",
        "http-health.bare_per_s",
        0.85,
        at_least=True,
    ),
    Check(
        "http-list",
        "list, to as many bytes bare",
        "http-list.per_s",
        "http-list.bare_per_s",
        0.4,
        at_least=True,
    ),
    Check(
        "worker-start",
        "worker start p50, to `python -c pass`",
        "worker.p50_ms",
        "worker.python_p50_ms",
        0.35,
        least=("least-start.p50_ms", "worker.python_p50_ms"),
    ),
    Check(
        "engine-start",
        "start with 100, to 100 bare Pythons",
        "engine.start_s",
        "python.hundred_s",
        0.4,
        least=("least-start.hundred_s", "python.hundred_s"),
    ),
    Check("memory", "an idle worker, PSS", "engine.worker_mib", None, 2, least=("least-start.worker_mib", None)),
    Check("memory", "the engine with 100 of them, PSS", "engine.engine_mib", None, 90),
    Check("deadline", "deadline to dead and FAILED, p99", "deadline.p99_ms", None, 100),
    Check("publish", "events per second, durable and audited", "publish.per_s", None, 50_000, at_least=True),
    Check("publish", "events lost in the log", "publish.lost_in_log", None, 0, worst=True),
    Check("publish", "events lost in the audit", "publish.lost_in_audit", None, 0, worst=True),
    Check("sse", "events that did not arrive", "sse.missing", None, 0, worst=True),
    Check("sse", "delay p99", "sse.p99_ms", None, 250),
    Check("sse", "the engine's own CPU", "sse.engine_cores", None, 1),
    *(
        Check(
            "flat", f"{what} with {plugins} plugins, to 1", f"{probe}-{plugins}.{name}", f"{probe}.{name}", *reach
        )
        for what, probe, name, reach in (
            ("no-op p50", "holdfast", "p50_us", (_FLAT, False)),
            ("8 in flight", "holdfast", "per_s", (round(1 / _FLAT, 3), True)),
            ("frame in", "frame", "in_ms", (_FLAT, False)),
            ("frame in and out", "frame", "both_ms", (_FLAT, False)),
        )
        for plugins in (10, 100)
    ),
    *(
        Check(
            "flat",
            f"`POST …/run` with {plugins} plugins, to 1",
            f"http-flat.with_{plugins}_per_s",
            "http-flat.with_1_per_s",
            round(1 / _FLAT, 3),
            at_least=True,
        )
        for plugins in (10, 100)
    ),
    Check("tracking", "the clip, to the same in-process", "track.clip_s", "track.in_process_s", 1.1),
)

_POOLS = ("pebble", "executor", "loky", "ray")

PLOTS = (
    Plot(
        "call",
        "a no-op, one in flight, p50",
        (
            *("socketpair.p50_us", "least.p50_us", "echo.p50_us", "holdfast-uvloop.p50_us", "holdfast.p50_us"),
            *(f"{pool}.p50_us" for pool in _POOLS),
        ),
    ),
    Plot(
        "throughput",
        "a no-op, one worker, 8 in flight",
        ("least.per_s", "holdfast.per_s", "holdfast-uvloop.per_s", *(f"{pool}.per_s" for pool in _POOLS)),
    ),
    Plot(
        "call-p99",
        "a no-op, p50 and p99",
        tuple(
            f"{probe}.{name}"
            for probe in ("least", "holdfast", "least-uvloop", "holdfast-uvloop", "pebble")
            for name in ("p50_us", "p99_us")
        ),
    ),
    Plot(
        "frame-in",
        "1080p frame in, a number out, p50",
        (
            *("copy.p50_ms", "copy.in_ms", "frame.in_ms"),
            *("ray-frame.in_ms", "pebble-frame.in_ms", "executor-frame.in_ms"),
        ),
    ),
    Plot(
        "frame-both",
        "1080p frame in and out, p50",
        (
            *("copy.p50_ms", "copy.arena_ms", "frame.both_ms"),
            *("ray-frame.both_ms", "pebble-frame.both_ms", "executor-frame.both_ms"),
        ),
    ),
    Plot(
        "http",
        "requests per second, 16 connections",
        (
            *("http-health.bare_per_s", "http-health.per_s"),
            *("http-run.bare_per_s", "http-run.least_per_s", "http-run.per_s"),
            *("http-list.bare_per_s", "http-list.per_s"),
        ),
    ),
    Plot("worker-start", "start, p50", ("python.p50_ms", "least-start.p50_ms", "worker.p50_ms")),
    Plot("engine-start", "a hundred starts", ("python.hundred_s", "least-start.hundred_s", "engine.start_s")),
    Plot(
        "memory",
        "memory with 100 idle workers, PSS",
        ("least-start.worker_mib", "engine.worker_mib", "engine.engine_mib"),
    ),
    Plot(
        "deadline", "from a deadline to dead and FAILED", ("deadline.p50_ms", "deadline.p99_ms", "deadline.max_ms")
    ),
    Plot("publish", "events per second, durable and audited", ("publish.per_s",)),
    Plot("sse", "500 readers, 200 events/s: delay", ("sse.p50_ms", "sse.p99_ms", "sse.max_ms")),
    Plot(
        "flat-call",
        "a no-op by plugins registered, p50",
        ("holdfast.p50_us", "holdfast-10.p50_us", "holdfast-100.p50_us"),
    ),
    Plot(
        "flat-frame",
        "1080p frame in by plugins registered, p50",
        ("frame.in_ms", "frame-10.in_ms", "frame-100.in_ms"),
    ),
    Plot(
        "flat-http",
        "`POST …/run` by plugins registered",
        ("http-flat.with_1_per_s", "http-flat.with_10_per_s", "http-flat.with_100_per_s"),
    ),
    Plot("tracking", "tracking a clip", ("track.in_process_s", "track.clip_s")),
)


def probe_of(figure: str) -> str:
    """The probe that a figure is from."""
    return figure.partition(".")[0]


def checks_of(rows: Iterable[str]) -> tuple[Check, ...]:
    """The conditions of these rows, in the table's order."""
    wanted = set(rows)
    return tuple(check for check in CHECKS if check.row in wanted)


def probes_for(checks: Iterable[Check]) -> tuple[str, ...]:
    """The probes that these conditions need, in the order of a round; and those plotted beside them."""
    chosen = tuple(checks)
    needed = {probe_of(name) for check in chosen for name in check.figures}
    rows = {check.row for check in chosen}
    needed |= {probe_of(figure) for plot in PLOTS if plot.name in rows for figure in plot.figures}
    return tuple(probe for probe in PROBES if probe in needed)
