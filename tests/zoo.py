"""What holds for every plugin that breaks: fault × moment → state, reason, the caller's answer, the verdict.

A row runs a folder of tests/faults in a real worker process beside an honest plugin. The honest plugin's calls and
every health read succeed throughout, the reason says what broke and where, later callers are told the same, and
nothing of the worker is left.
"""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import signal
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from enum import StrEnum
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from structlog.testing import capture_logs
from support import descendants, held, hosting, next_event, until, write_honest

from engine import Engine
from engine.outcome import Broke, Completed, Outcome, Refused

FAULTS = Path(__file__).parent / "faults"
STATES = {"LOADED", "INITIALIZED", "RUNNING", "FAILED", "UNAVAILABLE"}


class Moment(StrEnum):
    """When the fault comes."""

    START = "start"  # import, __init__, validate()
    CALL = "call"  # the tool breaks by itself
    KILLED = "killed"  # while the tool runs, the test sends the worker a signal
    IDLE = "idle"  # the call was answered; the test then sets the fault off
    IDLE_KILLED = "idle_killed"  # likewise, with a signal
    AFTER = "after"  # the call was answered, and the fault follows by itself


ANSWERED = {Moment.IDLE, Moment.IDLE_KILLED, Moment.AFTER}


class Fault(NamedTuple):
    """One row. `reason` holds regular expressions that the reason must match, each."""

    folder: str
    tool: str
    moment: Moment
    code: str
    reason: tuple[str, ...]
    error_type: str = "NotInService"
    state: str = "FAILED"
    signal: signal.Signals | None = None

    def __str__(self) -> str:
        name = self.folder if self.moment is Moment.START else self.tool
        return f"{name}-{self.signal.name}-{self.moment}" if self.signal else name


def start(folder: str, code: str, *reason: str, state: str = "FAILED") -> Fault:
    return Fault(folder, "work", Moment.START, code, reason, state=state)


def call(tool: str, code: str, error_type: str, *reason: str, folder: str = "breaks_on_call") -> Fault:
    return Fault(folder, tool, Moment.CALL, code, reason, error_type)


def after(tool: str, code: str, *reason: str, folder: str, moment: Moment = Moment.AFTER) -> Fault:
    return Fault(folder, tool, moment, code, reason)


def killed(moment: Moment, number: signal.Signals, *reason: str) -> Fault:
    tool = "waits" if moment is Moment.KILLED else "works"
    kind = "KilledExternally" if moment is Moment.KILLED else ""
    return Fault("breaks_on_call", tool, moment, "killed_externally", reason, kind, signal=number)


def at(line: str, function: str, file: str = "plugin.py") -> str:
    """The place of the line in the plugin's code that holds `line`, as reasons write it."""
    return f"AT {file} {function} {line}"


LIMITS = {"tool_timeout", "start_timeout", "memory_limit", "process_limit", "scratch_limit"}


def rows(table: Iterable[Fault]) -> list[Any]:
    """A parameter for each, with the items of the contract that it proves."""
    marks = pytest.mark.contract
    return [
        pytest.param(fault, id=str(fault), marks=marks(1, 2, 3, 4, *(6,) * (fault.code in LIMITS)))
        for fault in table
    ]


async def breaks(fault: Fault, plugins: Path, data_dir: Path) -> None:
    """Have a plugin break, and see that all of this is so."""
    before, processes = held(), descendants()
    shutil.copytree(FAULTS / fault.folder, plugins / fault.folder)
    write_honest(plugins)
    with capture_logs() as logs:
        async with hosting(plugins, data_dir) as engine:
            async with asyncio.timeout(20), service(engine, fault.folder):
                outcome = await set_off(engine, fault)
                exited = await next_event(engine, "worker.exited", fault.folder)
                await next_state(engine, fault.folder, {fault.state})
            health = engine.health(fault.folder)
            assert (health.state, health.reason_code) == (fault.state, fault.code)
            assert health.reason is not None
            for pattern in fault.reason:
                assert re.search(place(fault, pattern), health.reason), health.reason
            assert exited.data.verdict == fault.code  # type: ignore[union-attr]
            answered(outcome, fault, health.reason)
            await refused(engine, fault, health.reason)
            await nothing_left(engine, fault.folder)

            again = await engine.restart(fault.folder)
            assert again.incarnation == 2
            if fault.moment is Moment.START:
                assert (again.state, again.reason_code, again.reason) == (fault.state, fault.code, health.reason)
            else:
                assert (again.state, again.reason) == ("INITIALIZED", None)
            assert (await engine.run("honest", "echo")).ok
            assert not {**engine.faults, **engine.bus.faults, **engine.log.faults}
    assert not [entry for entry in logs if entry["log_level"] == "error"]
    await until(lambda: descendants() == processes)
    assert held() == before


@asynccontextmanager
async def service(engine: Engine, broken: str) -> AsyncIterator[None]:
    """While this lasts, the honest plugin is called and all health is read, and every one of these succeeds."""
    over = False
    rounds = 0

    async def serve() -> None:
        nonlocal rounds
        while not over or not rounds:
            outcome = await engine.run("honest", "echo", {"text": str(rounds)})
            assert outcome.ok, outcome
            assert outcome.value == str(rounds)
            states = {health.name: health.state for health in engine.plugins()}
            assert states.keys() == {"honest", broken}
            assert states["honest"] == "RUNNING"
            assert states[broken] in STATES
            assert engine.health(broken).name == broken
            rounds += 1

    task = asyncio.create_task(serve())
    try:
        yield
    finally:
        over = True
        await task
    assert rounds


async def set_off(engine: Engine, fault: Fault) -> Outcome:
    """Bring the fault about; returns what the caller was told."""
    pid = engine.health(fault.folder).pid
    if fault.moment is Moment.KILLED:
        assert fault.signal is not None
        assert pid is not None
        running = asyncio.create_task(engine.run(fault.folder, fault.tool))
        await next_event(engine, "plugin.call.started", fault.folder)
        os.kill(pid, fault.signal)
        return await running
    outcome = await engine.run(fault.folder, fault.tool)
    if fault.moment is Moment.IDLE:
        assert outcome.value is not None
        await asyncio.to_thread(Path(outcome.value).write_bytes, b"now")
    if fault.moment is Moment.IDLE_KILLED:
        assert fault.signal is not None
        assert pid is not None
        os.kill(pid, fault.signal)
    return outcome


def answered(outcome: Outcome, fault: Fault, reason: str) -> None:
    """The call that met the fault got the whole truth, or had been answered before."""
    if fault.moment in ANSWERED:
        assert isinstance(outcome, Completed)
        return
    assert isinstance(outcome, Refused if fault.moment is Moment.START else Broke)
    assert outcome.reason_code == fault.code
    assert re.fullmatch(fault.error_type, outcome.error_type)
    assert outcome.state == fault.state
    assert reason in outcome.error


async def refused(engine: Engine, fault: Fault, reason: str) -> None:
    """Every later call is told why there is no service, without a worker."""
    for _ in range(2):
        later = await engine.run(fault.folder, fault.tool)
        assert isinstance(later, Refused)
        assert (later.reason_code, later.error_type, later.state) == (fault.code, "NotInService", fault.state)
        assert reason in later.error


async def nothing_left(engine: Engine, name: str) -> None:
    """No process below us but those above of workers and the honest one; no scratch folder of the plugin's."""
    honest = engine.health("honest").pid
    await until(lambda: descendants() == {*above(engine), *spares(), honest})
    await until(lambda: not list(engine.scratch_root.glob(f"{name}-*")))


async def next_state(engine: Engine, name: str, states: set[str]) -> Any:
    """The plugin's health once it is in one of the states."""
    async for _ in engine.events():
        if engine.health(name).state in states:
            return engine.health(name)
    raise AssertionError(f"{name} never was {states}")


def place(fault: Fault, pattern: str) -> str:
    """A regular expression for a place given by what stands there: line numbers change, code does not."""
    if not pattern.startswith("AT "):
        return pattern
    _, file, function, line = pattern.split(" ", 3)
    lines = (FAULTS / fault.folder / file).read_text().splitlines()
    (number,) = [n for n, text in enumerate(lines, 1) if line in text]
    return re.escape(f"{file}:{number} in `{function}`")


def fork_server(engine: Engine) -> int:
    pid = engine._spawner.fork_server_pid
    assert pid is not None
    return pid


def spares() -> set[int]:
    """Workers that were forked in advance, and serve nobody yet."""
    return {pid for pid in descendants() if name_of(pid) == "holdfast-spare"}


async def the_spare() -> int:
    """The one, which comes when the fork server has nothing else to do, under its own name."""
    await until(lambda: len(spares()) == 1)
    (spare,) = spares()
    return spare


def name_of(pid: int) -> str:
    """A process's name, as `ps` shows it; "" of one that is gone."""
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except (FileNotFoundError, ProcessLookupError):
        return ""


def above(engine: Engine) -> set[int]:
    """What the workers are below of: the reaper and the fork server."""
    reaper = engine._spawner.reaper_pid
    assert reaper is not None
    return {reaper, fork_server(engine)}
