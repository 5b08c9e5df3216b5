"""A tool's signature, read from its code object or by `inspect` and `typing`: either way the same."""

from __future__ import annotations

import inspect
import re
import typing
from collections.abc import Callable
from typing import Any

import pytest

from engine.worker import signature, tools

# Evaluated hints, as most plugins have them: this file's own are texts.
METHODS = """
import collections.abc, enum, functools, pathlib, typing
import numpy
from numpy.typing import NDArray

class Alias:
    __origin__ = collections.abc.Iterator

class Colour(enum.Enum):
    RED = "red"

def twice(function):
    @functools.wraps(function)
    def call(*args, **kwargs): return function(*args, **kwargs)
    return call

class Plugin:
    def nothing(self): ...
    def plain(self, a: int, b: str = "b", *, c: float, d: bytes = b"") -> None: ...
    def generic(self, a: list[int], b: dict[str, float] | None = None, *, progress=None) -> list[int]: ...
    def bare(self, a, b=None, *, c=3): ...
    def none(self, a: None, b: dict[str, None] | None = None) -> None: ...
    def any(self, a: typing.Any, b: Colour, c: pathlib.Path) -> typing.Any: ...
    def array(self, a: NDArray[numpy.uint8], b: numpy.ndarray) -> NDArray[numpy.uint8]: ...
    def local(self, a: int) -> int:
        b = c = a
        return b + c
    def text(self, a: "int", b: "pathlib.Path | None" = None) -> "list[int]": ...
    def text_of_none(self, a: "None", b: "dict[str, None] | None" = None) -> "None": ...
    def old_text(self, a: "typing.Optional[int]", b: "typing.Any" = 1) -> "typing.Iterator[int]": ...
    def nested_text(self, a: list["int"]) -> int: ...
    def old(self, a: typing.Optional[int], b: typing.Annotated[int, "b"] = 1) -> typing.Iterator[int]: ...
    def generator(self, a: int) -> typing.Any: yield a
    async def coroutine(self, a: int) -> int: return a
    async def async_generator(self, a: int): yield a
    def takes_progress(self, a: int, **progress): ...
    def patched(self, a: int, *, b: int) -> int: ...
    patched.__kwdefaults__ = {"a": 1, "b": 2}
    def overfull(self, a: int) -> int: ...
    overfull.__defaults__ = (1, 2, 3)
    def seems_to_stream(self, a: int) -> Alias: ...
    def iterates(self, a: int) -> collections.abc.Iterable[int]: ...
    def unsubscripted(self, a: int) -> typing.Iterator: ...
    @twice
    def decorated(self, a: int, b: int = 2) -> int: ...
    @classmethod
    def of_class(cls, a: int, b: int = 2) -> int: ...
    @staticmethod
    def static(a: int, b: int = 2) -> int: ...
"""
namespace: dict[str, Any] = {}
exec(compile(METHODS, "plugin.py", "exec", dont_inherit=True), namespace)
PLUGIN = namespace["Plugin"]()
NAMES = [name for name in vars(type(PLUGIN)) if not name.startswith("_")]


@pytest.mark.parametrize("name", NAMES)
def test_a_tool_is_the_same_however_its_signature_is_read(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    method = getattr(PLUGIN, name)
    bound = tools.bind(name, method, ())
    monkeypatch.setattr(signature, "_plain", lambda _: None)
    asked = tools.bind(name, method, ())
    assert bound.info == asked.info
    assert "a" in bound.hints or name == "nothing"
    assert bound.hints == asked.hints
    assert bound.arguments.__struct_fields__ == asked.arguments.__struct_fields__
    assert bound.arguments.__struct_defaults__ == asked.arguments.__struct_defaults__


def test_progress_is_no_argument_whatever_its_default() -> None:
    bound = tools.bind("generic", PLUGIN.generic, ())
    assert bound.info.progress
    assert list(bound.hints) == ["a", "b"]


@pytest.mark.parametrize(
    "name",
    ["plain", "generic", "local", "of_class", "generator", "none", "any", "array", "text", "text_of_none"],
)
def test_what_is_plain_is_read_without_inspect(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object, **__: object) -> None:
        raise AssertionError("it was asked")

    monkeypatch.setattr(inspect, "signature", never)
    monkeypatch.setattr(typing, "get_type_hints", never)
    tools.bind(name, getattr(PLUGIN, name), ())


@pytest.mark.parametrize("hint", ["Nowhere", "int +", "1 / 0", "list[Nowhere]"])
def test_a_hint_that_does_not_resolve_is_refused_by_what_python_says_of_it(hint: str) -> None:
    def work(self: object, a: int) -> None: ...

    work.__annotations__["a"] = hint
    with pytest.raises(signature.ToolInvalid, match="the type hints of `work` do not resolve: "):
        tools.bind("work", work.__get__(PLUGIN), ())


def collects(self: object, *names: int) -> None: ...
def by_position(self: object, a: int, /) -> None: ...
def by_keyword(self: object, **names: int) -> None: ...


@pytest.mark.parametrize(
    ("function", "shown"), [(collects, "*names"), (by_position, "a"), (by_keyword, "**names")]
)
def test_a_parameter_that_no_caller_can_name_is_refused(function: Callable[..., Any], shown: str) -> None:
    method = function.__get__(PLUGIN)
    with pytest.raises(signature.ToolInvalid, match=re.escape(f"takes `{shown}")):
        tools.bind("work", method, ())


def without_self() -> None: ...


def test_a_method_without_self_is_refused_by_what_python_says_of_it() -> None:
    with pytest.raises(ValueError, match="invalid method signature"):
        tools.bind("work", without_self.__get__(PLUGIN), ())
