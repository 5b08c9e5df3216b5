"""Texts of events are bounded and can be encoded, whoever wrote them.

An event is copied to the log, the audit, the ring and every subscriber, and what the log keeps must be what was
folded live; so a text is cut before anything sees it. The engine cuts what plugins say much earlier; this is
the last line.
"""

from __future__ import annotations

from collections.abc import Callable
from operator import attrgetter
from typing import Any, TypeVar, get_type_hints

import msgspec
from msgspec.structs import replace

from events.envelope import DATA_TYPES, EventData, PluginFacts, Transition

TEXT_CHARS = 8192  # of what is told; an event has one such text
NAME_CHARS = 256  # of what is named: nothing that counts or keeps events need look for longer ones

_TOLD = ("message", "reason", "why", "description")

Texts = TypeVar("Texts", bound=msgspec.Struct)

_TEXTS: dict[type[msgspec.Struct], dict[str, int]] = {  # by kind: each text, and how long it may be
    kind: {
        name: TEXT_CHARS if name in _TOLD else NAME_CHARS
        for name, hint in get_type_hints(kind).items()
        if hint in (str, str | None)
    }
    for kind in (*DATA_TYPES.values(), PluginFacts)
}


def _reader(names: tuple[str, ...]) -> Callable[[Any], tuple[str | None, ...]]:
    """All of a struct's texts at once."""
    # Of fewer than two names, `attrgetter` makes no tuple.
    return attrgetter(*names) if len(names) > 1 else lambda data: tuple(getattr(data, name) for name in names)


_READERS = {kind: _reader(tuple(_TEXTS[kind])) for kind in DATA_TYPES.values()}


def bounded(data: EventData) -> EventData:
    """The same data, its texts as long as they may be and without what UTF-8 does not have."""
    for text in _READERS[type(data)](data):
        if text is not None and (len(text) > NAME_CHARS or not text.isascii()):
            data = _fit_all(data)
            break
    if isinstance(data, Transition) and data.plugin is not msgspec.UNSET:
        facts = data.plugin
        return replace(data, plugin=replace(_fit_all(facts), tools=tuple(_fit(tool) for tool in facts.tools)))
    return data


def _fit_all(data: Texts) -> Texts:
    texts = {name: (getattr(data, name), chars) for name, chars in _TEXTS[type(data)].items()}
    return replace(data, **{name: text and _fit(text, chars) for name, (text, chars) in texts.items()})


def _fit(text: str, chars: int = NAME_CHARS) -> str:
    if len(text) > chars:
        end = f"… ({len(text)} characters)"
        text = text[: chars - len(end)] + end
    # A lone surrogate grows to 6 characters: rare enough to let it.
    return text if text.isascii() else text.encode("utf-8", "backslashreplace").decode()
