"""What a call came to. Outcomes are values: nothing a plugin does raises in the caller."""

from __future__ import annotations

import base64
import itertools
import uuid
from typing import Any, ClassVar, TypeAlias

import msgspec

from engine.errors import HoldfastError, ReasonCode

# Unlike any other: within this process by its number, and among processes by what it begins with.
new_request_id = map(f"{uuid.uuid4().hex[:20]}{{:012x}}".format, itertools.count()).__next__


class Array:
    """An array a plugin returned, in an engine without numpy: `numpy.asarray(array)` makes one, uncopied.

    Attributes:
        typestr: element type as in numpy's array interface, such as `|u1` or `<f4`.
        shape: size per axis.
        data: the elements in C order.
    """

    # No struct and no dataclass: passed to a tool it is an array, and the encoder would make an object of it.
    __slots__ = ("data", "shape", "typestr")

    def __init__(self, typestr: str, shape: tuple[int, ...], data: bytes) -> None:
        self.typestr = typestr
        self.shape = shape
        self.data = data

    def __repr__(self) -> str:
        return f"Array({self.typestr!r}, {self.shape!r}, {len(self.data)} bytes)"

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Array):
            return NotImplemented
        return (self.typestr, self.shape, self.data) == (other.typestr, other.shape, other.data)

    def __hash__(self) -> int:
        return hash((self.typestr, self.shape, self.data))

    @property
    def __array_interface__(self) -> dict[str, Any]:
        """Numpy's array interface, version 3."""
        return {"version": 3, "typestr": self.typestr, "shape": self.shape, "data": self.data}

    def to_json(self) -> dict[str, Any]:
        """The JSON form: `{"typestr", "shape", "data"}` with the data in base64."""
        data = base64.b64encode(self.data).decode()
        return {"typestr": self.typestr, "shape": list(self.shape), "data": data}


class Completed(msgspec.Struct, frozen=True, kw_only=True):
    """The tool returned. A streaming tool's `value` is the list of its items."""

    ok: bool = True
    value: Any
    duration_ms: float
    request_id: str

    error: ClassVar[None] = None
    error_type: ClassVar[None] = None
    reason_code: ClassVar[None] = None
    state: ClassVar[None] = None


class Refused(msgspec.Struct, frozen=True, kw_only=True):
    """The call was not made, or its input was bad; the plugin is as it was."""

    ok: bool = False
    error: str  # fact, cause, next step
    error_type: str
    reason_code: ReasonCode
    state: str | None  # the plugin's; None where there is no such plugin
    duration_ms: float = 0.0
    request_id: str

    value: ClassVar[None] = None


class Broke(msgspec.Struct, frozen=True, kw_only=True):
    """The plugin broke on this call, and is FAILED now."""

    ok: bool = False
    error: str
    error_type: str
    reason_code: ReasonCode
    state: str | None
    duration_ms: float = 0.0
    request_id: str

    value: ClassVar[None] = None


Outcome: TypeAlias = Completed | Refused | Broke


class CallFailed(HoldfastError):
    """Raised at the end of `Engine.stream` where the outcome is not `Completed`; carries that outcome."""

    def __init__(self, outcome: Refused | Broke) -> None:
        super().__init__(outcome.error)
        self.outcome = outcome


def encode_hook(value: Any) -> Any:
    """`enc_hook` for the JSON form of outcomes."""
    if isinstance(value, Array):
        return value.to_json()
    raise TypeError(f"{type(value).__name__} has no JSON form")
