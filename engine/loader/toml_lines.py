"""On which line each key of a TOML text stands; `tomllib` does not say.

One forward pass over the text, linear in its length. It accepts a superset of TOML: it stops at what it
cannot follow and leaves the verdict to `tomllib`. It also bounds nesting, and must run first for that:
`tomllib` needs quadratic time for a key of many dots and overflows the stack on many brackets.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from contextlib import suppress

KeyPath = tuple[str | int, ...]
"""Names of tables and keys, and positions in arrays: `("tools", "track", "rejects", 0)`."""

MAX_DEPTH = 32
"""Tables and arrays within each other, dotted parts included. A manifest needs 4; settings are free-form."""

_SKIP = re.compile(r"(?:[ \t\r\n]++|#[^\n]*+)*+")
_BLANK = re.compile(r"[ \t]*+")
_MULTI_BASIC = re.compile(r'"""(?:[^"\\]++|\\.|"(?!""))*+"{3,5}', re.DOTALL)
_MULTI_LITERAL = re.compile(r"'''(?:[^']++|'(?!''))*+'{3,5}")
_BASIC = re.compile(r'"(?:[^"\\\n]++|\\.)*+"')
_LITERAL = re.compile(r"'[^'\n]*+'")
_BARE_KEY = re.compile(r"[A-Za-z0-9_-]++")
_BARE_VALUE = re.compile(r"[^,\]}#\n]++")
_ESCAPE = re.compile(r"\\(?:u([0-9A-Fa-f]{4})|U([0-9A-Fa-f]{8})|(.))", re.DOTALL)
_ESCAPED = {"b": "\b", "t": "\t", "n": "\n", "f": "\f", "r": "\r", '"': '"', "\\": "\\"}


class TooDeep(Exception):
    """Tables, arrays or dotted keys are nested past `MAX_DEPTH`; `.line` says where."""

    def __init__(self, line: int) -> None:
        super().__init__(f"line {line}")
        self.line = line


class _Lost(Exception):
    """Not TOML from here on."""


def key_lines(text: str) -> dict[KeyPath, int]:
    """The line, from 1, of every table, key and array element, up to the first thing that is not TOML.

    A table named more than once has the line of its first mention. Raises `TooDeep`.
    """
    scanner = _Scanner(text)
    with suppress(_Lost):
        scanner.document()
    return scanner.lines


class _Scanner:
    def __init__(self, text: str) -> None:
        self.lines: dict[KeyPath, int] = {}
        self._text = text
        self._at = 0
        self._newlines = [match.start() for match in re.finditer("\n", text)]
        self._lengths: dict[KeyPath, int] = {}  # elements so far of each [[array of tables]]

    def document(self) -> None:
        table: KeyPath = ()
        while self._skip(_SKIP) < len(self._text):
            if self._take("["):
                table = self._header()
            else:
                self._key_value(table)

    def _header(self) -> KeyPath:
        start = self._at
        is_array = self._take("[")
        parts = self._key(())
        if not self._take("]" * (1 + is_array)):
            raise _Lost
        path: KeyPath = ()
        for position, part in enumerate(parts, start=1):
            path = (*path, part)
            self._note(path, start)
            if is_array and position == len(parts):
                self._lengths[path] = self._lengths.get(path, 0) + 1
            if path in self._lengths:  # below [[a]], the header [a.b] belongs to the newest element of a
                path = (*path, self._lengths[path] - 1)
                self._note(path, start)
        return path

    def _key_value(self, table: KeyPath) -> None:
        start = self._at
        path = table
        for part in self._key(table):
            path = (*path, part)
            self._note(path, start)
        if not self._take("="):
            raise _Lost
        self._value(path)

    def _key(self, table: KeyPath) -> list[str]:
        parts: list[str] = []
        while True:
            self._skip(_BLANK)
            if bare := self._match(_BARE_KEY):
                parts.append(bare)
            elif literal := self._match(_LITERAL):
                parts.append(literal[1:-1])
            elif basic := self._match(_BASIC):
                parts.append(_ESCAPE.sub(_unescaped, basic[1:-1]))
            else:
                raise _Lost
            self._bound(len(table) + len(parts))
            self._skip(_BLANK)
            if not self._take("."):
                return parts

    def _value(self, path: KeyPath) -> None:
        self._bound(len(path))
        self._skip(_BLANK)
        if self._take("["):
            self._array(path)
        elif self._take("{"):
            self._inline_table(path)
        elif not any(self._match(form) for form in (_MULTI_BASIC, _MULTI_LITERAL, _BASIC, _LITERAL, _BARE_VALUE)):
            raise _Lost

    def _array(self, path: KeyPath) -> None:
        for position in range(len(self._text)):
            self._skip(_SKIP)
            if self._take("]"):
                return
            self._note((*path, position), self._at)
            self._value((*path, position))
            self._skip(_SKIP)
            if not self._take(","):
                break
        if not self._take("]"):
            raise _Lost

    def _inline_table(self, path: KeyPath) -> None:
        while True:
            self._skip(_SKIP)
            if self._take("}"):
                return
            self._key_value(path)
            self._skip(_SKIP)
            if not self._take(",") and not self._text.startswith("}", self._at):
                raise _Lost

    def _note(self, path: KeyPath, offset: int) -> None:
        self.lines.setdefault(path, bisect_right(self._newlines, offset) + 1)

    def _bound(self, depth: int) -> None:
        if depth > MAX_DEPTH:
            raise TooDeep(bisect_right(self._newlines, self._at) + 1)

    def _match(self, pattern: re.Pattern[str]) -> str:
        found = pattern.match(self._text, self._at)
        if found is None:
            return ""
        self._at = found.end()
        return found[0]

    def _skip(self, pattern: re.Pattern[str]) -> int:
        self._match(pattern)
        return self._at

    def _take(self, token: str) -> bool:
        if self._text.startswith(token, self._at):
            self._at += len(token)
            return True
        return False


def _unescaped(match: re.Match[str]) -> str:
    short, long, single = match.groups()
    if single is not None:
        return _ESCAPED.get(single, single)
    code = int(short or long, 16)
    return chr(code) if code <= 0x10FFFF else "\N{REPLACEMENT CHARACTER}"
