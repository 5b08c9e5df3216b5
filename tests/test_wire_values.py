"""What crosses between a caller and a tool, at its edges: odd arguments, odd results, odd exceptions."""

from __future__ import annotations

import contextlib
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import msgpack
from support import hosting, write_plugin

from engine.outcome import Array, Broke, Refused
from engine.sandbox import arena, values
from engine.sandbox.wire import Encoded
from engine.worker import tools

MIB = 1024 * 1024

ODD = """
from pathlib import Path
from typing import Any

import msgspec
import numpy
from numpy.typing import NDArray

class Strict(msgspec.Struct, forbid_unknown_fields=True):
    x: int

class Placeless(Exception):
    __traceback__ = None

class Hoarding(type):
    @property
    def __name__(cls): raise MemoryError

class Plugin:
    def __init__(self, context): self.kept = []
    def validate(self): ...
    def strict(self, value: Strict): return value.x
    def texts(self, value: list[str]): return value
    def file(self, value: Path): return value.read_text()
    def raw(self, value: bytes): return len(value)
    def text(self, value: str): return value
    def number(self, value: int): return value
    def anything(self, value: Any): return [type(value).__name__, value]
    def pixels(self, value: NDArray[numpy.uint8]): return value.tolist()
    def twice(self, value: numpy.ndarray): return value * 2
    def unshown(self, value: int | None = object()): return "called"
    def long_parts(self): return [b"a" * 100_000, 7, b"b" * 100_000]
    def keeps(self, value: numpy.ndarray):
        self.kept.append(value)
        raise KeyError("kept")
    def kept_sums(self): return [int(each.sum()) for each in self.kept]
    def too_much_text(self): return "x" * (9 << 20)
    def no_room(self): return "x" * (150 << 20)
    def bad_item(self):
        yield 1
        yield object()
    def long_item(self):
        yield b"x" * 200_000
    def placeless(self): raise Placeless("nobody knows where")
    def hoards(self): raise Hoarding("Hoarder", (Exception,), {})("no more")
"""
TOOLS = dict.fromkeys(re.findall(r"^    def ([a-uw-z]\w+)\(self", ODD, re.MULTILINE), "")
TOOLS["keeps"] = 'rejects = ["KeyError"]'


# Arguments.

REFUSED: list[tuple[str, Encoded, str]] = [
    ("strict", Encoded("json", b'{"value": {"x": 1, "y": 2}}'), "argument `value`: it has no field `y`"),
    ("texts", Encoded("json", b"{}"), "argument `value` is missing; it wants `list[str]`"),
    (
        "file",
        Encoded("form", msgpack.encode({"value": "text"})),
        "argument `value`: expected a file, got text; send",
    ),
    (
        "raw",
        Encoded("form", msgpack.encode({"value": "text"})),
        "argument `value`: expected a file, got text; send",
    ),
    (
        "file",
        Encoded("json", b'{"value": "/etc/hostname"}'),
        "argument `value`: expected a file; send it as a part",
    ),
    ("number", Encoded("form", msgpack.encode({"value": "many"})), "argument `value`: expected `int`, got `str`"),
    (
        "pixels",
        Encoded("json", b'{"value": {"typestr": "|u1"}}'),
        "argument `value`: expected an array of `uint8`,",
    ),
    (
        "pixels",
        Encoded("json", b'{"value": {"typestr": "|u1", "shape": [9], "data": "AQI="}}'),
        "argument `value`: expected an array of `uint8`, cannot reshape",
    ),
]
ACCEPTED: list[tuple[str, Any, Any]] = [
    ("pixels", Encoded("json", b'{"value": {"typestr": "|u1", "shape": [2, 1], "data": "AQI="}}'), [[1], [2]]),
    ("anything", Encoded("form", msgpack.encode({"value": "as it is"})), ["str", "as it is"]),
    ("number", Encoded("form", msgpack.encode({"value": "12"})), 12),
    ("unshown", {}, "called"),
    ("long_parts", {}, [b"a" * 100_000, 7, b"b" * 100_000]),
    ("anything", {"value": (b"a" * 100_000, 7)}, ["list", [b"a" * 100_000, 7]]),
]


@pytest.mark.contract(7)
async def test_arguments_that_do_not_fit_name_the_argument_whatever_their_encoding(
    plugins: Path, data_dir: Path
) -> None:
    write_plugin(plugins, "odd", ODD, TOOLS)
    async with hosting(plugins, data_dir) as engine:
        for tool, arguments, words in REFUSED:
            outcome = await engine.run("odd", tool, arguments)
            assert isinstance(outcome, Refused), (tool, outcome)
            assert outcome.reason_code == "bad_input"
            assert outcome.error.startswith(words), outcome.error
        assert engine.health("odd").state == "INITIALIZED"
        for tool, arguments, expected in ACCEPTED:
            outcome = await engine.run("odd", tool, arguments)
            assert outcome.value == expected, (tool, outcome)


async def test_a_file_of_a_form_becomes_what_the_parameter_wants(
    plugins: Path, data_dir: Path, tmp_path: Path
) -> None:
    write_plugin(plugins, "odd", ODD, TOOLS)
    part = tmp_path / "part"
    part.write_bytes(b"12")
    sent = Encoded("form", msgpack.encode({"value": msgpack.Ext(values.EXT_FILE, str(part).encode())}))
    async with hosting(plugins, data_dir) as engine:
        told = {tool: (await engine.run("odd", tool, sent)).value for tool in ("file", "raw", "text", "number")}
        assert told == {"file": "12", "raw": 2, "text": "12", "number": 12}


async def test_an_array_that_a_plugin_returned_can_be_passed_on_as_it_is(plugins: Path, data_dir: Path) -> None:
    write_plugin(plugins, "odd", ODD, TOOLS)
    async with hosting(plugins, data_dir) as engine:
        for size in (3, 100_000):  # inline, and through the arena
            first = await engine.run("odd", "twice", {"value": numpy.arange(size)})
            assert isinstance(first.value, Array)
            second = await engine.run("odd", "twice", {"value": first.value})
            assert numpy.array_equal(numpy.asarray(second.value), numpy.arange(size) * 4)


async def test_an_array_kept_by_a_call_that_was_rejected_is_not_written_over(
    plugins: Path, data_dir: Path
) -> None:
    write_plugin(plugins, "odd", ODD, TOOLS)
    async with hosting(plugins, data_dir) as engine:
        for number in (1, 2, 3):
            outcome = await engine.run("odd", "keeps", {"value": numpy.full(20_000, number)})
            assert (outcome.reason_code, outcome.error_type) == ("bad_input", "KeyError")
        assert (await engine.run("odd", "kept_sums")).value == [20_000, 40_000, 60_000]


@dataclass
class Node:
    next: Node | None = None

    def __post_init__(self) -> None:
        """Take some of the stack, as a check of its own may."""

        def deeper(left: int) -> None:
            if left:
                deeper(left - 1)

        deeper(20)


class _Deep:
    def nested(self, value: Node) -> None: ...


class _NoArena:
    def decode(self, data: bytes) -> Any:
        return msgpack.decode(data)


def test_arguments_nested_to_the_end_of_the_stack_are_the_callers_fault_at_any_depth() -> None:
    tool = tools.bind("nested", _Deep().nested, ())
    said = set()
    for depth in range(900, 1010):
        text = '{"value":' + '{"next":' * depth + "null" + "}" * depth + "}"
        try:
            tools.decode(tool, "json", text.encode(), _NoArena())  # type: ignore[arg-type]
        except tools.BadInput as exc:
            said.add(str(exc))
    assert said == {"the arguments are nested too deeply"}


def test_what_a_later_msgspec_may_say_reaches_the_caller_as_it_is() -> None:
    tool = tools.bind("nested", _Deep().nested, ())
    assert tools._explain("Something else is wrong", tool) == "Something else is wrong"


@pytest.mark.contract(3)
@pytest.mark.parametrize(
    ("signature", "words"),
    [
        ("*values", "`work` takes `*values`; a tool's parameters are passed by name"),
        ("value, /", "`work` takes `value`; a tool's parameters are passed by name"),
        ("value: object", "a type hint of `work` has no JSON Schema"),
    ],
)
async def test_a_signature_that_no_caller_could_fill_is_named(
    signature: str, words: str, plugins: Path, data_dir: Path
) -> None:
    code = f"""
    class Plugin:
        def __init__(self, context): ...
        def validate(self): ...
        def work(self, {signature}): ...
    """
    write_plugin(plugins, "odd", code, ["work"])
    async with hosting(plugins, data_dir) as engine:
        health = engine.health("odd")
        assert (health.state, health.reason_code) == ("FAILED", "manifest_invalid")
        assert words in (health.reason or "")


async def test_a_default_without_a_json_form_is_not_shown(plugins: Path, data_dir: Path) -> None:
    write_plugin(plugins, "odd", ODD, TOOLS)
    async with hosting(plugins, data_dir) as engine:
        (schema,) = [tool.parameters for tool in engine.describe("odd").tools if tool.name == "unshown"]
        assert "value" in bytes(schema).decode()
        assert "default" not in bytes(schema).decode()


# Results and exceptions.

BROKEN: list[tuple[str, str, tuple[str, ...]]] = [
    ("too_much_text", "result_too_large", ("9437189 bytes of plain values", "bytes and arrays may be longer")),
    ("no_room", "memory_limit", ("`no_room` ran out of memory", "its result does not fit")),
    ("bad_item", "result_invalid", ("`bad_item` returned what cannot be sent", "type `object`")),
    ("long_item", "result_too_large", ("the result of `long_item` is too large", "more than 131072 bytes")),
    ("placeless", "tool_exception", ("`placeless` raised plugin.Placeless: nobody knows where; mend it",)),
    ("hoards", "memory_limit", ("`hoards` ran out of memory",)),
]


@pytest.mark.contract(3, 6)
@pytest.mark.parametrize(("tool", "code", "words"), BROKEN, ids=[tool for tool, _, _ in BROKEN])
async def test_a_result_or_an_exception_that_cannot_be_sent_says_so(
    tool: str, code: str, words: tuple[str, ...], plugins: Path, data_dir: Path
) -> None:
    write_plugin(plugins, "odd", ODD, TOOLS, limits="memory_mib = 256")
    changes = {"max_result_bytes": 131_072} if tool == "long_item" else {}
    async with hosting(plugins, data_dir, **changes) as engine:
        outcome = await engine.run("odd", tool)
        assert isinstance(outcome, Broke), outcome
        assert outcome.reason_code == code, outcome
        for part in words:
            assert part in outcome.error
        assert engine.health("odd").state == "FAILED"


# What decodes is what encodes.


@pytest.mark.parametrize("typestr", ["|O8", "", "<f4; import os", "<f" + "9" * 10, "x1"])
def test_an_array_of_no_known_element_type_is_refused(typestr: str) -> None:
    fd = arena.create(4096)
    shared = arena.Arena(fd, writable=True)
    try:
        decoder = values.Decoder(shared, lambda *_: None)
        part = msgpack.Ext(values.EXT_ARRAY, msgpack.encode((typestr, [1], b"x")))
        with pytest.raises(ValueError, match="no element type"):
            decoder.decode(msgpack.encode(part))
    finally:
        shared.release()
        os.close(fd)


@given(st.binary(max_size=200))
def test_no_bytes_break_the_decoder_in_another_way_than_by_an_exception(data: bytes) -> None:
    fd = arena.create(4096)
    shared = arena.Arena(fd, writable=True)
    try:
        decoder = values.Decoder(shared, lambda typestr, shape, view, span: Array(typestr, shape, bytes(view)))
        # What is no value of ours raises what `Decoder.decode` says it may; nothing else comes of it.
        with contextlib.suppress(Exception):
            decoder.decode(data)
        assert decoder.decode(msgpack.encode([1, "two"])) == [1, "two"]
    finally:
        shared.release()
        os.close(fd)
