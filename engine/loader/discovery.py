"""Finding plugins: bundled folder, given folders, installed packages. Never imports what it finds."""

from __future__ import annotations

import hashlib
import os
import re
import stat
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import msgspec

from engine.errors import Cause, ReasonCode, SetupError
from engine.loader.installed import installed_plugins
from engine.loader.manifest import MANIFEST_FILE, Manifest, ManifestInvalid, read_manifest
from engine.loader.regular_files import nameable, why
from engine.loader.toml_source import printable


class Candidate(msgspec.Struct, frozen=True):
    """A plugin that was found, fit to be started or not.

    `problem` is set if and only if there is no manifest, or the name belongs to another folder:
    `name_taken_by` is that folder.
    """

    name: str
    folder: Path  # resolved: links followed
    manifest: Manifest | None
    problem: Cause | None
    name_taken_by: Path | None = None


class _Found(msgspec.Struct, frozen=True):
    """A folder before names are given out. `declared` is the name that its manifest states, if readable."""

    folder: Path
    manifest: Manifest | None = None
    declared: str | None = None
    reason: str = ""


def discover(plugin_dirs: Sequence[Path], *, bundled: Path | None, entry_points: bool = True) -> list[Candidate]:
    """Every plugin in `bundled`, then in each of `plugin_dirs`, then in installed packages.

    Each folder may hold plugin folders or be one itself; within each source the order is by name. Folders
    without `plugin.toml`, hidden ones and `__pycache__` are skipped; what looks like a plugin but cannot
    be read is listed with its problem. A folder reached twice is listed once. Names are unique: a name
    belongs to the first manifest that states it, and any other is listed as `name@digest` of its path.

    Raises `SetupError` if a given folder does not exist or cannot be listed.
    """
    found: dict[Path, _Found] = {}
    places = [(place, "correct --plugins or plugin_dirs") for place in plugin_dirs]
    if bundled is not None:
        places.insert(0, (bundled, "reinstall holdfast or start it with --no-bundled"))
    for place, next_step in places:
        for folder in _plugin_folders(place, next_step):
            _add(found, folder)
    for plugin in installed_plugins() if entry_points else ():
        if plugin.problem:
            folder = _resolved(plugin.folder)
            found.setdefault(folder, _Found(folder, reason=plugin.problem))
        else:
            _add(found, plugin.folder)
    return list(_named(found.values()))


def reread(candidate: Candidate) -> Candidate:
    """The same plugin as its folder holds it now, under the same name: what a restart begins with.

    Never raises. A folder that is gone, or a manifest that states another name by now, is a problem.
    """
    folder, taken_by = candidate.folder, candidate.name_taken_by
    if not folder.is_dir():
        reason = f"the plugin's folder {folder} is gone; put it back and restart the plugin"
        return Candidate(candidate.name, folder, None, _cause(reason), taken_by)
    again = _look(folder) or _Found(
        folder, reason=f"{folder} holds no {MANIFEST_FILE} any more; put it back and restart the plugin"
    )
    name = candidate.name.partition("@")[0]
    if again.manifest is None:
        return Candidate(candidate.name, folder, None, _cause(again.reason), taken_by)
    if again.manifest.name != name:
        reason = (
            f"{folder / MANIFEST_FILE} now names the plugin `{again.manifest.name}`, not `{name}`; "
            "restart the engine to serve it under that name, or change the name back"
        )
        return Candidate(candidate.name, folder, None, _cause(reason), taken_by)
    problem = _cause(_taken(name, taken_by, folder)) if taken_by else None
    return Candidate(candidate.name, folder, again.manifest, problem, taken_by)


def _add(found: dict[Path, _Found], folder: Path) -> None:
    resolved = _resolved(folder)
    if resolved not in found and (look := _look(folder)):
        found[resolved] = look


def _plugin_folders(place: Path, next_step: str) -> Iterator[Path]:
    """`place` itself if it is a plugin's folder, else what it holds, in order of name."""
    try:
        names = sorted(os.listdir(place))  # noqa: PTH208 - names, not paths
    except FileNotFoundError:
        raise SetupError(f"the plugins folder {place} does not exist; create it, or {next_step}") from None
    except NotADirectoryError:
        raise SetupError(f"{place} is a file, not a folder of plugins; {next_step}") from None
    except OSError as error:
        step = f"make it readable for the engine's user, or {next_step}"
        raise SetupError(f"the plugins folder {place} cannot be listed ({why(error)}); {step}") from None
    if MANIFEST_FILE in names:
        yield place
    else:
        yield from (place / name for name in names if not (name.startswith(".") or name == "__pycache__"))


def _look(path: Path) -> _Found | None:
    """What lies at `path`; None if it is nothing that someone meant as a plugin."""
    folder = _resolved(path)
    try:
        if not stat.S_ISDIR(path.stat().st_mode):
            return None
        if not os.path.lexists(path / MANIFEST_FILE):
            return _misnamed(path, folder)
    except FileNotFoundError:
        reason = f"{path} is a link to {folder}, which does not exist; correct or remove the link"
        return _Found(folder, reason=reason)
    except OSError as error:
        reason = f"the plugin's folder {path} cannot be read ({why(error)}); correct its permissions or its link"
        return _Found(folder, reason=reason)
    try:
        manifest = read_manifest(folder)
    except ManifestInvalid as error:
        return _Found(folder, declared=error.name, reason=error.reason)
    if not nameable(folder):
        reason = f"the path of the plugin's folder {path} is not UTF-8; rename it, or the one above it that is not"
        return _Found(folder, declared=manifest.name, reason=reason)
    return _Found(folder, manifest, manifest.name)


def _misnamed(path: Path, folder: Path) -> _Found | None:
    """A folder whose manifest differs from `plugin.toml` in case only was meant as a plugin."""
    near = next((entry for entry in path.iterdir() if entry.name.casefold() == MANIFEST_FILE), None)
    return _Found(folder, reason=f"{near} must be named {MANIFEST_FILE}; rename it") if near else None


def _named(found: Iterable[_Found]) -> Iterator[Candidate]:
    """Give out names. One that a manifest states comes before one that is only a folder's."""
    every = list(found)
    owners: dict[str, Path] = {}
    for one in every:
        if one.declared:
            owners.setdefault(one.declared, one.folder)
    used = set(owners)
    for one in every:
        name = one.declared or _from_folder(one.folder)
        owner = owners.setdefault(name, one.folder)
        if owner == one.folder:
            problem = None if one.manifest else _cause(one.reason)
            yield Candidate(name, one.folder, one.manifest, problem)
        else:
            unique = _with_digest(name, one.folder, used)
            taken = _taken(name, owner, one.folder)
            reason = f"{one.reason} · {taken}" if one.reason else taken
            yield Candidate(unique, one.folder, one.manifest, _cause(reason), owner)


def _taken(name: str, owner: Path, folder: Path) -> str:
    return (
        f"the name `{name}` belongs to the plugin in {owner}, found first, so the one in {folder} is not "
        "served; rename or remove one of them, then restart the engine"
    )


def _with_digest(name: str, folder: Path, used: set[str]) -> str:
    digest = hashlib.sha256(os.fsencode(folder)).hexdigest()
    unique = next(candidate for n in range(8, len(digest)) if (candidate := f"{name}@{digest[:n]}") not in used)
    used.add(unique)
    return unique


def _from_folder(folder: Path) -> str:
    """A valid name made from a folder's."""
    name = re.sub(r"[^a-z0-9_-]", "_", folder.name.lower())
    return re.sub(r"^[^a-z]+", "", name)[:64] or "plugin"


def _resolved(path: Path) -> Path:
    try:
        return path.resolve()
    except (OSError, RuntimeError):  # a loop of links
        return path.absolute()


def _cause(reason: str) -> Cause:
    return Cause(reason_code=ReasonCode.MANIFEST_INVALID, reason=printable(reason, 4000))
