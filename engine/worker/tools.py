"""Tools: arguments typed by the signature and checked before any plugin code runs; results encoded."""

from __future__ import annotations

import base64
import binascii
import contextlib
import re
import typing
from collections.abc import Callable
from difflib import get_close_matches
from importlib import import_module
from pathlib import Path, PurePath
from typing import Any

import msgspec
from msgspec import UNSET, UnsetType, msgpack

from engine.sandbox import values, wire
from engine.worker.signature import PROGRESS, REQUIRED, ToolInvalid, signature

_BYTES = (bytes, bytearray, memoryview)


_MAX_DEPTH = 256  # of a result; far below where either side's stack would end
_CONTAINERS = (dict, list, tuple, set, frozenset)
_CHECKED = (*_CONTAINERS, msgpack.Ext)

# Asked for once, in the fork server: what msgspec walks to find these out, each worker would have a copy of.
_PLAIN: dict[Any, dict[str, Any]] = {}


def prepare() -> None:
    """In the fork server: have the schemas of the commonest hints ready."""
    plain = (bool, int, float, str, bytes)
    _PLAIN.update(zip(plain, msgspec.json.schema_components(plain)[0], strict=True))


class BadInput(Exception):
    """The caller's arguments do not fit; the message names the argument, what it wants and what came."""


class BoundTool(msgspec.Struct, frozen=True):
    """A tool ready to be called."""

    name: str
    method: Callable[..., Any]
    rejects: tuple[str, ...]
    arguments: type[msgspec.Struct]
    hints: dict[str, Any]
    info: wire.ToolInfo


def bind(name: str, method: Callable[..., Any], rejects: tuple[str, ...]) -> BoundTool:
    """Read a tool's signature.

    Raises:
        ToolInvalid: a parameter that no caller could fill, or a type hint that has no schema.
    """
    parameters, hints, generates = signature(name, method)
    if takes_progress := PROGRESS in parameters:
        del parameters[PROGRESS]
    fields: list[tuple[str, Any] | tuple[str, Any, Any]] = []
    wanted = {parameter: hints.get(parameter, Any) for parameter in parameters}
    for parameter, hint in wanted.items():
        if parameters[parameter] is REQUIRED:
            fields.append((parameter, hint))
        else:
            fields.append((parameter, hint | UnsetType if hint is not Any else Any, UNSET))
    defaults = {parameter: value for parameter, value in parameters.items() if value is not REQUIRED}
    arguments = msgspec.defstruct(name, fields, forbid_unknown_fields=True, kw_only=True)
    try:
        schema = _schema(name, wanted, defaults)
    except (TypeError, ValueError) as exc:
        raise ToolInvalid(f"a type hint of `{name}` has no JSON Schema: {exc}") from None
    returns = hints.get("return")
    if not isinstance(returns, type):
        returns = typing.get_origin(returns)
    streams = generates or (
        isinstance(returns, type) and returns.__module__ == "collections.abc" and _is_iterable(returns)
    )
    return BoundTool(name, method, rejects, arguments, wanted, wire.ToolInfo(schema, streams, takes_progress))


def _is_iterable(kind: type) -> bool:
    return kind.__name__ in (
        "Iterator",
        "Generator",
        "Iterable",
        "AsyncIterator",
        "AsyncGenerator",
        "AsyncIterable",
    )


def _is_array_type(kind: Any) -> bool:
    return getattr(kind, "__module__", "") == "numpy" and getattr(kind, "__name__", "") == "ndarray"


def _schema(name: str, hints: dict[str, Any], defaults: dict[str, Any]) -> str:
    """The arguments' JSON Schema, as JSON: an object with a property for each hint."""
    others = {argument: hint for argument, hint in hints.items() if not (type(hint) is type and hint in _PLAIN)}
    properties = {argument: _PLAIN[hint] for argument, hint in hints.items() if argument not in others}
    definitions = None
    if others:
        schemas, definitions = msgspec.json.schema_components(others.values(), schema_hook=_schema_of)
        properties |= dict(zip(others, schemas, strict=True))
    for argument, default in defaults.items():
        with contextlib.suppress(TypeError, ValueError):  # a default without a JSON form is simply not shown
            shown = msgspec.Raw(msgspec.json.encode(default))
            properties[argument] = {**properties[argument], "default": shown}
    schema: dict[str, Any] = {
        "title": name,
        "type": "object",
        "properties": {argument: properties[argument] for argument in hints},
        "required": [argument for argument in hints if argument not in defaults],
        "additionalProperties": False,
    }
    if definitions:
        schema["$defs"] = definitions
    return msgspec.json.encode(schema).decode()


def _schema_of(kind: type) -> dict[str, Any]:
    if isinstance(kind, type) and issubclass(kind, PurePath):
        return {"type": "string", "format": "binary", "description": "a file: a part of multipart/form-data"}
    if _is_array_type(kind):
        return {
            "description": "an array: nested lists, or its bytes in base64 with typestr and shape",
            "anyOf": [
                {"type": "array"},
                {
                    "type": "object",
                    "properties": {
                        "typestr": {"type": "string"},
                        "shape": {"type": "array", "items": {"type": "integer", "minimum": 0}},
                        "data": {"type": "string", "contentEncoding": "base64"},
                    },
                    "required": ["typestr", "shape", "data"],
                },
            ],
        }
    raise TypeError(f"{kind!r}")


def decode(tool: BoundTool, encoding: str, data: bytes, decoder: values.Decoder) -> dict[str, Any]:
    """The keyword arguments of a call.

    Args:
        tool: whose signature they must fit.
        encoding: `python` (MessagePack), `json` (an object), `form` (MessagePack: text and files by name).
        data: the arguments in that encoding.
        decoder: for what lies in the arena.

    Raises:
        BadInput: they do not fit.
    """
    try:
        raw = msgspec.json.decode(data) if encoding == "json" else decoder.decode(data)
    except RecursionError:
        raise BadInput("the arguments are nested too deeply") from None
    except (ValueError, TypeError) as exc:
        raise BadInput(f"the arguments cannot be read: {exc}") from None
    if not isinstance(raw, dict):
        raise BadInput(f"the arguments must be an object of names and values, not {_shown_type(raw)}")
    if encoding == "form":
        raw = {name: _from_form(name, value, tool.hints.get(name, Any)) for name, value in raw.items()}
    try:
        fitted = msgspec.convert(
            raw,
            tool.arguments,
            strict=True,
            builtin_types=_BYTES if encoding != "json" else (),
            dec_hook=_LOCAL if encoding == "python" else _REMOTE,
        )
    except msgspec.ValidationError as exc:
        raise BadInput(_explain(str(exc), tool)) from None
    except RecursionError:  # pragma: no cover - tests get here, but what notes it is out of stack as well
        raise BadInput("the arguments are nested too deeply") from None
    return {
        name: value for name in tool.arguments.__struct_fields__ if (value := getattr(fitted, name)) is not UNSET
    }


def _from_form(name: str, value: Any, hint: Any) -> Any:
    """A form's text or file as the value that the parameter wants; left alone where it fits as it is."""
    if isinstance(value, values.FilePart):
        if _accepts(hint, PurePath):
            return value
        content = Path(value.path).read_bytes()
        if _accepts(hint, bytes):
            return content
        value = content.decode("utf-8", "replace")
    if not isinstance(value, str) or _accepts(hint, str):
        return value
    if _accepts(hint, PurePath) or _accepts(hint, bytes):
        raise BadInput(f"argument `{name}`: expected a file, got text; send it as a file ({name}=@path)")
    try:
        return msgspec.json.decode(value)
    except (msgspec.DecodeError, RecursionError):
        return value


def _accepts(hint: Any, kind: type) -> bool:
    if hint is Any:
        return kind is str
    return any(isinstance(part, type) and issubclass(part, kind) for part in typing.get_args(hint) or (hint,))


def _hook(*, local: bool) -> Callable[[type, Any], Any]:
    """`dec_hook` for files and arrays. Only a caller in the engine's process may name a file by path."""

    def hook(kind: Any, value: Any) -> Any:
        if _is_array_type(typing.get_origin(kind) or kind):
            return _array(kind, value)
        # Invariant: any other type is a path; `bind` refused the rest, which have no schema.
        if isinstance(value, values.FilePart):
            return kind(value.path)
        if local and isinstance(value, str):
            if not Path(value).is_file():
                raise ValueError(f"There is no file at {value}")
            return kind(value)
        raise ValueError("Expected a file; send it as a part of multipart/form-data")

    return hook


_LOCAL, _REMOTE = _hook(local=True), _hook(local=False)


def _array(kind: Any, value: Any) -> Any:
    """The array that `numpy.ndarray` or `NDArray[…]` asks for, made from JSON where need be."""
    numpy = import_module("numpy")  # present: the plugin's own hint is of its array type
    wanted = _element_types(kind)
    try:
        array = value
        if isinstance(value, list):
            array = numpy.asarray(value)
        elif isinstance(value, dict):
            data = base64.b64decode(value["data"], validate=True)
            array = numpy.frombuffer(data, numpy.dtype(value["typestr"])).reshape(value["shape"])
        elif not isinstance(value, numpy.ndarray):
            raise TypeError(f"got {_shown_type(value)}")
        if not wanted or any(numpy.issubdtype(array.dtype, element) for element in wanted):
            return array
        if isinstance(value, list):  # JSON has no element types: whatever holds the same numbers will do
            for element in wanted:
                cast = array.astype(element)
                if (cast == array).all():
                    return cast
    except (ValueError, TypeError, KeyError, OverflowError, binascii.Error) as exc:
        raise ValueError(f"Expected an array{_of(wanted)}, {exc}") from None
    raise ValueError(f"Expected an array{_of(wanted)}, got one of `{array.dtype}`")


def _of(elements: list[Any]) -> str:
    return " of " + " or ".join(f"`{element.__name__}`" for element in elements) if elements else ""


def _element_types(kind: Any) -> list[Any]:
    """`NDArray[uint8]`: uint8. Empty where any will do."""
    arguments = typing.get_args(kind)  # shape, dtype[element]
    element = next(iter(typing.get_args(arguments[1])), Any) if len(arguments) == 2 else Any
    return [part for part in typing.get_args(element) or (element,) if isinstance(part, type) and part is not Any]


def _shown_type(value: Any) -> str:
    names = {dict: "object", list: "array", type(None): "null", values.FilePart: "a file"}
    return f"`{names.get(type(value), type(value).__name__)}`"


_AT = re.compile(r" - at (`key` in )?`\$\.?(.*)`$")
_UNKNOWN = re.compile(r"Object contains unknown field `(.*)`")
_LACKING = re.compile(r"Object missing required field `(.*)`")


def _explain(text: str, tool: BoundTool) -> str:
    """msgspec's message, in terms of the tool's arguments."""
    at = _AT.search(text)
    said = text if at is None else text[: at.start()]
    unknown, lacking = _UNKNOWN.fullmatch(said), _LACKING.fullmatch(said)
    if at is not None:
        if unknown is not None:
            said = f"it has no field `{unknown[1]}`"
        elif lacking is not None:
            said = f"its field `{lacking[1]}` is missing"
        return f"argument `{at[2]}`: {'a key: ' if at[1] else ''}{said[:1].lower()}{said[1:]}"
    if unknown is not None:
        names = list(tool.arguments.__struct_fields__)
        near = get_close_matches(unknown[1], names, 1)
        hint = f"; did you mean `{near[0]}`?" if near else ";"
        return (
            f"there is no argument `{unknown[1]}`{hint} `{tool.name}` takes {', '.join(names) or 'no arguments'}"
        )
    if lacking is not None:
        return f"argument `{lacking[1]}` is missing; it wants {_shown_hint(tool.hints.get(lacking[1], Any))}"
    return said


def _shown_hint(hint: Any) -> str:
    if _is_array_type(typing.get_origin(hint) or hint):
        return f"an array{_of(_element_types(hint))}"
    if isinstance(hint, type):
        return "a file" if issubclass(hint, PurePath) else f"`{hint.__name__}`"
    return f"`{str(hint).replace('typing.', '')}`"


def encode_result(value: Any, encoder: values.Encoder) -> msgspec.Raw:
    """A result or item for the wire. Raises like `Encoder.encode`, and TypeError for keys JSON cannot have."""
    _check(value, 0)
    return msgspec.Raw(encoder.encode(value, values.MAX_VALUE_BYTES))


def _check(value: Any, depth: int) -> None:
    """What MessagePack would take and JSON, or the engine's stack, would not."""
    if isinstance(value, _CONTAINERS):
        if depth >= _MAX_DEPTH:
            raise ValueError(f"it is nested deeper than {_MAX_DEPTH}")
        if isinstance(value, dict):
            for key in value:
                if isinstance(key, bool) or not isinstance(key, str | int | float):
                    raise TypeError(f"a key of type `{type(key).__name__}` has no JSON form; use text")
        for part in value.values() if isinstance(value, dict) else value:
            if isinstance(part, _CHECKED):
                _check(part, depth + 1)
    elif isinstance(value, msgpack.Ext):
        raise TypeError("a value of type `Ext` has no JSON form")
