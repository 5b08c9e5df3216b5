"""Tokens and what they may do.

`token` in the settings may do everything. `token_file` holds more of them, as SHA-256 digests, never as they are:

    [[token]]
    name = "grafana"
    role = "read"        # read < run < admin
    sha256 = "9f86d0…"

A plain digest is enough because `holdfast token` makes tokens of 256 random bits: nobody guesses one, however
fast a guess is.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
import stat
import tomllib
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import msgspec

from engine.errors import SetupError
from engine.settings import Settings


class Role(StrEnum):
    """What a token may do; each includes those before it."""

    READ = "read"  # health, events, metrics
    RUN = "run"  # call tools
    ADMIN = "admin"  # restart plugins

    def includes(self, other: Role) -> bool:
        """Whether who may do this may do that."""
        return _ORDER.index(self) >= _ORDER.index(other)


_ORDER = tuple(Role)


class Token(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One entry of a token file."""

    name: Annotated[str, msgspec.Meta(pattern=r"^[\w.-]{1,64}$")]
    role: Role
    sha256: Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{64}$")]


class _File(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    token: list[Token] = []


class Tokens:
    """The tokens of a server. Without any, everybody who reaches it may do everything.

    Raises:
        SetupError: the token file cannot be used; one line, with the next step.
    """

    def __init__(self, settings: Settings) -> None:
        self._tokens = [] if settings.token_file is None else read(settings.token_file)
        if settings.token:
            self._tokens.append(Token("token", Role.ADMIN, digest(settings.token)))

    @property
    def required(self) -> bool:
        """Whether a request needs one."""
        return bool(self._tokens)

    def find(self, given: str) -> Token | None:
        """The entry of a token. Takes the same time wherever it stands, and whether or not it is there."""
        wanted = digest(given)
        found = None
        for token in self._tokens:
            if hmac.compare_digest(token.sha256, wanted):
                found = token
        return found


def digest(token: str) -> str:
    """The SHA-256 of a token, in hex."""
    return hashlib.sha256(token.encode("utf-8", "surrogateescape")).hexdigest()


def read(path: Path) -> list[Token]:
    """The entries of a token file.

    Raises:
        SetupError: it cannot be read, is no such file, or others could change it.
    """
    try:
        if stat.S_IMODE(path.stat().st_mode) & (stat.S_IWGRP | stat.S_IWOTH):
            raise SetupError(f"the token file {path} can be changed by other users; chmod 600 it")
        entries = msgspec.convert(tomllib.loads(path.read_text("utf-8")), _File).token
    except OSError as exc:
        text = f"the token file {path} cannot be read: {exc.strerror}; make one with `holdfast token`"
        raise SetupError(text) from exc
    except (ValueError, msgspec.ValidationError) as exc:
        raise SetupError(f"the token file {path} is not valid: {exc}; make entries with `holdfast token`") from exc
    if not entries:
        raise SetupError(f"the token file {path} has no [[token]]; make one with `holdfast token`")
    return entries


def add(path: Path, entry: str) -> None:
    """Append an entry to a token file, which is made where there is none, for its owner alone.

    Raises:
        SetupError: it cannot be written.
    """
    try:
        fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        with os.fdopen(fd, "a", encoding="utf-8") as file:
            file.write(entry)
    except OSError as exc:
        raise SetupError(f"the token file {path} cannot be written: {exc.strerror}; choose another one") from exc


def make(name: str, role: Role) -> tuple[str, str]:
    """A new token, and its entry for the file.

    Raises:
        ValueError: the name is not one.
    """
    token = secrets.token_urlsafe(32)
    entry = msgspec.convert({"name": name, "role": role.value, "sha256": digest(token)}, Token)
    return token, f'[[token]]\nname = "{entry.name}"\nrole = "{entry.role.value}"\nsha256 = "{entry.sha256}"\n'
