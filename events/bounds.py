"""Texts of events are bounded and can be encoded, whoever wrote them.

An event is copied to the log, the audit, the ring and every subscriber, and what the log keeps must be what was
folded live; so a text is cut before anything sees it. The engine cuts what plugins say much earlier; this is
the last line.
"""

from __future__ import annotations

from typing import Any, get_type_hints

import msgspec
from msgspec.structs import replace

from events.envelope import DATA_TYPES, EventData, PluginFacts, Transition

TEXT_CHARS = 8192  # of one text; an event has two at most

_TEXTS = {
    kind: tuple(name for name, hint in get_type_hints(kind).items() if hint in (str, str | None))
    for kind in (*DATA_TYPES.values(), PluginFacts)
}


def bounded(data: EventData) -> EventData:
    """The same data, each text at most `TEXT_CHARS` long and without what UTF-8 does not have."""
    changed: dict[str, Any] = {}
    for name in _TEXTS[type(data)]:
        text = getattr(data, name)
        if text is not None and (len(text) > TEXT_CHARS or not text.isascii()):
            changed[name] = _fit(text)
    if isinstance(data, Transition) and data.plugin is not msgspec.UNSET:
        facts = data.plugin
        texts = {name: _fit(getattr(facts, name)) for name in _TEXTS[PluginFacts]}
        changed["plugin"] = replace(facts, tools=tuple(map(_fit, facts.tools)), **texts)
    return replace(data, **changed) if changed else data


def _fit(text: str) -> str:
    if len(text) > TEXT_CHARS:
        end = f"… ({len(text)} characters)"
        text = text[: TEXT_CHARS - len(end)] + end
    # A lone surrogate grows to 6 characters: rare enough to let it.
    return text if text.isascii() else text.encode("utf-8", "backslashreplace").decode()
