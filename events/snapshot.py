"""The views as they were after an event, kept in the log: a start replays only what came after it."""

from __future__ import annotations

import msgspec

from events.projections import PluginView
from events.store import Store

_KEY = "snapshot"


class Snapshot(msgspec.Struct, frozen=True):
    """The views after event `sequence`."""

    sequence: int
    views: dict[str, PluginView]


_decoder = msgspec.msgpack.Decoder(Snapshot)


def load_snapshot(store: Store, durable: int) -> Snapshot:
    """The snapshot kept in the log. Raises msgspec.MsgspecError, ValueError: it cannot be used."""
    stored = store.meta(_KEY)
    let_go = store.numbering.complete_from - 1
    if stored is None and not let_go:
        return Snapshot(0, {})
    snapshot = _decoder.decode(stored if isinstance(stored, bytes) else b"")
    if not let_go <= snapshot.sequence <= durable:
        raise ValueError(f"it is of event {snapshot.sequence}; the log has all from {let_go + 1} to {durable}")
    return snapshot


def save_snapshot(store: Store, snapshot: Snapshot) -> None:
    """Keep it, durably, in place of the one before. Raises sqlite3.Error."""
    store.put_meta(_KEY, msgspec.msgpack.encode(snapshot))
