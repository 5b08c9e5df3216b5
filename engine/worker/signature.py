"""A tool's signature: its parameters, their type hints, and whether it is a generator.

Of a plain method, which nearly all tools are, the code object says it. `inspect` and `typing` find out the same,
and for it write to a hundred pages of memory that a worker would share otherwise; they are asked for the rest.
"""

from __future__ import annotations

import contextlib
import inspect
import typing
from collections.abc import Callable
from types import FunctionType, GenericAlias, MethodType, NoneType, UnionType
from typing import Any, NamedTuple

PROGRESS = "progress"  # the parameter that no caller gives
REQUIRED = inspect.Parameter.empty  # in the place of a default
_COLLECTS = inspect.CO_VARARGS | inspect.CO_VARKEYWORDS
_GENERATES = inspect.CO_GENERATOR | inspect.CO_ASYNC_GENERATOR


class ToolInvalid(Exception):
    """The tool's signature cannot be served."""


class Signature(NamedTuple):
    """What there is to know of a tool before it is called."""

    parameters: dict[str, Any]  # in their order, each with its default, or `REQUIRED`
    hints: dict[str, Any]
    generates: bool  # it is written as a generator


def signature(name: str, method: Callable[..., Any]) -> Signature:
    """Read the signature of a tool.

    Raises:
        ToolInvalid: a parameter that no caller could name, or a hint that does not resolve.
    """
    plain = _plain(method)
    if plain is None:
        generates = inspect.isgeneratorfunction(method) or inspect.isasyncgenfunction(method)
        return Signature(_parameters(name, method), _hints(name, method), generates)
    hints = {of: _meant(hint, plain.__globals__) for of, hint in plain.__annotations__.items()}
    if not all(map(_is_resolved, hints.values())):
        hints = _hints(name, method)
    return Signature(_plain_parameters(plain), hints, bool(plain.__code__.co_flags & _GENERATES))


def _plain(method: Callable[..., Any]) -> FunctionType | None:
    """The function of a method that is neither decorated nor takes anything that cannot be named."""
    if type(method) is not MethodType or type(function := method.__func__) is not FunctionType or vars(function):
        return None
    code, given = function.__code__, function.__defaults__ or ()
    named = code.co_argcount and not (code.co_posonlyargcount or code.co_flags & _COLLECTS)
    return function if named and len(given) < code.co_argcount else None


def _plain_parameters(function: FunctionType) -> dict[str, Any]:
    """Those after `self`."""
    code, given = function.__code__, function.__defaults__ or ()
    positional = code.co_varnames[1 : code.co_argcount]
    by_name = code.co_varnames[code.co_argcount : code.co_argcount + code.co_kwonlyargcount]
    kept = function.__kwdefaults__ or {}
    required = [REQUIRED] * (len(positional) - len(given))
    return dict(zip(positional, [*required, *given], strict=True)) | {n: kept.get(n, REQUIRED) for n in by_name}


def _parameters(name: str, method: Callable[..., Any]) -> dict[str, Any]:
    """Those of anything that can be called. Raises ToolInvalid."""
    found = {}
    for parameter in inspect.signature(method).parameters.values():
        by_name = parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
        if not by_name and parameter.name != PROGRESS:
            raise ToolInvalid(f"`{name}` takes `{parameter}`; a tool's parameters are passed by name")
        found[parameter.name] = parameter.default
    return found


def _hints(name: str, method: Callable[..., Any]) -> dict[str, Any]:
    """The type hints, of which any may be a text that names a type. Raises ToolInvalid."""
    try:
        return typing.get_type_hints(method)
    except Exception as exc:  # any expression may stand in a hint
        raise ToolInvalid(f"the type hints of `{name}` do not resolve: {exc}") from None


def _meant(hint: Any, names: dict[str, Any]) -> Any:
    """What a hint stands for; one that is a text and does not evaluate stays it."""
    if type(hint) is str:
        with contextlib.suppress(Exception):  # any expression may stand in it; `typing` is to say what is wrong
            hint = eval(hint, names, {})  # noqa: S307 - the plugin's own code, as all around it
    return NoneType if hint is None else hint


def _is_resolved(hint: Any) -> bool:
    """Whether a hint is a class, or made of nothing but classes: no text is left in it."""
    if type(hint) in (GenericAlias, UnionType):
        return all(map(_is_resolved, hint.__args__))
    return isinstance(hint, type) or hint is ... or hint is None
