"""What a worker answers may be made to hurt the engine: it is bounded before it is decoded, shown or counted."""

from __future__ import annotations

import asyncio
import itertools
import mmap
import os
from pathlib import Path
from typing import Any

import pytest
from msgspec import msgpack
from support import FINDS_ITS_CHANNEL, hosting, write_plugin

from engine.errors import SetupError
from engine.outcome import Broke
from engine.sandbox import arena, values
from engine.sandbox.untrusted import MAX_CONTAINERS, Unpacker
from events.envelope import CallProgress

ANYTHING = """
class Plugin:
    def __init__(self, context): pass
    def validate(self): pass
    def do(self, code: str, progress):
        names = {"progress": progress}
        exec(code, names)
        return names.get("r")
"""

BROKEN = {
    "an extension of its own": (
        "from msgspec.msgpack import Ext, encode; r = Ext(2, encode(('|u1', [2**63 - 1] * 200_000, 0, 10)))",
        ("result_invalid", "Ext"),
    ),
    "a key that is no text": ("r = {True: 1}", ("result_invalid", "bool")),
    "too many containers": ("r = [[1, 2]] * 300_000", ("result_too_large", "lists and maps")),
    "too deep": ("r = []\nfor _ in range(300): r = [r]", ("result_invalid", "nested deeper than 256")),
    "too many plain values": ("r = [[]] * 20_000_000", ("result_too_large", "plain values")),
    "a type with a long name": (
        "raise type('X' * 30_000_000, (Exception,), {})()",
        ("tool_exception", "an exception"),
    ),
    "a note that is no number": (
        "import ctypes, os; os.write(102, b'self-signal ' + b'9' * 5000 + b' at x\\n'); ctypes.CDLL(None).abort()",
        ("worker_signal", "SIGABRT"),
    ),
}


@pytest.mark.contract(4, 6)
@pytest.mark.parametrize("case", list(BROKEN))
async def test_an_answer_that_would_hurt_the_engine_is_the_plugins_failure(
    case: str, plugins: Path, data_dir: Path
) -> None:
    code, (reason_code, word) = BROKEN[case]
    write_plugin(plugins, "evil", ANYTHING, ["do"], limits="timeout_s = 20")
    async with hosting(plugins, data_dir) as engine:
        outcome = await engine.run("evil", "do", {"code": code})
        assert isinstance(outcome, Broke)
        assert outcome.reason_code == reason_code, outcome
        assert word in outcome.error
        assert len(outcome.error) < 20_000
        assert engine.health("evil").state == "FAILED"
        assert (await engine.restart("evil")).state == "INITIALIZED"


async def test_progress_is_bounded_however_often_it_is_called(plugins: Path, data_dir: Path) -> None:
    write_plugin(plugins, "evil", ANYTHING, ["do"], limits="timeout_s = 30")
    code = "for i in range(20_000): progress(i, 0); progress(2, 1); progress(float('nan'), 1)"
    async with hosting(plugins, data_dir) as engine:
        assert (await engine.run("evil", "do", {"code": code})).ok
        last = engine.bus.last
        told = 0
        async for event in engine.events():
            told += isinstance(event.data, CallProgress)
            if event.sequence >= last:
                break
        assert told < 1000
        assert not engine.log.faults


async def test_a_restart_that_is_refused_is_no_fault_of_the_engine(plugins: Path, data_dir: Path) -> None:
    write_plugin(plugins, "evil", ANYTHING, ["do"])
    async with hosting(plugins, data_dir) as engine:
        closing = asyncio.ensure_future(engine.close())
        await asyncio.sleep(0)
        with pytest.raises(SetupError, match="stopping"):
            await engine.restart("evil")
        await closing
        assert not engine.faults


def referring(parts: Any) -> bytes:
    return msgpack.encode(parts)


def extension(code: int, *parts: Any) -> msgpack.Ext:
    return msgpack.Ext(code, msgpack.encode(parts))


SIZE = 4 * mmap.PAGESIZE
REFUSED = {
    "a shape without end": extension(values.EXT_ARENA_ARRAY, "|u1", [2**63 - 1] * 200_000, 0, 10),
    "more dimensions than numpy has": extension(values.EXT_ARRAY, "|u1", [1] * 65, b"x"),
    "the whole arena twice": [extension(values.EXT_ARENA_BYTES, 0, SIZE)] * 2,
    "a value in itself": extension(values.EXT_ARENA_VALUE, 0, 64),
    "a file": extension(values.EXT_FILE, "/etc/passwd"),
}


@pytest.mark.parametrize("case", list(REFUSED))
def test_a_value_that_grows_when_it_is_decoded_is_refused(case: str) -> None:
    fd = arena.create(SIZE)
    try:
        shared = arena.Arena(fd, writable=True)
        inner = msgpack.encode(extension(values.EXT_ARENA_VALUE, 0, 64))
        shared.mapping[: len(inner)] = inner
        decoder = values.Decoder(shared, lambda *_: None)
        with pytest.raises(ValueError, match=r"."):
            decoder.decode(referring(REFUSED[case]))
        assert decoder.decode(referring([1, extension(values.EXT_ARENA_BYTES, 0, SIZE)]))[0] == 1
        shared.release()
    finally:
        os.close(fd)


def test_keys_that_are_chosen_to_collide_are_refused_before_they_are_hashed() -> None:
    pairs = itertools.islice(itertools.product((b"\xff", b"\xfe"), repeat=18), 16_000)
    keys = b"".join(b"\xdc\x00\x12" + b"".join(key) + b"\xc0" for key in pairs)
    value = b"\xde" + (16_000).to_bytes(2, "big") + keys
    with pytest.raises(values.NoJsonForm, match="a key of type `tuple`"):
        Unpacker(lambda *_: None).decode(value)


@pytest.mark.parametrize("part", [b"\x90", b"\x80", b"\xc7\x00\x04"], ids=["lists", "maps", "extensions"])
def test_a_value_has_only_so_many_containers(part: bytes) -> None:
    def value(count: int) -> bytes:
        return b"\xdd" + count.to_bytes(4, "big") + part * count

    unpacker = Unpacker(lambda *_: None)
    assert len(unpacker.decode(value(MAX_CONTAINERS - 1))) == MAX_CONTAINERS - 1
    with pytest.raises(values.TooManyValues, match="lists and maps"):
        unpacker.decode(value(MAX_CONTAINERS))


HOLDS = """
class Plugin:
    def __init__(self, context): ...
    def validate(self): ...
    def far(self): self.say(b"\\x91\\x92\\x00\\xcf" + struct.pack("!Q", 2**62))
    def many(self): self.say(b"\\xdd" + struct.pack("!I", 5000) + b"\\x92\\x00\\x00" * 5000)
    def say(self, held):
        body = b"\\x94\\x17\\x01\\xc0" + held  # Result(1, nil, held)
        os.write(CHANNEL, struct.pack("!I", len(body)) + body)
"""


async def test_a_worker_that_holds_on_to_what_is_not_there_is_in_breach(plugins: Path, data_dir: Path) -> None:
    for tool in ("far", "many"):
        write_plugin(plugins, tool, FINDS_ITS_CHANNEL + HOLDS, [tool])
    async with hosting(plugins, data_dir) as engine:
        for tool in ("far", "many"):
            outcome = await engine.run(tool, tool)
            assert isinstance(outcome, Broke)
            assert outcome.reason_code == "protocol_error"
