"""Where a module lies, without importing it or any package around it.

`importlib.util.find_spec` is not used as it is: on a dotted name it imports the parent, it answers from
`sys.modules` (what the engine's process once imported says nothing about what a fresh worker will find), and
one broken finder ends it. The finders themselves are asked instead, each guarded.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from pkgutil import iter_modules


class CannotTell(Exception):
    """The module's parent is there, but only running it would show what it holds (as `six.moves`)."""


def find_module(name: str, folder: Path | None = None) -> ModuleSpec | None:
    """The spec of a module, dotted or not, or None if it is missing.

    `folder` is searched first, as a worker does with its plugin's own. Raises `CannotTell`.
    """
    top, *rest = name.split(".")
    spec = next(_top_level(top, folder), None)
    for part in rest:
        if spec is None:
            return None
        if spec.submodule_search_locations is None:
            raise CannotTell(name)
        # By its last part alone: the finder of a namespace package in an unimported parent fails otherwise.
        spec = _guarded(PathFinder, part, list(spec.submodule_search_locations))
    return spec


def is_hollow(spec: ModuleSpec) -> bool:
    """Whether this is a namespace package without a module in it: a stray folder, as uninstalling leaves."""
    if spec.origin is not None or spec.submodule_search_locations is None:
        return False
    places = list(spec.submodule_search_locations)
    nested = (child for place in places for child in _subfolders(Path(place)))
    return not any(iter_modules([*places, *map(str, nested)]))


def _top_level(name: str, folder: Path | None) -> Iterator[ModuleSpec]:
    """Specs that finders give for a name: real ones in the order of the search, then hollow ones."""
    hollow: list[ModuleSpec] = []
    local = _guarded(PathFinder, name, [str(folder)]) if folder is not None else None
    for spec in (local, *(_guarded(finder, name, None) for finder in list(sys.meta_path))):
        if spec is not None and is_hollow(spec):
            hollow.append(spec)
        elif spec is not None:
            yield spec
    yield from hollow


def _guarded(finder: object, name: str, path: list[str] | None) -> ModuleSpec | None:
    try:
        spec = finder.find_spec(name, path)  # type: ignore[attr-defined]
    except Exception:  # finders are other people's code; a broken one finds nothing
        return None
    return spec if isinstance(spec, ModuleSpec) else None


def _subfolders(place: Path) -> Iterator[Path]:
    try:
        yield from (child for child in place.iterdir() if child.name != "__pycache__" and child.is_dir())
    except OSError:
        return
