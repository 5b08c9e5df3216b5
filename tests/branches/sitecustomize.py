"""Notes which lines of Holdfast followed which, in every process of a test run.

Workers are what coverage.py cannot watch: they are forked, give up their descriptors and the file system, and most
are ended by SIGKILL, so nothing can be saved at their end. What is noted goes straight into shared pages, mapped
before the fork: one byte for each pair of lines of each file. The engine's own process is noted in the same way:
in Python 3.11 coverage.py loses its place where an exception is thrown into nested coroutines, as every timeout
does, and its lock is a blocking call in the event loop. `tests/branches` puts this module, and those pages as
`arcs`, into a folder on PYTHONPATH; without them it does nothing.
"""

from __future__ import annotations

import dis
import math
import mmap
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

LINES = 1024  # of a file; a negative one stands for leaving or entering the function that begins there
PAIRS = (2 * LINES) ** 2
_ENOUGH = 500_000  # lines of one worker, which by then goes round and round: a tracer must not make it hang
_noting: list[Callable[[FrameType, str, Any], Any]] = []
_YIELD = dis.opmap["YIELD_VALUE"]
_RESUME = dis.opmap["RESUME"]


def at(file: int, before: int, line: int) -> int:
    """Where the byte is that says that `line` followed `before` in a file."""
    return file * PAIRS + (before + LINES) * 2 * LINES + line + LINES


def note(arcs: mmap.mmap, files: dict[str, int], enough: float) -> None:
    """From now on, in this process and in those forked from it, for so many lines."""
    left = enough

    def enter(frame: FrameType, _event: str, _argument: Any) -> Any:
        file = files.get(frame.f_code.co_filename)
        return None if file is None else local(file, frame)

    def local(file: int, frame: FrameType) -> Any:
        code, first = frame.f_code.co_code, frame.f_code.co_firstlineno
        resumed = code[frame.f_lasti] == _RESUME and code[frame.f_lasti + 1] & 3 != 0
        before = frame.f_lineno if resumed else -first

        def follow(frame: FrameType, event: str, _argument: Any) -> Any:
            nonlocal before, left
            if event == "line":
                arcs[at(file, before, frame.f_lineno)] = 1
                before = frame.f_lineno
                left -= 1
                if left < 0:
                    sys.settrace(None)
            elif event == "return" and code[frame.f_lasti] != _YIELD:
                arcs[at(file, before, -first)] = 1
            return follow if left >= 0 else None

        return follow

    # An audit hook is traced only where it says so.
    add = sys.addaudithook

    def addaudithook(hook: Callable[[str, tuple[Any, ...]], Any]) -> None:
        hook.__cantrace__ = True  # type: ignore[attr-defined]
        add(hook)

    sys.addaudithook = addaudithook
    threading.settrace(enter)
    sys.settrace(enter)
    _noting.append(enter)


def go_on() -> None:
    """After what ended the noting in this thread: an exception in it, such as for recursion, does."""
    if _noting and sys.gettrace() is None:
        sys.settrace(_noting[0])


def main() -> None:
    """In a process that found this module on its path."""
    pages = Path(__file__).with_name("arcs")
    names = Path(__file__).with_name("files")
    if not pages.exists():
        return
    with pages.open("r+b") as file:
        arcs = mmap.mmap(file.fileno(), 0)
    forks = any(argument.endswith("engine/worker/__main__.py") for argument in sys.orig_argv)
    known = {name: n for n, name in enumerate(names.read_text().splitlines())}
    note(arcs, known, _ENOUGH if forks else math.inf)


main()
