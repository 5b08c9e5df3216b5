"""One TOML file as written by someone else: its data, and errors that name file, line and key."""

from __future__ import annotations

import re
import tomllib
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NoReturn

from engine.errors import HoldfastError
from engine.loader.regular_files import NotRegular, open_regular, read_exactly, why
from engine.loader.toml_lines import MAX_DEPTH, KeyPath, TooDeep, key_lines

MAX_BYTES = 1024 * 1024
"""A manifest is a page of text; a megabyte bounds what reading one can cost the engine."""

NAME = re.compile(r"[a-z][a-z0-9_-]{0,63}")
"""What a plugin may be called (matched whole)."""

_NAME_LINE = re.compile(r"""^[ \t]*name[ \t]*=[ \t]*(["'])([a-z][a-z0-9_-]{0,63})\1""", re.MULTILINE)
_FIRST_TABLE = re.compile(r"^[ \t]*\[", re.MULTILINE)
_TOMLLIB_PLACE = re.compile(r" \(at (?:line (\d+), column (\d+)|end of document)\)$")


class ManifestInvalid(HoldfastError):
    """A `plugin.toml` that cannot be used.

    `.reason` names the file, the line, the key and the next step. `.name` is the plugin's name, where that
    much could be read, so that the entry in the registry keeps it.
    """

    def __init__(self, reason: str, name: str | None) -> None:
        super().__init__(reason)
        self.reason = reason
        self.name = name


class TomlSource:
    """The text of one TOML file, parsed. Raises `ManifestInvalid`, and nothing else, when that fails."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.name: str | None = None
        text = self._text()
        self.name = _name_in(text)
        try:
            self.lines = key_lines(text)
        except TooDeep as deep:
            self._refuse(deep.line, f"tables or arrays nest more than {MAX_DEPTH} deep; flatten them")
        try:
            self.data: dict[str, Any] = tomllib.loads(text)
        except tomllib.TOMLDecodeError as error:
            line, fact = _placed(str(error), text)
            self._refuse(line, f"not valid TOML: {fact}; correct this line")
        except Exception as error:  # tomllib on any text: it leaks others, as for a number of 5000 digits
            self._refuse(1, f"not readable as TOML ({type(error).__name__}: {error}); simplify the file")
        declared = self.data.get("name")
        self.name = declared if isinstance(declared, str) and NAME.fullmatch(declared) else None

    def line(self, key: KeyPath) -> int:
        """The line of a key, else that of the nearest table around it."""
        return next((self.lines[key[:n]] for n in range(len(key), 0, -1) if key[:n] in self.lines), 1)

    def fail(self, key: KeyPath, problem: str) -> NoReturn:
        """Raise `ManifestInvalid` for a key; `problem` continues "key `limits.queue` …"."""
        self._refuse(self.line(key), f"key `{shown_key(key)}` {problem}")

    def _text(self) -> str:
        try:
            with open_regular(self.path) as file:
                raw = read_exactly(file, MAX_BYTES + 1)
        except NotRegular as error:
            self._refuse(None, f"is {error}, not a file; put the plugin's manifest there")
        except FileNotFoundError:
            self._refuse(None, "does not exist; write one, or remove the folder")
        except OSError as error:
            self._refuse(None, f"cannot be read ({why(error)}); make it readable for the engine's user")
        if len(raw) > MAX_BYTES:
            self._refuse(None, f"is larger than {MAX_BYTES} bytes; keep data in files of their own")
        if not raw.strip():
            self._refuse(1, "the file is empty; it needs at least name, version, entry and a [tools.NAME]")
        try:
            return raw.decode("utf-8-sig").replace("\r\n", "\n")
        except UnicodeDecodeError as error:
            line = raw.count(b"\n", 0, error.start) + 1
            fact = f"byte 0x{raw[error.start]:02x} is not UTF-8"
            self._refuse(line, f"{fact}; save the file in UTF-8")

    def _refuse(self, line: int | None, problem: str) -> NoReturn:
        place = f"{self.path} " if line is None else f"{self.path}, line {line}: "
        raise ManifestInvalid(printable(place + problem, 4000), self.name)


def shown_key(key: KeyPath) -> str:
    """A key as a person writes it: `tools.track.rejects[0]`."""
    text = ""
    for part in key:
        text += f"[{part}]" if isinstance(part, int) else f".{part}"
    return printable(text.removeprefix("."))


def shown(value: object) -> str:
    """A TOML value, quoted and short, for use in a message."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, dict):
        return "a table"
    if isinstance(value, list | tuple):
        return "an array"
    if isinstance(value, int) and value.bit_length() > 64:
        return "a whole number of more than 64 bits"  # str() of a huge one raises
    return f'"{printable(value)}"' if isinstance(value, str) else printable(str(value))


def printable(text: str, limit: int = 80) -> str:
    """`text` on one line, without control characters, cut at `limit` characters."""
    cut = text[:limit] + ("…" if len(text) > limit else "")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in cut)


def nearest(word: str, known: list[str]) -> str:
    """The next step for an unknown word: the nearest known one, or all of them."""
    close = get_close_matches(word[:100], known, n=1, cutoff=0.5)
    return f"did you mean `{close[0]}`?" if close else f"known here: {', '.join(known)}"


def _name_in(text: str) -> str | None:
    """The plugin's name in a text that may be broken further on."""
    table = _FIRST_TABLE.search(text)
    line = _NAME_LINE.search(text, 0, table.start() if table else len(text))
    return line[2] if line else None


def _placed(message: str, text: str) -> tuple[int, str]:
    """tomllib's message as line and fact: it puts the place at the end, in parentheses."""
    place = _TOMLLIB_PLACE.search(message)
    if place is None:
        return 1, printable(message, 200)
    fact = printable(message[: place.start()], 200)
    if place[1] is None:
        return text.count("\n", 0, len(text.rstrip())) + 1, f"{fact} at the end of the file"
    return int(place[1]), f"{fact} at column {place[2]}"
