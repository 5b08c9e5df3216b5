"""From a plugin's folder to an object that serves: import, `__init__`, `validate`, and what can break there."""

from __future__ import annotations

import contextlib
import functools
import importlib
import json  # noqa: F401 - most libraries want it: loaded once, and never a file of the plugin's by that name
import logging
import re
import sys
import traceback
from collections.abc import Callable, Iterator
from difflib import get_close_matches
from pathlib import Path
from types import ModuleType
from typing import Any, TypeAlias

from msgspec import msgpack

from engine.sandbox import wire
from engine.worker import bytecode, confine, failure
from engine.worker.rejects import doubts
from engine.worker.signature import ToolInvalid
from engine.worker.tools import BoundTool, bind

Send: TypeAlias = Callable[[wire.Message], None]
Enter: TypeAlias = Callable[[wire.StageName], None]

_SHARED_LIBRARY = re.compile(r"(\S+\.so\S*): cannot open shared object file")


class Refused(Exception):
    """The start is over; `report` says why."""

    def __init__(self, report: wire.StartFailed) -> None:
        super().__init__(report.message)
        self.report = report


class Context:
    """What a plugin's `__init__` is given.

    Attributes:
        models: name of a model in the manifest → its file.
        settings: the manifest's `[settings]`.
        scratch: a folder of the worker's own, which goes when the worker goes.
        log: a logger whose lines become `plugin.log` events.
    """

    def __init__(self, start: wire.Start, send: Send) -> None:
        self._start = start
        # Not `send` itself: a plugin that copies what it was given would copy the channel, whose method that is.
        self._send = lambda message: send(message)
        self.settings: dict[str, Any] = msgpack.decode(start.settings)

    # Made when they are asked for: the logger, or the first path, takes fifty pages of a small worker's memory.

    @functools.cached_property
    def log(self) -> logging.Logger:
        logger = logging.getLogger(f"holdfast.{self._start.name}")
        logger.setLevel(logging.DEBUG)
        logger.propagate = False
        logger.addHandler(_LogHandler(self._send))
        return logger

    @functools.cached_property
    def models(self) -> dict[str, Path]:
        return {name: Path(path) for name, path in self._start.models.items()}

    @functools.cached_property
    def scratch(self) -> Path:
        return Path(self._start.scratch)


class _LogHandler(logging.Handler):
    def __init__(self, send: Send) -> None:
        super().__init__()
        self._send = send

    def emit(self, record: logging.LogRecord) -> None:
        self._send(wire.LogLine(record.levelname.lower(), failure.sendable(self.format(record), 4096)))


def load(start: wire.Start, send: Send, enter: Enter) -> dict[str, BoundTool]:
    """Bring the plugin up; returns its tools.

    Args:
        start: which plugin.
        send: what there is to say.
        enter: told of each stage before it is entered, so that a death in it can be told from one in another.

    Raises:
        Refused: with the report to send.
    """
    context = Context(start, send)
    stage = functools.partial(_stage, start=start, send=send, enter=enter)
    with stage("import"):
        plugin_class = _import(start)
    with stage("init"):
        instance = plugin_class(context)
    with stage("validate"):
        _validate(instance, start)
    with stage("tools"):
        tools = {}
        for name, rejects in start.tools.items():
            method = getattr(instance, name, None)
            if not callable(method):
                text = f"[tools.{name}] has no method `{name}` on {start.entry}{_nearest(name, type(instance))}"
                raise _refusal("tools", "no_tool", text)
            tools[name] = bind(name, method, rejects)
        _doubt_rejects(start, send)
        return tools


def _doubt_rejects(start: wire.Start, send: Send) -> None:
    try:
        for doubt in doubts(start.tools):
            send(wire.LogLine("warning", doubt))
    except BaseException as exc:  # the plugin's import hooks and metaclasses are asked; it is only advice
        text = f"what stands under `rejects` was not looked at: {failure.type_name(type(exc))}"
        send(wire.LogLine("warning", text))


def _import(start: wire.Start) -> Callable[[Context], Any]:
    module_name, _, class_name = start.entry.partition(":")
    sys.path.insert(0, start.folder)
    bytecode.install(start.folder)
    # Modules of other folders: Python would check those by their age, which does not show each edit.
    sys.dont_write_bytecode = True
    module = importlib.import_module(module_name)
    if _hidden(module_name, start.folder):
        text = f"the entry `{start.entry}` is a module of the standard library; rename {module_name}.py"
        raise _refusal("import", "hidden", text)
    plugin_class = getattr(module, class_name, None)
    if not callable(plugin_class):
        text = f"{module_name}.py has no class `{class_name}`{_nearest(class_name, module)}"
        raise _refusal("import", "no_class", text)
    made: Callable[[Context], Any] = plugin_class
    return made


def _validate(instance: Any, start: wire.Start) -> None:
    validate = getattr(instance, "validate", None)
    if not callable(validate):
        text = f"{start.entry} has no method `validate`{_nearest('validate', type(instance))}"
        raise _refusal("validate", "no_validate", text)
    if validate() is False:
        raise _refusal("validate", "returned_false", "validate() returned False")


def _nearest(name: str, owner: object) -> str:
    """The public function or class of `owner` whose name is nearest, if one is near."""
    known = [word for word in dir(owner) if not word.startswith("_") and callable(getattr(owner, word, None))]
    near = get_close_matches(name, known, 1)
    return f" (did you mean `{near[0]}`?)" if near else ""


def _refusal(stage: str, kind: str, message: str) -> Refused:
    return Refused(wire.StartFailed(stage, kind, "", message, ""))


@contextlib.contextmanager
def _stage(name: wire.StageName, start: wire.Start, send: Send, enter: Enter) -> Iterator[None]:
    """Enter a stage; report what it raises."""
    enter(name)
    try:
        yield
    except Refused:
        raise
    except ToolInvalid as exc:
        raise _refusal(name, "bad_signature", failure.message(exc)) from None
    except BaseException as exc:  # plugin code may raise anything
        report = _report(name, exc, start)
        if report.kind == "exception":
            send(wire.LogLine("error", failure.trace(exc)))
        raise Refused(report) from None


def _report(stage: str, exc: BaseException, start: wire.Start) -> wire.StartFailed:
    if isinstance(exc, MemoryError):
        confine.open_reserve()
    folder = Path(start.folder)
    at = failure.where(exc.__traceback__, folder)
    if isinstance(exc, SyntaxError):
        at = failure.syntax_error_where(exc, folder) or at
    kind, text = "exception", failure.message(exc) + _hint(exc, folder)
    chain: tuple[str, ...] = ()
    if failure.is_memory(exc):
        kind = "memory"
    elif (missing := _missing(exc, folder)) is not None:
        kind, text, chain = "missing", missing, _chain(exc, start)
    return wire.StartFailed(stage, kind, failure.type_name(type(exc)), text, at, chain)


def _hidden(name: str, where: str) -> bool:
    """Whether a module of the plugin's folder bears the name of a standard one that was there before it."""
    top = name.partition(".")[0]
    if top not in sys.stdlib_module_names:
        return False
    folder = Path(where)
    if not ((folder / top).is_dir() or (folder / f"{top}.py").is_file()):
        return False
    file = getattr(sys.modules.get(top), "__file__", None)
    return not (isinstance(file, str) and Path(file).is_relative_to(folder))


def _hint(exc: BaseException, folder: Path) -> str:
    """What an import that found the standard library's module instead of the plugin's own is to be told."""
    name = None
    if isinstance(exc, AttributeError) and isinstance(exc.obj, ModuleType):
        name = exc.obj.__name__
    elif isinstance(exc, ImportError):
        name = exc.name
    if not isinstance(name, str) or not _hidden(name, str(folder)):
        return ""
    return f" (that is the standard library's `{name}`, not the plugin's own: rename the plugin's)"


def _missing(exc: BaseException, folder: Path) -> str | None:
    """What is missing outside the plugin's folder: a module's name or a shared library's, else None."""
    if isinstance(exc, ModuleNotFoundError) and exc.name:
        top = exc.name.partition(".")[0]
        inside = (folder / top).is_dir() or (folder / f"{top}.py").is_file()
        return None if inside else exc.name
    if isinstance(exc, ImportError | OSError):
        found = _SHARED_LIBRARY.search(failure.message(exc))
        return found.group(1) if found else None
    return None


def _chain(exc: BaseException, start: wire.Start) -> tuple[str, ...]:
    """The modules whose import led to the failure, outermost first; the plugin's own is given its name."""
    chain = [start.name]
    entry = start.entry.partition(":")[0]
    for frame, _ in traceback.walk_tb(exc.__traceback__):
        name = frame.f_globals.get("__name__", "")
        if (
            not isinstance(name, str)
            or name in chain
            or name == entry
            or name.startswith(("importlib", "engine."))
        ):
            continue
        chain.append(failure.sendable(name))
    return tuple(chain if len(chain) <= wire.MAX_CHAIN else chain[: wire.MAX_CHAIN - 1] + chain[-1:])
