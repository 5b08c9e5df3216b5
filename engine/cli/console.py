"""What people and scripts see: exit codes, one-line errors, tables on a terminal and plain columns elsewhere.

stdout carries the answer, stderr everything else. Text that comes from plugins is made printable first, so that
none of it can drive the terminal.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from enum import IntEnum
from typing import Any

import msgspec


class ExitCode(IntEnum):
    """What the process ends with."""

    FINE = 0
    PLUGIN_FAILED = 1  # also: not in service, an audit that is not sound
    WRONG_USE = 2  # bad input, an unknown plugin or tool, bad flags, settings that do not work
    NO_SERVER = 3
    INTERRUPTED = 130  # Ctrl-C
    TERMINATED = 143  # SIGTERM


class Failure(Exception):
    """The command ends here: an exit code and one line (fact, cause, next step)."""

    def __init__(self, code: ExitCode, text: str) -> None:
        super().__init__(text)
        self.code = code
        self.text = text


_STYLES = {
    "RUNNING": "green",
    "INITIALIZED": "green",
    "LOADED": "yellow",
    "UNAVAILABLE": "yellow",
    "FAILED": "red",
}


def printable(text: str) -> str:
    """`text` on one line without control characters."""
    return "".join(char if char.isprintable() else " " for char in text)


def say(text: str) -> None:
    """One line of the answer."""
    print(printable(text), flush=True)


def note(text: str) -> None:
    """One line beside the answer."""
    print(f"holdfast: {printable(text)}", file=sys.stderr, flush=True)


def write_json(value: Any) -> None:
    """The answer for machines: compact JSON on one line."""
    write_raw(msgspec.json.encode(value) + b"\n")


def write_raw(data: bytes) -> None:
    """Bytes of the answer, as they are."""
    sys.stdout.buffer.write(data)
    sys.stdout.buffer.flush()


def state_style(state: str) -> str:
    """The colour of a lifecycle state."""
    return _STYLES.get(state, "")


_LONG = ("REASON", "VALUE")


def table(head: Sequence[str], rows: Sequence[Sequence[str]], *, state_column: int | None = None) -> None:
    """A table: drawn on a terminal, else columns of plain text, two spaces between them."""
    clean = [[printable(cell) for cell in row] for row in rows]
    if sys.stdout.isatty():
        _draw(head, clean, state_column)
        return
    widths = [max(len(cell) for cell in column) for column in zip(head, *clean, strict=True)]
    for row in (head, *clean):
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
        print("  ".join(cells).rstrip())
    sys.stdout.flush()


def _draw(head: Sequence[str], rows: Sequence[Sequence[str]], state_column: int | None) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    drawn = Table(box=SIMPLE_HEAD, pad_edge=False)
    for name in head:  # what a reason names, a path above all, is shown whole
        drawn.add_column(name, overflow="fold", no_wrap=name not in _LONG)
    for row in rows:
        drawn.add_row(
            *(Text(cell, style=state_style(cell) if n == state_column else "") for n, cell in enumerate(row))
        )
    Console(width=max(40, shutil.get_terminal_size().columns)).print(drawn)
