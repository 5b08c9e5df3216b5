"""The engine's settings: frozen, every unit in the name. Defaults < holdfast.toml < HOLDFAST_* < flags."""

from __future__ import annotations

import os
import tomllib
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, TypeAlias, get_type_hints

import msgspec
from msgspec import Meta, inspect

from engine.errors import SetupError

CONFIG_FILE = "holdfast.toml"
ENV_PREFIX = "HOLDFAST_"
_FLAGS = {"plugin_dirs": "--plugins", "bundled": "--no-bundled", "data_dir": "--data"}  # the others: --their-name

Count: TypeAlias = Annotated[int, Meta(ge=1)]
Seconds: TypeAlias = Annotated[float, Meta(gt=0, le=86_400)]


def default_data_dir() -> Path:
    """`$XDG_STATE_HOME/holdfast`, by default `~/.local/state/holdfast` (XDG Base Directory Specification)."""
    return Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "holdfast"


def bundled_dir() -> Path:
    """The folder of the bundled plugins: inside the package when installed, beside it in a checkout."""
    package = Path(__file__).resolve().parent
    installed = package / "_bundled"
    return installed if installed.is_dir() else package.parent / "plugins"


class Settings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Everything an engine can be told. A relative path is relative to the working directory."""

    # Plugins
    plugin_dirs: tuple[Path, ...] = ()  # folders of plugins, or single plugins, beside the bundled ones
    bundled: bool = True  # the plugins that come with Holdfast
    entry_points: bool = True  # installed packages in the group `holdfast.plugins`

    # Data
    data_dir: Path = msgspec.field(default_factory=default_data_dir)  # the event log, the audit, scratch folders
    hidden: tuple[Path, ...] = ()  # more files and folders that plugins do not see, such as another engine's data

    retain_events: Count = 1_000_000  # of these latest events calls and log lines are kept (about 400 MB)
    retain_days: Annotated[float, Meta(gt=0)] | None = None  # older calls and log lines go too
    crash_bundles: Count = 20  # kept per plugin, the latest; 64 KiB each at most

    # Server
    host: Annotated[str, Meta(min_length=1)] = "127.0.0.1"  # the address to bind
    port: Annotated[int, Meta(ge=0, le=65_535)] = 8700  # 0 takes a free one
    token: Annotated[str, Meta(pattern=r"^[!-~]+$")] | None = None  # required for any host but loopback
    token_file: Path | None = None  # more tokens, as digests, each with a role; see `holdfast token`
    max_body_bytes: Count = 1024 * 1024 * 1024  # an upload
    max_json_bytes: Count = 64 * 1024 * 1024  # a JSON body
    max_uploads_bytes: Count = 16 * 1024 * 1024 * 1024  # files of all uploads that are there at the same time
    max_pending_bytes: Count = 512 * 1024 * 1024  # JSON bodies and forms' text of all calls, until they have ended
    max_connections: Count = 1024  # beyond them, only health is answered; fewer where descriptors do not suffice
    max_streams: Count = 256  # event streams and NDJSON answers at the same time
    request_head_s: Seconds = 10.0  # for the head of a request to be complete
    idle_connection_s: Seconds = 75.0  # a connection is kept open between two requests
    min_body_bytes_per_s: Count = 500  # of a body; a sender that is slower over `stream_stall_s` is refused

    # Sandbox
    max_result_bytes: Count = 256 * 1024 * 1024  # a result; all items together where they are collected
    arena_bytes: Annotated[int, Meta(ge=65_536)] = 256 * 1024 * 1024  # per worker and direction; sparse
    start_concurrency: Count | None = None  # plugins that start at once; none: one per processor, at least 2
    stop_grace_s: Annotated[float, Meta(ge=0, le=86_400)] = 2.0  # for a healthy worker to end by itself
    memory_interval_s: Seconds = 0.1  # between two looks at the workers' memory
    log_lines_per_s: Annotated[float, Meta(gt=0, le=1e9)] = 100.0  # captured output per worker that becomes events

    # Streams
    stream_items: Count = 64  # items kept for a slow consumer before the worker has to wait
    stream_stall_s: Seconds = 30.0  # a consumer that takes nothing for this long has gone away

    # Engine
    drain_s: Annotated[float, Meta(ge=0, le=86_400)] = 20.0  # for calls in flight when the engine stops
    gpu_check_timeout_s: Seconds = 20.0  # for torch, in its own process, to say whether there is a GPU
    log_backlog: Count = 100_000  # events that wait for a disk that fails
    repair_log: bool = False  # move a corrupt event log aside and begin a new one

    def __repr__(self) -> str:
        shown = (f"{name}={'…' if name in SECRET else getattr(self, name)!r}" for name in self.__struct_fields__)
        return f"Settings({', '.join(shown)})"


SECRET = frozenset({"token"})  # names of settings whose values are never shown
_HINTS = get_type_hints(Settings, include_extras=True)


def load(
    flags: Mapping[str, object] | None = None,
    *,
    env: Mapping[str, str] = os.environ,
    file: Path | None = None,
) -> Settings:
    """The settings in force: defaults < holdfast.toml < HOLDFAST_* < flags; a later source replaces a whole value.

    Args:
        flags: values by the name of their setting.
        env: variables; those whose name begins with `HOLDFAST_` must be settings.
        file: instead of `holdfast.toml` in the working directory, which may be absent.

    Raises:
        SetupError: an unknown name or a value that does not fit: the source, the name, what it wants, what came.
    """
    values = _from_file(file)
    values.update(_from_env(env))
    if file is not None:  # there may be a token in it
        values["hidden"] = (*values.get("hidden", ()), file)
    for name, value in (flags or {}).items():
        source = f"flag {_FLAGS.get(name, '--' + name.replace('_', '-'))}"
        _check_known(name, source, name)
        values[name] = _fit(name, value, source)
    try:
        return Settings(**values)
    except RuntimeError:  # no home folder to make the default from
        raise SetupError("data_dir: this user has no home folder; choose one with --data DIR") from None


def wants(name: str) -> str:
    """What a setting takes, in words."""
    return _wants(inspect.type_info(_HINTS[name]))


def _from_file(file: Path | None) -> dict[str, Any]:
    path = file or Path(CONFIG_FILE)
    try:
        found = tomllib.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        if file is None:
            return {}
        raise SetupError(f"{path}: there is no such file; correct --config") from None
    except OSError as exc:
        raise SetupError(f"{path}: it cannot be read ({exc.strerror}); correct its permissions") from None
    except UnicodeDecodeError:
        raise SetupError(f"{path}: it is not UTF-8 text; save it as UTF-8") from None
    except tomllib.TOMLDecodeError as exc:
        raise SetupError(f"{path}: it is not TOML: {str(exc).rstrip('.')}; correct that line") from None
    for name in found:
        _check_known(name, str(path), name)
    return {name: _fit(name, value, f"{path}: `{name}`") for name, value in found.items()}


def _from_env(env: Mapping[str, str]) -> dict[str, Any]:
    found = {}
    for variable, text in sorted(env.items()):
        if not variable.startswith(ENV_PREFIX):
            continue
        name = variable.removeprefix(ENV_PREFIX).lower()
        _check_known(name, "environment", variable, ENV_PREFIX)
        value: object = text
        if name == "plugin_dirs":
            value = [part for part in text.split(os.pathsep) if part]
        found[name] = _fit(name, value, f"environment: {variable}", strict=False)
    return found


def _check_known(name: str, source: str, shown: str, prefix: str = "") -> None:
    if name in _HINTS:
        return
    near = get_close_matches(name, _HINTS, 1)
    known = f"did you mean `{_shown_name(near[0], prefix)}`?" if near else "see docs/settings.md"
    raise SetupError(f"{source}: there is no setting `{shown}`; {known}")


def _shown_name(name: str, prefix: str) -> str:
    return prefix + name.upper() if prefix else name


def _fit(name: str, value: object, source: str, *, strict: bool = True) -> Any:
    try:
        return msgspec.convert(value, _HINTS[name], strict=strict, dec_hook=_path)
    except (msgspec.ValidationError, OverflowError, RuntimeError):  # the last: `~nobody`
        came = "a text that is not shown" if name in SECRET else _shown(value)
        raise SetupError(f"{source} wants {wants(name)}, got {came}; correct or remove it") from None


def _path(kind: type, value: Any) -> Any:
    if isinstance(value, kind):
        return value
    if not isinstance(value, str) or not value or "\0" in value:
        raise ValueError
    return Path(value).expanduser()


def _shown(value: object) -> str:
    text = repr(str(value) if isinstance(value, Path) else value)
    return text if len(text) <= 80 else text[:80] + "…"


def _wants(info: inspect.Type) -> str:
    match info:
        case inspect.Metadata(type=inner):
            return _wants(inner)
        case inspect.UnionType(types=types):
            return next(_wants(part) for part in types if not isinstance(part, inspect.NoneType))
        case inspect.BoolType():
            return "true or false"
        case inspect.IntType() | inspect.FloatType():
            return ("a whole number" if isinstance(info, inspect.IntType) else "a number") + _bounds(info)
        case inspect.StrType(pattern=None):
            return "a text"
        case inspect.StrType():
            return "a text of visible ASCII characters"
        case inspect.VarTupleType():
            return "a list of paths"
        case _:
            return "a path"


def _bounds(info: inspect.IntType | inspect.FloatType) -> str:
    low = f"from {info.ge:,}" if info.ge is not None else f"above {info.gt:,}"
    return f" {low}" + (f" to {info.le:,.0f}" if info.le is not None else " up" if info.ge is not None else "")
