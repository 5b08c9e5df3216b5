"""Keeps secrets out of what is written: a structlog processor."""

from __future__ import annotations

import re
from collections.abc import Callable, MutableMapping, Sequence
from typing import Any, TypeAlias

import msgspec

REDACTED = "[redacted]"

Fields: TypeAlias = MutableMapping[str, Any]

_SECRET_NAME = re.compile(
    r"(^|[_.-])(token|authorization|password|passwd|passphrase|secret|cookie|api[_-]?key)($|[_.-])", re.IGNORECASE
)
_BEARER = re.compile(r"(bearer\s+)[\w.~+/=-]+", re.IGNORECASE)
_OURS = ("sequence", "time", "level", "event")  # fields that no plugin and no caller has a hand in
_PLAIN = (int, float, bool)


def has_secret_name(name: str) -> bool:
    """Whether a field of this name holds a secret, whatever stands in it."""
    return _SECRET_NAME.search(name) is not None


def suspicion(secrets: Sequence[str]) -> Callable[[bytes], bool]:
    """A quick look at compact JSON: False where no string of it can hold one of the secrets or a bearer token."""
    # Inside JSON a secret stands as JSON writes it.
    encoded = [msgspec.json.encode(secret)[1:-1] for secret in secrets if secret]

    def suspicious(json: bytes) -> bool:
        # `find`: `in` takes bytes for a number first, and makes an exception of that, each time.
        for secret in encoded:
            if json.find(secret) >= 0:
                return True
        # Before a token stands white space: a blank, an escape, or something beyond ASCII.
        spaced = json.find(b" ") >= 0 or json.find(b"\\") >= 0 or not json.isascii()
        return spaced and json.lower().find(b"earer") >= 0

    return suspicious


def redactor(secrets: Sequence[str]) -> Callable[[Any, str, Fields], Fields]:
    """A structlog processor: no secret in any string, and none under a name like `token` or `password`."""
    values = sorted({secret for secret in secrets if secret}, key=len, reverse=True)
    secret_names: dict[str, bool] = {}

    def clean(value: Any) -> Any:
        if isinstance(value, str):
            for secret in values:
                if secret in value:
                    value = value.replace(secret, REDACTED)
            return _BEARER.sub(rf"\1{REDACTED}", value) if "earer" in value.lower() else value
        if isinstance(value, dict):
            return clean_fields(value)
        if isinstance(value, (list, tuple)):
            return [clean(item) for item in value]
        return value

    def clean_fields(fields: Fields) -> Fields:
        for name, value in fields.items():
            secret = secret_names.get(name)
            if secret is None:
                secret = secret_names[name] = has_secret_name(name)
            if secret:
                fields[name] = REDACTED
            elif value is not None and value.__class__ not in _PLAIN:
                fields[name] = clean(value)
        return fields

    def process(_logger: Any, _level: str, fields: Fields) -> Fields:
        return {
            name: value if name in _OURS else clean_fields({name: value})[name] for name, value in fields.items()
        }

    return process
