"""Once, for nothing, what every start does: in a worker that waits to be told which plugin it serves.

A forked process has its own copy of a page from when it first writes to it, and to look at a Python object is to
write to it: hundreds of pages, each a fault of some microseconds, that the start then finds in place.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec, PathFinder
from importlib.util import spec_from_file_location

from msgspec import msgpack

from engine.sandbox import wire
from engine.worker import bytecode, failure, load

_NAME = "_holdfast_rehearsal"
_FILE = f"/{_NAME}.py"
_SOURCE = b"""
class Plugin:
    def __init__(self, context): self.settings = context.settings
    def validate(self) -> None: ...
    def tool(self, text: str, count: int = 1) -> dict[str, int]: return {}
"""
_PYC = bytecode.pyc(bytecode.header(_SOURCE), compile(_SOURCE, _FILE, "exec", dont_inherit=True))


class _InNoFile(bytecode.Keeping):
    """A plugin may have changed a file, and no worker is contained yet when it rehearses."""

    @classmethod
    def find_spec(cls, name: str, _path: object, _target: object = None) -> ModuleSpec | None:
        """The class itself is the finder on `sys.meta_path`."""
        return spec_from_file_location(name, _FILE, loader=cls(name, _FILE)) if name == _NAME else None

    def get_data(self, path: str) -> bytes:
        return _SOURCE if path == self.path else _PYC


class _Wanted(Exception):
    """The rehearsal is over: it is time for the start itself."""


def rehearse(wanted: Callable[[], bool]) -> str:
    """Rehearse a start until it is `wanted`; "", or why that went wrong, which does no harm."""

    def enter(_stage: wire.StageName) -> None:
        if wanted():
            raise _Wanted

    try:
        if not wanted():
            _start(enter)
    except _Wanted:
        return ""
    except Exception as exc:  # an import hook of somebody's, say
        return f"the rehearsal of a start failed ({failure.type_name(type(exc))}: {failure.message(exc)})"
    return ""


def _start(enter: load.Enter) -> None:
    def send(message: wire.Message) -> None:
        wire.frame(message)

    start = wire.Start("rehearsal", "/", f"{_NAME}:Plugin", {}, msgpack.encode({}), "/", {"tool": ()}, 0, 0)
    path, hooks = sys.path.copy(), sys.path_hooks.copy()
    PathFinder.find_spec(_NAME, ["/"])  # finds nothing
    sys.path_importer_cache.pop("/", None)  # what was seen there is nobody's
    sys.meta_path.insert(0, _InNoFile)
    try:
        tools = load.load(wire.start_request.decode(wire.encode(start)), send, enter)
    finally:
        sys.path[:], sys.path_hooks[:] = path, hooks
        sys.meta_path.remove(_InNoFile)
        sys.modules.pop(_NAME, None)
    send(wire.Ready({name: tool.info for name, tool in tools.items()}))
