"""Telling what an exception was and where, when it may be hostile: its `__str__` may raise, or never end."""

from __future__ import annotations

import contextlib
import re
import traceback
from collections.abc import Iterable
from pathlib import Path
from types import FrameType, TracebackType

_MAX_TRACE = 6000  # characters of a traceback that travel
_MAX_FRAMES = 30
_MAX_MESSAGE = 2000  # characters of an exception's message that travel
_MAX_NAME = 500  # of a type's or a place's
_OWN = Path(__file__).parents[1]  # a reason names no line of Holdfast's: nobody could mend anything there

# How libraries say that an allocation failed when they do not raise MemoryError. CUDA's own out-of-memory is
# about the GPU, which no limit of ours governs.
_NO_MEMORY = re.compile(
    r"can't allocate memory|cannot allocate memory|insufficient memory|bad_alloc|unable to allocate|"
    r"failed to allocate \d+ bytes",
    re.IGNORECASE,
)


def type_name(kind: type) -> str:
    """`ValueError`, `cv2.error`: qualified, except for builtins."""
    try:
        module, name = kind.__module__, kind.__qualname__
    except BaseException:  # plugin code: a metaclass may refuse
        return "an exception"
    return sendable(name if module == "builtins" else f"{module}.{name}", _MAX_NAME)


def message(exc: BaseException) -> str:
    """The exception's message, shortened; or why there is none."""
    try:
        text = str(exc)
    except BaseException as second:  # plugin code: `__str__` may raise anything
        return f"<no message: its __str__ raised {type_name(type(second))}>"
    return sendable(text, _MAX_MESSAGE)


def sendable(text: str, limit: int = _MAX_MESSAGE) -> str:
    """A text as it travels: shortened, and lone surrogates, which UTF-8 does not have, written out."""
    shown = text[:limit].encode("utf-8", "backslashreplace").decode()
    return shown if len(text) <= limit else f"{shown}… ({len(text)} characters)"


def is_memory(exc: BaseException) -> bool:
    """Whether the exception says that an allocation failed, for want of host memory."""
    if isinstance(exc, MemoryError):
        return True
    text = message(exc)
    return "CUDA" not in text and _NO_MEMORY.search(text) is not None


def is_any(exc: BaseException, names: Iterable[str]) -> bool:
    """Whether the exception or one of its bases bears one of the names, plain or qualified."""
    own = {name for kind in type(exc).__mro__ for name in names_of(kind)}
    return not own.isdisjoint(names)


def names_of(kind: type) -> tuple[str, str]:
    """What a manifest may call an exception: its plain name and its qualified one."""
    return kind.__name__, type_name(kind)


def location(filename: str, line: int | None, function: str, folder: Path) -> str:
    """`plugin.py:17 in `detect``, with the file relative to the plugin's folder where it lies inside."""
    path = Path(filename)
    with contextlib.suppress(ValueError):
        path = path.relative_to(folder)
    shown = path.name if path.is_absolute() else str(path)
    return sendable(f"{shown}:{line} in `{function}`", _MAX_NAME)


def where(tb: TracebackType | None, folder: Path) -> str:
    """The innermost frame in the plugin's folder; failing that, the innermost of a library. "" without either."""
    frames = [(frame.f_code, line) for frame, line in traceback.walk_tb(tb)]
    inside = [at for at in frames if Path(at[0].co_filename).is_relative_to(folder)]
    found = inside or [at for at in frames if not _is_ours(at[0].co_filename)]
    if not found:
        return ""
    code, line = found[-1]
    return location(code.co_filename, line, code.co_name, folder)


def _is_ours(filename: str) -> bool:
    """Whether it is Holdfast's or the importer's."""
    return filename.startswith("<frozen ") or Path(filename).is_relative_to(_OWN)


def trace(exc: BaseException) -> str:
    """The traceback, as Python prints it, shortened from the front; or why there is none."""
    try:
        text = "".join(traceback.format_exception(exc, limit=-_MAX_FRAMES))
    except BaseException as second:  # plugin code: formatting asks the exception for this and that
        return f"<no traceback: formatting it raised {type_name(type(second))}>"
    return text.encode("utf-8", "backslashreplace").decode()[-_MAX_TRACE:]


def syntax_error_where(exc: SyntaxError, folder: Path) -> str:
    """Where a syntax error is; the traceback ends in the importer and does not say."""
    if exc.filename is None:
        return ""
    return location(exc.filename, exc.lineno, "<module>", folder)


def caller(frame: FrameType | None, folder: Path) -> str:
    """Like `where`, for a live frame; in words where there is no line to name."""
    outside = None
    while frame is not None:
        code = frame.f_code
        if Path(code.co_filename).is_relative_to(folder):
            return location(code.co_filename, frame.f_lineno, code.co_name, folder)
        if outside is None and not _is_ours(code.co_filename):
            outside = location(code.co_filename, frame.f_lineno, code.co_name, folder)
        frame = frame.f_back
    return outside or "code without a line of Python"
