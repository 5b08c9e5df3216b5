"""The peers' calls of the same work: a no-op, and a frame. Each as its documentation shows, with one worker."""

from __future__ import annotations

import concurrent.futures
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.probes import Plan
from benchmarks.probes.timing import CALLS_S, IN_FLIGHT_S, in_us, latencies, per_s
from benchmarks.subjects import functions

_TIMEOUT_S = 60.0
_RAY_END_S = 10.0
_RAY_LOOK_S = 0.2


class Pool(NamedTuple):
    """How to submit a function with an argument, and how to wait for its value."""

    submit: Callable[[str, object], Any]
    wait: Callable[[Any], Any]

    def call(self, name: str, argument: object) -> Any:
        """Both."""
        return self.wait(self.submit(name, argument))


def noop(plan: Plan, peer: str) -> dict[str, float]:
    """One in flight, then several."""
    with MAKE[peer]() as pool:

        def call(n: int) -> None:
            if pool.call("noop", n) != n:
                raise RuntimeError("a call was answered with another one's value")

        found = latencies(call, plan.of(CALLS_S))
        rate = per_s(lambda n: pool.submit("noop", n), pool.wait, plan.of(IN_FLIGHT_S))
        return {**in_us(found), "per_s": rate}


def frames(plan: Plan, peer: str) -> dict[str, float]:
    """A frame in, and in and out."""
    from benchmarks.probes.frames import FRAMES_S, WARM_FRAMES, check, in_ms, make_frame, stamp

    frame = make_frame()
    with MAKE[peer]() as pool:

        def number(n: int) -> None:
            check(pool.call("number", stamp(frame, n)), n)

        def picture(n: int) -> None:
            check(pool.call("picture", stamp(frame, n))[540, 960, 1], n)

        into = latencies(number, plan.of(FRAMES_S), WARM_FRAMES)
        both = latencies(picture, plan.of(FRAMES_S), WARM_FRAMES)
        return {"in_ms": in_ms(into), "both_ms": in_ms(both)}


@contextmanager
def _pebble() -> Iterator[Pool]:
    with import_module("pebble").ProcessPool(max_workers=1) as pool:

        def submit(name: str, argument: object) -> Any:
            return pool.schedule(getattr(functions, name), args=(argument,), timeout=_TIMEOUT_S)

        yield Pool(submit, lambda future: future.result())


@contextmanager
def _executor() -> Iterator[Pool]:
    with concurrent.futures.ProcessPoolExecutor(max_workers=1) as pool:
        yield _of_futures(pool)


@contextmanager
def _loky() -> Iterator[Pool]:
    pool = import_module("loky").get_reusable_executor(max_workers=1)
    yield _of_futures(pool)
    pool.shutdown()


def _of_futures(pool: Any) -> Pool:
    def submit(name: str, argument: object) -> Any:
        return pool.submit(getattr(functions, name), argument)

    return Pool(submit, lambda future: future.result())


@contextmanager
def _ray() -> Iterator[Pool]:
    """An actor on a cluster of this machine alone."""
    os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}
    ray = import_module("ray")
    # Its sockets lie below this folder, and a socket's path is short (unix(7): 108 bytes).
    folder = tempfile.mkdtemp(prefix="hf-")
    try:
        ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False, logging_level="ERROR", _temp_dir=folder)
        actor = ray.remote(Actor).remote()

        def submit(name: str, argument: object) -> Any:
            return getattr(actor, name).remote(argument)

        yield Pool(submit, ray.get)
        ray.shutdown()
    finally:
        _remove(Path(folder))


def _remove(folder: Path) -> None:
    """Ray's processes go on writing for a moment after `shutdown`."""
    end_s = time.monotonic() + _RAY_END_S
    while folder.exists() and time.monotonic() < end_s:
        shutil.rmtree(folder, ignore_errors=True)
        time.sleep(_RAY_LOOK_S)


class Actor:
    """The functions, as a Ray actor's methods."""

    def noop(self, n: int) -> int:
        """See `functions`."""
        return functions.noop(n)

    def number(self, frame: Any) -> int:
        """See `functions`."""
        return functions.number(frame)

    def picture(self, frame: Any) -> Any:
        """See `functions`."""
        return functions.picture(frame)


MAKE = {"pebble": _pebble, "executor": _executor, "loky": _loky, "ray": _ray}
