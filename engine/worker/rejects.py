"""Names under `rejects` that mean nothing: silent, until the exception comes that one of them was meant for."""

from __future__ import annotations

import builtins
import importlib.util
import sys
from collections.abc import Iterator
from difflib import get_close_matches

from engine.worker import failure

_NEAR = 0.75  # of hundreds of names, one is a little like anything


def doubts(tools: dict[str, tuple[str, ...]]) -> Iterator[str]:
    """What is to be said of `rejects`, once the plugin is loaded: fact, cause, next step.

    A class of a module that the plugin imports later cannot be told from a misspelt one, so nothing here is an
    error; where that module exists, nothing is said.
    """
    doubted = [(tool, name) for tool, names in tools.items() for name in names if not _is_builtin(name)]
    if not doubted:
        return  # the usual case: what follows looks at every exception there is
    known = {name for kind in _exceptions() for name in failure.names_of(kind)}
    for tool, name in doubted:
        if name not in known and not _may_come(name):
            near = get_close_matches(name, known, 1, _NEAR)
            step = f"did you mean `{near[0]}`?" if near else "correct it, or write it as module.Name"
            yield f"[tools.{tool}] rejects `{name}`, but no exception is called that: it does nothing; {step}"


def _is_builtin(name: str) -> bool:
    kind = getattr(builtins, name, None)  # `IOError` is `OSError` there, and raised under that name
    return isinstance(kind, type) and issubclass(kind, BaseException) and kind.__name__ == name


def _exceptions() -> Iterator[type]:
    """Every exception class that is loaded."""
    pending: list[type] = [BaseException]
    while pending:
        kind = pending.pop()
        yield kind
        pending.extend(type.__subclasses__(kind))


def _may_come(name: str) -> bool:
    """Whether it names a class of a module that is there, but not imported yet. Imports nothing."""
    parts = name.split(".")
    for count in range(1, len(parts)):
        module = ".".join(parts[:count])
        if module in sys.modules:
            continue
        try:
            return importlib.util.find_spec(module) is not None
        except (ImportError, ValueError):  # what is above it is no package; or a module that was made by hand
            return False
    return False
