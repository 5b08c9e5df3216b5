"""The engine's settings: frozen, every unit in the name. Defaults < holdfast.toml < HOLDFAST_* < flags."""

from __future__ import annotations

import os
from pathlib import Path

import msgspec


def default_data_dir() -> Path:
    """`$XDG_STATE_HOME/holdfast`, by default `~/.local/state/holdfast` (XDG Base Directory Specification)."""
    return Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "holdfast"


class Settings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Everything an engine can be told. A relative path is relative to the working directory."""

    # Plugins
    plugin_dirs: tuple[Path, ...] = ()
    bundled: bool = True  # the plugins that come with Holdfast
    entry_points: bool = True  # installed packages in the group `holdfast.plugins`

    # Data: the event log, the audit, scratch folders
    data_dir: Path = msgspec.field(default_factory=default_data_dir)

    # Server
    host: str = "127.0.0.1"
    port: int = 8700
    token: str | None = None  # required for any host but loopback
    max_body_bytes: int = 1024 * 1024 * 1024  # an upload
    max_json_bytes: int = 64 * 1024 * 1024  # a JSON body

    # Sandbox
    max_result_bytes: int = 256 * 1024 * 1024
    arena_bytes: int = 256 * 1024 * 1024  # per worker and direction; sparse
    start_concurrency: int = 8  # plugins that start at the same time
    stop_grace_s: float = 2.0  # for a healthy worker to end by itself
    memory_interval_s: float = 0.1  # between two looks at the workers' memory
    log_lines_per_s: float = 100.0  # captured output per worker that becomes events

    # Streams
    stream_items: int = 64  # items kept for a slow consumer before the worker has to wait
    stream_stall_s: float = 30.0  # a consumer that takes nothing for this long has gone away

    # Engine
    drain_s: float = 20.0  # for calls in flight when the engine stops
    gpu_check_timeout_s: float = 20.0
    log_backlog: int = 100_000  # events that wait for a disk that fails
    repair_log: bool = False  # move a corrupt event log aside and begin a new one
