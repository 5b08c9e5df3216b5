"""Holdfast: a plugin can fail; the engine cannot be made to.

`Engine`, `Settings` and `Outcome` are the public API. They load on first use, because the worker's side
lives below this package too and must not pull a server into every worker.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from engine.engine import Engine
    from engine.errors import HoldfastError, SetupError, StreamStalled, UnknownPlugin
    from engine.outcome import Array, Broke, CallFailed, Completed, Outcome, Refused
    from engine.settings import Settings

__all__ = [
    "Array",
    "Broke",
    "CallFailed",
    "Completed",
    "Engine",
    "HoldfastError",
    "Outcome",
    "Refused",
    "Settings",
    "SetupError",
    "StreamStalled",
    "UnknownPlugin",
]

_HOME = {
    "Engine": "engine.engine",
    "Settings": "engine.settings",
    "HoldfastError": "engine.errors",
    "SetupError": "engine.errors",
    "StreamStalled": "engine.errors",
    "UnknownPlugin": "engine.errors",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'engine' has no attribute {name!r}")
    return getattr(import_module(_HOME.get(name, "engine.outcome")), name)
