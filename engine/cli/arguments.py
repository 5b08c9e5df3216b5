"""A tool's arguments on the command line: `key=value` is text, `key=@file` a file, `key=@@x` the text `@x`."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TypeAlias

from engine.cli.console import ExitCode, Failure

Form: TypeAlias = Mapping[str, str | Path]


def read_form(words: Iterable[str]) -> Form:
    """The arguments by name; a path is absolute.

    Raises:
        Failure: a word is no argument, a name is there twice, or a file cannot be read.
    """
    form: dict[str, str | Path] = {}
    for word in words:
        name, equals, text = word.partition("=")
        if not equals or not name:
            raise _wrong(f"`{word}` is not an argument; write NAME=VALUE, or NAME=@FILE for a file")
        if name in form:
            raise _wrong(f"argument `{name}` is there twice; give it once (a list is JSON: {name}='[1, 2]')")
        if text.startswith("@@"):
            form[name] = text[1:]
        elif text.startswith("@"):
            form[name] = _file(name, text[1:])
        else:
            form[name] = text
    return form


def _file(name: str, path: str) -> Path:
    text = f"{name}=@@{path}"
    if not path:
        raise _wrong(f"argument `{name}`: no file is named after the @; for the text itself write {text}")
    found = Path(path).expanduser().absolute()
    if not found.exists():
        raise _wrong(f"argument `{name}`: there is no file {path}; correct it, or write {text} for the text")
    if not found.is_file():
        raise _wrong(f"argument `{name}`: {path} is not a regular file; name one")
    if not os.access(found, os.R_OK):
        raise _wrong(f"argument `{name}`: {path} cannot be read; correct its permissions")
    return found


def _wrong(text: str) -> Failure:
    return Failure(ExitCode.WRONG_USE, text)
