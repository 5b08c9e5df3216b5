"""The memory limit of a process tree, measured from outside by a process that is not the engine's.

`python -m pytest -s tests/test_memory_limit.py` prints the figures: what the tree held at most, and how long it
lived once it was over. Only a generous bound decides: the machine may be busy with something else.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from support import hosting, until, write_plugin

from engine import Engine
from engine.sandbox import proc
from engine.sandbox.limits import allowance_bytes
from engine.sandbox.memory import Meter

FAULTS = Path(__file__).parent / "faults"
SAMPLER = Path(__file__).parent / "memory_sampler.py"
SHM = Path("/dev/shm")
SHM_DEVICE = SHM.stat().st_dev
MIB = 1 << 20
NAME = "takes_memory"
LIMIT = 256 * MIB
SHAPES = [
    "slowly",
    "in_children",
    "by_writing_to_shared_pages",
    "by_mapping_shared_memory",
    "in_memfds",
    "in_memfds_of_a_child",
]


def in_shm() -> set[Path]:
    return set(SHM.iterdir())


async def sampled(engine: Engine, tool: str) -> dict[str, Any]:
    """Run the tool to its end; what the sampler saw of it."""
    pid = engine.health(NAME).pid
    sampler = await asyncio.create_subprocess_exec(
        sys.executable, SAMPLER, str(pid), str(LIMIT), stdout=asyncio.subprocess.PIPE
    )
    assert sampler.stdout is not None
    assert await sampler.stdout.readline() == b"watching\n"
    outcome = await engine.run(NAME, tool)
    assert (outcome.ok, getattr(outcome, "reason_code", None)) == (False, "memory_limit"), outcome
    figures: dict[str, Any] = json.loads(await sampler.stdout.readline())
    assert await sampler.wait() == 0
    return figures


@pytest.mark.contract(6)
@pytest.mark.parametrize("tool", SHAPES)
async def test_a_tree_is_ended_soon_after_it_is_over_its_limit(tool: str, plugins: Path, data_dir: Path) -> None:
    shutil.copytree(FAULTS / NAME, plugins / NAME)
    async with hosting(plugins, data_dir) as engine:
        figures = await sampled(engine, tool)
        (crash,) = await engine.crashes(NAME)
    over = (figures["peak_bytes"] - LIMIT) / MIB
    lived = figures["lived_ms"]
    seen = "never seen over it" if lived is None else f"dead {lived:.0f} ms after it was seen over"
    print(f"\n{tool:30} at most {over:+4.0f} MiB of its limit, {seen}; {figures['samples']} samples")
    assert crash.memory.limit == "tree"
    assert crash.memory.peak_bytes > LIMIT
    assert figures["peak_bytes"] < LIMIT + 4 * allowance_bytes(LIMIT)
    assert lived is None or lived < 5_000


@pytest.mark.contract(6)
async def test_a_worker_may_fill_its_dev_shm_up_to_its_limit_and_leaves_nothing_there(
    plugins: Path, data_dir: Path
) -> None:
    code = """
    import mmap, os
    from multiprocessing.shared_memory import SharedMemory
    class Plugin:
        def __init__(self, context): pass
        def validate(self): pass
        def put(self) -> list:
            open("/dev/shm/left_behind", "wb").write(bytes(8 << 20))
            SharedMemory("also_left_behind", create=True, size=1 << 20)
            return [os.stat("/dev/shm").st_dev, os.listdir("/dev/shm"), os.statvfs("/dev/shm").f_blocks * 4096]
    """
    write_plugin(plugins, "first", code, ["put"], "memory_mib = 100")
    write_plugin(plugins, "second", code, ["put"])
    ours = in_shm()
    async with hosting(plugins, data_dir) as engine:
        answers = [await engine.run(name, "put") for name in ("first", "second")]
        assert all(answer.ok for answer in answers), answers
        answered: list[Any] = [answer.value for answer in answers]
        (first, names, size), (second, _, _) = answered
        assert len({first, second, SHM_DEVICE}) == 3
        assert sorted(names) == ["also_left_behind", "left_behind"]
        assert size == 125 * MIB  # the watch ends it at 100
        await until(lambda: (engine.health("first").memory_bytes or 0) > 9 * MIB)
    assert in_shm() == ours


@pytest.mark.contract(6)
async def test_system_v_shared_memory_cannot_be_had(plugins: Path, data_dir: Path) -> None:
    code = """
    import ctypes, errno
    class Plugin:
        def __init__(self, context): pass
        def validate(self): pass
        def ask(self) -> list:
            libc, said = ctypes.CDLL(None, use_errno=True), []
            for call in (lambda: libc.shmget(0, 4096, 0o1600), lambda: libc.msgget(0, 0o1600),
                         lambda: libc.semget(0, 1, 0o1600)):
                said.append([call(), errno.errorcode[ctypes.get_errno()]])
            return said
    """
    write_plugin(plugins, "old", code, ["ask"])
    async with hosting(plugins, data_dir) as engine:
        outcome = await engine.run("old", "ask")
        assert outcome.ok, outcome
        assert outcome.value == [[-1, "ENOSYS"]] * 3


def test_of_a_tree_each_byte_of_shared_memory_counts_once() -> None:
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)
    fd = os.memfd_create("counted")
    try:
        meter = Meter(os.getpid(), 1 << 40, 1 << 20)

        def used() -> int:
            return meter.read([os.getpid()], None, proc.machine(), afresh=True).shared_bytes

        before = used()
        os.write(fd, bytes(32 * MIB))
        assert used() - before == 32 * MIB
        again = os.dup(fd)
        assert used() - before == 32 * MIB
        os.close(again)
    finally:
        os.close(fd)
    assert used() == before
