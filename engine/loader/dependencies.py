"""Packages a plugin declares: present, and of the version asked for. Decided without importing any."""

from __future__ import annotations

import importlib
import shlex
from collections.abc import Iterator
from importlib import metadata
from importlib.machinery import ModuleSpec
from pathlib import Path

from packaging.requirements import InvalidRequirement, Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import InvalidVersion, Version

from engine.errors import ReasonCode
from engine.loader.findings import Finding
from engine.loader.manifest import Manifest, Package
from engine.loader.modules import CannotTell, find_module, is_hollow


def check_packages(manifest: Manifest, folder: Path) -> list[Finding]:
    """What is missing or of the wrong version, in the manifest's order.

    `folder` is the plugin's own: a module in it counts as present, whatever its version. Never raises for
    the state of the installation. Reads the file system: call it in a thread.
    """
    importlib.invalidate_caches()  # a restart must see what was installed a moment ago
    return [finding for package in manifest.required_packages() for finding in _check(package, folder)]


def _check(package: Package, folder: Path) -> Iterator[Finding]:
    name = package.import_
    wanted = _specifier(package)
    try:
        spec = find_module(name, folder)
    except CannotTell:
        spec = None  # the worker's import will tell; its version can be checked all the same
    else:
        if spec is None or _is_leftover(name, spec):
            yield _finding(name, ReasonCode.PACKAGE_MISSING, f"package `{name}` is missing; {_hint(package)}")
            return
    if wanted and not (spec and _inside(name, spec, folder)):
        yield from _check_version(package, wanted)


def _check_version(package: Package, wanted: SpecifierSet) -> Iterator[Finding]:
    code = ReasonCode.PACKAGE_VERSION
    name = package.import_
    installed = _installed_version(package)
    if installed is None:
        fact = f"package `{name}` is there, but its version is not known, and {wanted} is needed"
        yield _finding(name, code, f"{fact}; {_hint(package)}")
        return
    try:
        # A pre-release that someone installed on purpose counts, as pip counts it when it is named.
        fits = wanted.contains(Version(installed), prereleases=True)
    except InvalidVersion:
        fits = False
    if not fits:
        yield _finding(name, code, f"package `{name}` is {installed}, but {wanted} is needed; {_hint(package)}")


def _finding(name: str, code: ReasonCode, reason: str) -> Finding:
    return Finding(check="packages", reason_code=code, reason=reason, subject=name)


def _is_leftover(name: str, spec: ModuleSpec) -> bool:
    """A folder without code is no package, unless a distribution owns it as part of a namespace."""
    return is_hollow(spec) and not _providers(name)


def _inside(name: str, spec: ModuleSpec, folder: Path) -> bool:
    """Whether a module is the plugin's own; one of a virtual environment within its folder is not."""
    own = folder / name.partition(".")[0]
    places = [Path(place) for place in spec.submodule_search_locations or ()]
    if spec.origin:
        places.append(Path(spec.origin))
    return any(place.parent == folder or place.is_relative_to(own) for place in places)


def _requirement(package: Package) -> Requirement | None:
    try:
        return Requirement(package.install or package.import_.partition(".")[0])
    except InvalidRequirement:  # an import name beyond ASCII is none
        return None


def _specifier(package: Package) -> SpecifierSet:
    """What `version` and `install` ("torch>=2") ask for together."""
    requirement = _requirement(package)
    return SpecifierSet(package.version or "") & (requirement.specifier if requirement else SpecifierSet())


def _hint(package: Package) -> str:
    """The command that installs it, ready for a shell."""
    requirement = _requirement(package)
    what = package.install or package.import_.partition(".")[0]
    if package.version and requirement and not requirement.specifier and not requirement.url:
        what += package.version
    return f"pip install {shlex.quote(what)}"


def _installed_version(package: Package) -> str | None:
    """The version of the distribution it installs as, else of whichever one provides the module.

    `cv2`, say, installs as opencv-python-headless here and as opencv-python elsewhere.
    """
    requirement = _requirement(package)
    if requirement and (version := _version_of(requirement.name)):
        return version
    # Only now: it reads what every distribution says of itself.
    return next((version for name in _providers(package.import_) if (version := _version_of(name))), None)


def _version_of(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except Exception:  # not installed, or its metadata is broken in one of many ways
        return None


def _providers(name: str) -> list[str]:
    """Distributions whose files hold the top-level module of a name."""
    try:
        return metadata.packages_distributions().get(name.partition(".")[0], [])
    except Exception:  # one broken distribution breaks the listing of all
        return []
