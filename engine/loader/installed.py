"""Plugins in installed packages, by the entry-point group `holdfast.plugins`; located, not imported."""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import msgspec

from engine.loader.manifest import MANIFEST_FILE
from engine.loader.modules import CannotTell, find_module

GROUP = "holdfast.plugins"


class InstalledPlugin(msgspec.Struct, frozen=True):
    """One entry point. Its `folder` holds `plugin.toml`, unless `problem` says why not."""

    entry_point: str
    distribution: str
    folder: Path
    problem: str | None = None


def installed_plugins() -> list[InstalledPlugin]:
    """Every plugin that installed distributions offer, by entry-point name, then distribution. Never raises.

    The value of an entry point is a package (or a module in one) whose folder holds `plugin.toml`; an
    attribute after a colon is ignored.
    """
    importlib.invalidate_caches()
    plugins = [plugin for dist in _distributions() for plugin in _offered(dist)]
    return sorted(plugins, key=lambda plugin: (plugin.entry_point, plugin.distribution))


def _distributions() -> Iterator[metadata.Distribution]:
    try:
        yield from metadata.distributions()
    except Exception:  # a broken finder of distributions: what it did not list is not installed
        return


def _offered(dist: metadata.Distribution) -> Iterator[InstalledPlugin]:
    try:
        if GROUP not in (dist.read_text("entry_points.txt") or ""):
            return
        name = str(dist.metadata["Name"])
    except Exception:  # metadata that cannot be read offers nothing
        return
    site = Path(str(dist.locate_file("")))
    try:
        points = [(point.name, point.module) for point in dist.entry_points.select(group=GROUP)]
    except Exception as error:  # it offers a plugin, but not in a form that can be read: visible, not hidden
        fact = f"entry_points.txt of the installed {name} cannot be parsed ({type(error).__name__}: {error})"
        yield InstalledPlugin(name, name, site / name, f"{fact}; reinstall {name}")
        return
    for entry_point, module in points:
        folder = _folder(module)
        if folder is not None:
            yield InstalledPlugin(entry_point, name, folder)
            continue
        expected = site.joinpath(*module.split("."))
        fact = f"entry point `{entry_point}` of {name} names `{module}`, in whose folder is no {MANIFEST_FILE}"
        problem = f"{fact}; reinstall {name}, or correct its entry point"
        yield InstalledPlugin(entry_point, name, expected, problem)


def _folder(module: str) -> Path | None:
    try:
        spec = find_module(module)
    except CannotTell:
        return None
    if spec is None:
        return None
    places = [Path(place) for place in spec.submodule_search_locations or ()]
    if not places and spec.has_location and spec.origin:
        places = [Path(spec.origin).parent]
    return next((place for place in places if os.path.lexists(place / MANIFEST_FILE)), None)
