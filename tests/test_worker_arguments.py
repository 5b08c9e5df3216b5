"""What crosses between a caller and a tool: arguments by type hint, results, streams, and calls side by side."""

from __future__ import annotations

import asyncio
import os
import re
from pathlib import Path
from typing import Any

import numpy
import pytest
from support import hosting, next_event, write_plugin

from engine.errors import StreamStalled
from engine.outcome import Broke, CallFailed, Completed, Refused
from engine.sandbox import arena, values
from engine.sandbox.wire import Encoded

TYPED = """
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Optional, TypedDict

import numpy
from numpy.typing import NDArray


@dataclass
class Box:
    x: int
    label: str = "car"


class Options(TypedDict):
    threshold: float


def told(value):
    return [type(value).__name__, str(value)]


def told_array(value):
    return [str(value.dtype), list(value.shape), value.tolist()]


class Plugin:
    def __init__(self, context): ...
    def validate(self): ...
    def integer(self, value: int): return told(value)
    def number(self, value: float): return told(value)
    def truth(self, value: bool): return told(value)
    def text(self, value: str): return told(value)
    def raw(self, value: bytes): return told(value)
    def box(self, value: Box): return told(value)
    def boxes(self, value: list[Box]): return told(value)
    def options(self, value: Options): return told(value)
    def maybe(self, value: Optional[int] = None): return told(value)
    def either(self, value: int | str): return told(value)
    def integers(self, value: list[int]): return told(value)
    def counts(self, value: dict[str, int]): return told(value)
    def choice(self, value: Literal["fast", "good"]): return told(value)
    def file(self, value: Path): return [type(value).__name__, value.read_text()]
    def anything(self, value: Any): return told(value)
    def unhinted(self, value): return told(value)
    def array(self, value: numpy.ndarray): return told_array(value)
    def pixels(self, value: NDArray[numpy.uint8]): return told_array(value)
    def maybe_pixels(self, value: NDArray[numpy.uint8] | None = None): return told(value)
    def two(self, value: int, *, extra: int = 7): return [value, extra]
    def nothing(self): return "called"
"""
TYPED_TOOLS = re.findall(r"^    def ([a-uw-z]\w+)\(self", TYPED, re.MULTILINE)

ACCEPTED: list[tuple[str, Any, Any]] = [
    ("integer", 1, ["int", "1"]),
    ("number", 1, ["float", "1.0"]),
    ("number", float("inf"), ["float", "inf"]),
    ("truth", True, ["bool", "True"]),
    ("text", "größe", ["str", "größe"]),
    ("raw", b"abc", ["bytes", "b'abc'"]),
    ("raw", bytearray(b"abc"), ["bytes", "b'abc'"]),
    ("raw", memoryview(b"abc"), ["bytes", "b'abc'"]),
    ("box", {"x": 1}, ["Box", "Box(x=1, label='car')"]),
    ("boxes", [{"x": 1, "label": "bus"}], ["list", "[Box(x=1, label='bus')]"]),
    ("options", {"threshold": 1}, ["dict", "{'threshold': 1.0}"]),
    ("maybe", None, ["NoneType", "None"]),
    ("maybe", 3, ["int", "3"]),
    ("either", "x", ["str", "x"]),
    ("integers", (1, 2), ["list", "[1, 2]"]),
    ("counts", {"car": 2}, ["dict", "{'car': 2}"]),
    ("choice", "good", ["str", "good"]),
    ("anything", [1, None], ["list", "[1, None]"]),
    ("unhinted", b"x", ["bytes", "b'x'"]),
    ("array", [[1, 2], [3, 4]], ["int64", [2, 2], [[1, 2], [3, 4]]]),
    ("array", numpy.arange(3, dtype=">i2"), [">i2", [3], [0, 1, 2]]),
    ("array", numpy.array([True, False]), ["bool", [2], [True, False]]),
    ("array", numpy.array(["a", "bc"]), ["<U2", [2], ["a", "bc"]]),
    ("array", numpy.array(["2026-01-31"], dtype="M8[D]"), ["datetime64[D]", [1], ["2026-01-31"]]),
    ("array", numpy.arange(12).reshape(3, 4)[:, ::2], ["int64", [3, 2], [[0, 2], [4, 6], [8, 10]]]),
    ("array", numpy.asfortranarray([[1, 2], [3, 4]]), ["int64", [2, 2], [[1, 2], [3, 4]]]),
    ("array", numpy.zeros((2, 0)), ["float64", [2, 0], [[], []]]),
    ("pixels", numpy.array([1, 2], dtype=numpy.uint8), ["uint8", [2], [1, 2]]),
    ("pixels", [1, 255], ["uint8", [2], [1, 255]]),
    ("maybe_pixels", None, ["NoneType", "None"]),
    ("maybe_pixels", numpy.array([7], dtype=numpy.uint8), ["ndarray", "[7]"]),
]
REFUSED: list[tuple[str, Any, str]] = [
    ("integer", "1", "argument `value`: expected `int`, got `str`"),
    ("integer", 1.5, "argument `value`: expected `int`, got `float`"),
    ("integer", True, "argument `value`: expected `int`, got `bool`"),
    ("integer", None, "argument `value`: expected `int`, got `null`"),
    ("integer", 2**70, "argument `value` cannot be sent: OverflowError"),
    ("number", "1", "argument `value`: expected `float`, got `str`"),
    ("truth", 1, "argument `value`: expected `bool`, got `int`"),
    ("text", b"x", "argument `value`: expected `str`, got `bytes`"),
    ("text", "\ud800", "argument `value` cannot be sent: UnicodeEncodeError"),
    ("raw", "abc", "argument `value`: expected `bytes`, got `str`"),
    ("box", {"x": "1"}, "argument `value.x`: expected `int`, got `str`"),
    ("box", {"label": "bus"}, "argument `value`: its field `x` is missing"),
    ("box", [1], "argument `value`: expected `object`, got `array`"),
    ("boxes", [{"x": 1}, {"x": None}], "argument `value[1].x`: expected `int`, got `null`"),
    ("options", {}, "argument `value`: its field `threshold` is missing"),
    ("maybe", "x", "argument `value`: expected `int | null`, got `str`"),
    ("either", 1.5, "argument `value`: expected `int | str`, got `float`"),
    ("integers", [1, "2"], "argument `value[1]`: expected `int`, got `str`"),
    ("counts", {"car": "2"}, "argument `value[...]`: expected `int`, got `str`"),
    ("counts", {1: 2}, "argument `value`: a key: expected `str`, got `int`"),
    ("choice", "slow", "argument `value`: invalid enum value 'slow'"),
    ("file", "/nonexistent/clip.mp4", "argument `value`: there is no file at /nonexistent/clip.mp4"),
    ("file", 5, "argument `value`: expected a file"),
    ("anything", object(), "argument `value` cannot be sent: TypeError: a value of type `object`"),
    ("array", "x", "argument `value`: expected an array, got `str`"),
    ("array", numpy.array(5), "argument `value`: expected an array, got `int`"),
    ("array", numpy.array([object()]), "argument `value` cannot be sent: TypeError: an array of dtype |O"),
    ("array", [[1], [2, 3]], "argument `value`: expected an array, "),
    ("pixels", numpy.arange(3.0), "argument `value`: expected an array of `uint8`, got one of `float64`"),
    ("pixels", [1, 256], "argument `value`: expected an array of `uint8`, got one of `int64`"),
]


@pytest.mark.contract(7)
async def test_arguments_are_checked_from_the_type_hints_before_the_tool_runs(
    plugins: Path, data_dir: Path
) -> None:
    write_plugin(plugins, "typed", TYPED, TYPED_TOOLS)
    async with hosting(plugins, data_dir) as engine:
        for tool, value, words in REFUSED:
            outcome = await engine.run("typed", tool, {"value": value})
            assert isinstance(outcome, Refused), (tool, value, outcome)
            assert (outcome.reason_code, outcome.error_type) == ("bad_input", "BadInput")
            assert outcome.error.startswith(words), (outcome.error, words)
        assert engine.health("typed").state == "INITIALIZED"
        for tool, value, expected in ACCEPTED:
            outcome = await engine.run("typed", tool, {"value": value})
            assert outcome.value == expected, (tool, value, outcome)
        health = engine.health("typed")
        assert (health.state, health.error_count, health.success_count) == ("RUNNING", 0, len(ACCEPTED))


@pytest.mark.contract(7)
async def test_arguments_go_by_name_and_a_wrong_name_is_answered_with_the_right_one(
    plugins: Path, data_dir: Path, tmp_path: Path
) -> None:
    write_plugin(plugins, "typed", TYPED, TYPED_TOOLS)
    clip = tmp_path / "clip.txt"
    clip.write_text("frames")
    async with hosting(plugins, data_dir) as engine:

        async def told(tool: str, **arguments: Any) -> Any:
            outcome = await engine.run("typed", tool, arguments)
            return outcome.value if outcome.ok else outcome.error

        assert await told("two", value=1) == [1, 7]
        assert await told("two", value=1, extra=2) == [1, 2]
        assert await told("two") == "argument `value` is missing; it wants `int`"
        assert await told("pixels") == "argument `value` is missing; it wants an array of `uint8`"
        assert await told("file") == "argument `value` is missing; it wants a file"
        assert (
            await told("two", value=1, extr=2)
            == "there is no argument `extr`; did you mean `extra`? `two` takes value, extra"
        )
        assert await told("two", value=1, zoom=2) == "there is no argument `zoom`; `two` takes value, extra"
        assert await told("nothing", x=1) == "there is no argument `x`; `nothing` takes no arguments"
        assert await told("nothing") == "called"
        for path in (clip, str(clip)):
            assert await told("file", value=path) == ["PosixPath", "frames"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (Encoded("json", b'{"value": 1'), "cannot be read"),
        (Encoded("json", b"[1]"), "must be an object of names and values, not `array`"),
        (Encoded("json", b"[" * 100_000), "nested too deeply"),
        (Encoded("json", b'{"value": "\xff"}'), "cannot be read"),
        (Encoded("python", b"\xc1"), "cannot be read"),
        (Encoded("python", b"\xc7\x02\x01\x00\x00"), "cannot be read"),  # an arena reference to nowhere
        (Encoded("python", b"\xc7\x01\x63\x00"), "cannot be read"),  # an extension that nobody knows
    ],
)
@pytest.mark.contract(7)
async def test_arguments_that_are_no_arguments_are_bad_input(
    arguments: Encoded, words: str, plugins: Path, data_dir: Path
) -> None:
    write_plugin(plugins, "typed", TYPED, TYPED_TOOLS)
    async with hosting(plugins, data_dir) as engine:
        outcome = await engine.run("typed", "integer", arguments)
        assert outcome.reason_code == "bad_input"
        assert words in (outcome.error or "")
        assert engine.health("typed").state == "INITIALIZED"
        assert (await engine.run("typed", "integer", Encoded("json", b'{"value": 4}'))).value == ["int", "4"]


REJECTING = """
from dataclasses import dataclass
import decoding

@dataclass
class Guarded:
    x: int
    def __post_init__(self):
        if self.x == 1:
            raise ValueError("one is not allowed")
        if self.x == 2:
            raise RuntimeError("two breaks it")

class Plugin:
    def __init__(self, context): ...
    def validate(self): ...
    def plain(self): raise ValueError("no image")
    def dotted(self): raise decoding.Torn("half an image")
    def subclass(self): raise UnicodeError("no text")
    def other(self): raise KeyError("a bug")
    def same_name(self): raise decoding.ValueError("not the builtin")
    def guarded(self, value: Guarded): return value.x
"""


@pytest.mark.parametrize(
    ("tool", "error_type", "message"),
    [
        ("plain", "ValueError", "no image"),
        ("dotted", "decoding.Torn", "half an image"),
        ("subclass", "UnicodeError", "no text"),
    ],
)
@pytest.mark.contract(7)
async def test_exceptions_that_the_manifest_names_mean_bad_input(
    tool: str, error_type: str, message: str, plugins: Path, data_dir: Path
) -> None:
    folder = write_rejecting(plugins)
    async with hosting(plugins, data_dir) as engine:
        for _ in range(2):
            outcome = await engine.run("rejecting", tool)
            assert isinstance(outcome, Refused)
            assert (outcome.reason_code, outcome.error_type, outcome.error) == ("bad_input", error_type, message)
        health = engine.health("rejecting")
        assert (health.state, health.error_count) == ("RUNNING", 0)
        assert isinstance(await engine.run("rejecting", "other"), Broke)
    assert folder.is_dir()


async def test_a_dataclass_that_checks_itself_rejects_by_value_error_and_breaks_by_any_other(
    plugins: Path, data_dir: Path
) -> None:
    write_rejecting(plugins)
    async with hosting(plugins, data_dir) as engine:
        assert (await engine.run("rejecting", "guarded", {"value": {"x": 0}})).value == 0
        refused = await engine.run("rejecting", "guarded", {"value": {"x": 1}})
        assert (refused.reason_code, refused.error) == ("bad_input", "argument `value`: one is not allowed")
        broke = await engine.run("rejecting", "guarded", {"value": {"x": 2}})
        assert (broke.reason_code, broke.error_type) == ("tool_exception", "RuntimeError")
        assert "in `__post_init__`" in (broke.error or "")


def write_rejecting(root: Path) -> Path:
    rejects = 'rejects = ["ValueError", "decoding.Torn"]'
    tools = dict.fromkeys(["plain", "dotted", "subclass", "other", "guarded"], rejects)
    folder = write_plugin(root, "rejecting", REJECTING, tools)
    (folder / "decoding.py").write_text("class Torn(Exception): ...\n")
    return folder


PAYLOADS = """
import numpy

class Plugin:
    def __init__(self, context):
        self.kept = []
    def validate(self): ...
    def echo(self, data: bytes) -> bytes: return data
    def negative(self, frame: numpy.ndarray): return 255 - frame
    def both(self, data: bytes, frame: numpy.ndarray): return {"data": data, "frame": frame, "sum": frame.sum()}
    def strided(self): return numpy.arange(200_000).reshape(400, 500).T
    def empty(self): return numpy.zeros((0, 3), dtype=numpy.float32)
    def scalar(self): return {"single": numpy.float32(0.5), "array": numpy.array(7)}
    def difference(self, frame: numpy.ndarray) -> int:
        previous, self.kept = self.kept, [frame]
        return int(previous[0].sum()) if previous else 0
    def hoard(self, frame: numpy.ndarray) -> list:
        self.kept.append(frame)
        return [int(kept[0]) for kept in self.kept]
    def look(self, frame: numpy.ndarray) -> int: return int(frame.sum())
    def write(self, frame: numpy.ndarray): frame[0] = 1
"""
PAYLOAD_TOOLS = re.findall(r"^    def ([a-uw-z]\w+)\(self", PAYLOADS, re.MULTILINE)


async def test_large_bytes_and_arrays_come_and_go_whole(plugins: Path, data_dir: Path) -> None:
    write_plugin(plugins, "payloads", PAYLOADS, PAYLOAD_TOOLS)
    data, frame = os.urandom(3_000_001), numpy.arange(1080 * 1920, dtype=numpy.uint8).reshape(1080, 1920)
    async with hosting(plugins, data_dir) as engine:
        assert (await engine.run("payloads", "echo", {"data": data})).value == data
        negative = (await engine.run("payloads", "negative", {"frame": frame})).value
        assert numpy.array_equal(numpy.asarray(negative), 255 - frame)
        both = value_of(await engine.run("payloads", "both", {"data": data, "frame": frame[::2, ::3]}))
        assert (both["data"], both["sum"]) == (data, int(frame[::2, ::3].sum()))
        assert numpy.array_equal(numpy.asarray(both["frame"]), frame[::2, ::3])
        strided = (await engine.run("payloads", "strided")).value
        assert numpy.array_equal(numpy.asarray(strided), numpy.arange(200_000).reshape(400, 500).T)
        empty = numpy.asarray((await engine.run("payloads", "empty")).value)
        assert (empty.shape, empty.dtype.name) == ((0, 3), "float32")
        assert (await engine.run("payloads", "scalar")).value == {"single": 0.5, "array": 7}


@pytest.mark.parametrize(
    "value",
    [bytes(70_000), {"frame": numpy.zeros(70_000, dtype=numpy.uint8)}, ["x" * 100] * 1000],
    ids=["bytes", "array", "value"],
)
def test_a_large_value_crosses_in_the_arena_and_leaves_a_short_frame(value: Any) -> None:
    fd = arena.create(1 << 20)
    try:
        shared = arena.Arena(fd, writable=True)
        encoded = values.Encoder(shared).encode(value)
        assert len(encoded) < 64
        decoded = values.Decoder(shared, lambda _typestr, _shape, data, _span: bytes(data)).decode(encoded)
        assert repr(decoded) == repr({"frame": bytes(70_000)} if isinstance(value, dict) else value)
        assert shared.release()
    finally:
        os.close(fd)


@pytest.mark.contract(7)
async def test_arguments_larger_than_the_arena_are_too_large_and_harm_nobody(
    plugins: Path, data_dir: Path
) -> None:
    write_plugin(plugins, "payloads", PAYLOADS, PAYLOAD_TOOLS)
    async with hosting(plugins, data_dir, arena_bytes=1 << 20) as engine:
        for arguments in ({"data": bytes(2 << 20)}, {"data": ["x" * 100] * 20_000}):
            outcome = await engine.run("payloads", "echo", arguments)
            assert isinstance(outcome, Refused)
            assert (outcome.reason_code, outcome.error_type) == ("input_too_large", "InputTooLarge")
        assert engine.health("payloads").state == "INITIALIZED"
        assert (await engine.run("payloads", "echo", {"data": bytes(1 << 19)})).ok


@pytest.mark.contract(7)
async def test_arguments_that_do_not_fit_into_the_plugins_memory_are_too_large_and_harm_nobody(
    plugins: Path, data_dir: Path
) -> None:
    write_plugin(plugins, "typed", TYPED, TYPED_TOOLS, limits="memory_mib = 192")
    bomb = b'{"value": [' + b"[]," * 4_000_000 + b"0]}"
    # The watch from outside is left out here: it is RLIMIT_DATA that refuses the allocation.
    async with hosting(plugins, data_dir, memory_interval_s=60) as engine:
        outcome = await engine.run("typed", "anything", Encoded("json", bomb))
        assert outcome.reason_code == "input_too_large"
        assert engine.health("typed").state == "INITIALIZED"
        assert (await engine.run("typed", "anything", {"value": 1})).ok


async def test_what_a_plugin_keeps_of_an_array_does_not_change_under_it(plugins: Path, data_dir: Path) -> None:
    write_plugin(plugins, "payloads", PAYLOADS, PAYLOAD_TOOLS)
    size = 100_000
    async with hosting(plugins, data_dir, arena_bytes=8 * size) as engine:

        async def call(tool: str, fill: int) -> Any:
            frame = numpy.full(size, fill, dtype=numpy.uint8)
            return value_of(await engine.run("payloads", tool, {"frame": frame}))

        assert await call("difference", 1) == 0
        assert await call("look", 9) == 9 * size
        # More calls than the arena has room for: what is let go of is used again.
        for fill in range(2, 42):
            assert await call("difference", fill) == (fill - 1) * size
            assert await call("look", 200) == 200 * size


async def test_a_plugin_may_keep_more_arrays_than_the_arena_holds(plugins: Path, data_dir: Path) -> None:
    write_plugin(plugins, "payloads", PAYLOADS, PAYLOAD_TOOLS)
    async with hosting(plugins, data_dir, arena_bytes=800_000) as engine:
        for fill in range(40):
            frame = numpy.full(100_000, fill, dtype=numpy.uint8)
            outcome = await engine.run("payloads", "hoard", {"frame": frame})
            assert outcome.value == list(range(fill + 1))


async def test_an_array_argument_is_read_only(plugins: Path, data_dir: Path) -> None:
    write_plugin(plugins, "payloads", PAYLOADS, PAYLOAD_TOOLS)
    async with hosting(plugins, data_dir) as engine:
        outcome = await engine.run("payloads", "write", {"frame": numpy.zeros(100_000, dtype=numpy.uint8)})
        assert (outcome.reason_code, outcome.error_type) == ("tool_exception", "ValueError")
        assert "read-only" in (outcome.error or "")


CALLS = """
import asyncio
import os
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

class Plugin:
    def __init__(self, context): ...
    def validate(self): ...
    async def double(self, value: int) -> int:
        await asyncio.sleep(0)
        return 2 * value
    def count(self, to: int) -> Iterator[int]:
        yield from range(to)
    async def count_async(self, to: int) -> AsyncIterator[int]:
        for n in range(to):
            await asyncio.sleep(0)
            yield n
    def listed(self, to: int) -> Iterator[int]:
        return iter(list(range(to)))
    def blocks(self, count: int, size: int) -> Iterator[bytes]:
        for _ in range(count):
            yield bytes(size)
    def steps(self, count: int, progress) -> str:
        for n in range(count):
            progress(n + 1, count)
        return "done"
    def hold(self, gate: str) -> str:
        return Path(gate).read_text()
    def pass_on(self, gate: str) -> int:
        Path(gate).write_text(f"from {os.getpid()}")
        return os.getpid()
"""
CALL_TOOLS = re.findall(r"^    (?:async )?def ([a-uw-z]\w+)\(self", CALLS, re.MULTILINE)


async def test_async_tools_generators_and_async_generators_answer_and_stream(
    plugins: Path, data_dir: Path
) -> None:
    write_plugin(plugins, "calls", CALLS, CALL_TOOLS)
    async with hosting(plugins, data_dir) as engine:
        assert (await engine.run("calls", "double", {"value": 4})).value == 8
        for tool in ("count", "count_async", "listed"):
            assert (await engine.run("calls", tool, {"to": 3})).value == [0, 1, 2]
            stream = engine.stream("calls", tool, {"to": 300})
            assert [item async for item in stream] == list(range(300))
            assert isinstance(stream.outcome, Completed)
        with pytest.raises(CallFailed) as failed:
            [item async for item in engine.stream("calls", "count", {"to": "x"})]
        assert failed.value.outcome.reason_code == "bad_input"


async def test_progress_reaches_the_caller_and_the_log(plugins: Path, data_dir: Path) -> None:
    write_plugin(plugins, "calls", CALLS, CALL_TOOLS)
    seen: list[tuple[float, float]] = []
    async with hosting(plugins, data_dir) as engine:
        outcome = await engine.run(
            "calls", "steps", {"count": 1000}, on_progress=lambda done, total: seen.append((done, total))
        )
        assert value_of(outcome) == "done"
        assert seen[-1] == (1000.0, 1000.0)
        assert 1 <= len(seen) < 1000
        event = await next_event(engine, "plugin.call.progress", "calls")
        assert (event.data.done, event.data.total) == seen[0]  # type: ignore[union-attr]


async def test_a_callers_progress_callback_that_raises_is_not_the_plugins_fault(
    plugins: Path, data_dir: Path
) -> None:
    write_plugin(plugins, "calls", CALLS, CALL_TOOLS)

    def broken(done: float, total: float) -> None:
        if done:
            raise RuntimeError("the caller's own")

    async with hosting(plugins, data_dir) as engine:
        assert (await engine.run("calls", "steps", {"count": 2}, on_progress=broken)).value == "done"
        assert engine.health("calls").state == "RUNNING"


async def test_calls_beyond_the_queue_are_refused_and_those_in_it_are_served(
    plugins: Path, data_dir: Path, tmp_path: Path
) -> None:
    write_plugin(plugins, "calls", CALLS, CALL_TOOLS, limits="queue = 2")
    gates = [fifo(tmp_path, str(n)) for n in range(4)]
    async with hosting(plugins, data_dir) as engine:
        calls = [asyncio.create_task(engine.run("calls", "hold", {"gate": gate})) for gate in gates]
        (refused,), _ = await asyncio.wait(calls, return_when=asyncio.FIRST_COMPLETED)
        assert refused is calls[3]
        assert (refused.result().reason_code, refused.result().error_type) == ("queue_full", "QueueFull")
        assert "2 calls wait" in (refused.result().error or "")
        for gate in gates[:3]:
            await asyncio.to_thread(Path(gate).write_text, f"through {gate}")
        assert [(await call).value for call in calls[:3]] == [f"through {gate}" for gate in gates[:3]]


async def test_two_workers_run_two_calls_at_once(plugins: Path, data_dir: Path, tmp_path: Path) -> None:
    write_plugin(plugins, "calls", CALLS, CALL_TOOLS, limits="workers = 2")
    gate = fifo(tmp_path)
    async with hosting(plugins, data_dir) as engine:
        # A pipe opens once it is open at both ends: neither call can finish without the other.
        written, read = await asyncio.gather(
            engine.run("calls", "pass_on", {"gate": gate}), engine.run("calls", "hold", {"gate": gate})
        )
        assert value_of(read) == f"from {value_of(written)}"


async def test_a_caller_that_goes_away_leaves_the_call_to_finish(
    plugins: Path, data_dir: Path, tmp_path: Path
) -> None:
    write_plugin(plugins, "calls", CALLS, CALL_TOOLS)
    gate = fifo(tmp_path)
    async with hosting(plugins, data_dir) as engine:
        call = asyncio.create_task(engine.run("calls", "hold", {"gate": gate}))
        await next_event(engine, "plugin.call.started", "calls")
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        await asyncio.to_thread(Path(gate).write_text, "late")
        finished = await next_event(engine, "plugin.call.finished", "calls")
        assert finished.data.ok  # type: ignore[union-attr]
        health = engine.health("calls")
        assert (health.state, health.success_count, health.in_flight) == ("RUNNING", 1, 0)


@pytest.mark.contract(6)
async def test_a_slow_consumer_holds_the_worker_up_beyond_its_deadline_without_a_verdict(
    plugins: Path, data_dir: Path
) -> None:
    write_plugin(plugins, "calls", CALLS, CALL_TOOLS, limits="timeout_s = 0.4")
    async with hosting(plugins, data_dir, stream_items=2) as engine:
        stream = engine.stream("calls", "blocks", {"count": 300, "size": 60_000})
        await anext(stream)
        await asyncio.sleep(0.8)  # the one test of what happens when time passes: twice the deadline
        assert 1 + len([item async for item in stream]) == 300
        assert engine.health("calls").state == "RUNNING"


async def test_a_consumer_that_stalls_is_dropped_and_told_and_the_call_finishes(
    plugins: Path, data_dir: Path
) -> None:
    write_plugin(plugins, "calls", CALLS, CALL_TOOLS)
    async with hosting(plugins, data_dir, stream_items=2, stream_stall_s=0.05) as engine:
        stream = engine.stream("calls", "blocks", {"count": 300, "size": 60_000})
        await anext(stream)
        finished = await next_event(engine, "plugin.call.finished", "calls")
        assert finished.data.ok  # type: ignore[union-attr]
        with pytest.raises(StreamStalled):
            [item async for item in stream]
        assert engine.health("calls").state == "RUNNING"


@pytest.mark.contract(2)
async def test_a_restart_reads_the_code_and_the_manifest_again(plugins: Path, data_dir: Path) -> None:
    code = """
    import helper
    class Plugin:
        def __init__(self, context): ...
        def validate(self): ...
        def which(self): return [{!r}, helper.WHICH]
    """
    folder = write_plugin(plugins, "edited", code.format("first"), ["which"])
    (folder / "helper.py").write_text("WHICH = 1")
    async with hosting(plugins, data_dir) as engine:
        assert (await engine.run("edited", "which")).value == ["first", 1]
        write_plugin(plugins, "edited", code.format("other"), {"which": 'description = "Which one."'})
        (folder / "helper.py").write_text("WHICH = 2")
        health = await engine.restart("edited")
        assert (health.state, health.incarnation) == ("INITIALIZED", 2)
        assert (await engine.run("edited", "which")).value == ["other", 2]
        assert engine.describe("edited").tools[0].description == "Which one."


async def test_a_restart_tells_the_calls_it_ended_and_those_that_waited(
    plugins: Path, data_dir: Path, tmp_path: Path
) -> None:
    write_plugin(plugins, "calls", CALLS, CALL_TOOLS)
    gate = fifo(tmp_path)
    async with hosting(plugins, data_dir) as engine:
        calls = [asyncio.create_task(engine.run("calls", "hold", {"gate": gate})) for _ in range(2)]
        await next_event(engine, "plugin.call.started", "calls")
        health = await engine.restart("calls")
        assert (health.state, health.incarnation) == ("INITIALIZED", 2)
        for call in calls:
            outcome = await call
            assert isinstance(outcome, Refused)
            assert (outcome.reason_code, outcome.error_type) == ("restarted", "Restarted")
        assert (await engine.run("calls", "double", {"value": 1})).value == 2


async def test_when_one_of_two_workers_breaks_the_other_ones_call_is_told_the_plugins_reason(
    plugins: Path, data_dir: Path, tmp_path: Path
) -> None:
    write_plugin(plugins, "calls", CALLS, CALL_TOOLS, limits="workers = 2")
    gate = fifo(tmp_path)
    async with hosting(plugins, data_dir) as engine:
        held = asyncio.create_task(engine.run("calls", "hold", {"gate": gate}))
        await next_event(engine, "plugin.call.started", "calls")
        broke = await engine.run("calls", "hold", {"gate": "/nonexistent"})
        assert isinstance(broke, Broke)
        outcome = await held
        assert isinstance(outcome, Refused)
        assert (outcome.reason_code, outcome.state) == ("tool_exception", "FAILED")
        assert broke.error in outcome.error


async def test_calls_that_still_wait_when_the_engine_stops_are_told_so(
    plugins: Path, data_dir: Path, tmp_path: Path
) -> None:
    write_plugin(plugins, "calls", CALLS, CALL_TOOLS)
    gate = fifo(tmp_path)
    async with hosting(plugins, data_dir, drain_s=0.05) as engine:
        calls = [asyncio.create_task(engine.run("calls", "hold", {"gate": gate})) for _ in range(2)]
        await next_event(engine, "plugin.call.started", "calls")
    async with asyncio.timeout(5):
        running, waiting = await asyncio.gather(*calls)
    assert (running.reason_code, waiting.reason_code) == ("restarted", "engine_stopping")


def value_of(outcome: Any) -> Any:
    assert outcome.ok, outcome
    return outcome.value


def fifo(folder: Path, name: str = "gate") -> str:
    path = folder / name
    os.mkfifo(path)
    return str(path)
