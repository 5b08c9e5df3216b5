"""What each value of a manifest must be: one function per rule, returning the problem or None.

A problem continues the sentence "key `limits.queue` …" and ends with the next step.
"""

from __future__ import annotations

import keyword
import re
from collections.abc import Iterator
from importlib.machinery import all_suffixes
from pathlib import Path, PurePosixPath
from typing import Any

from packaging.requirements import InvalidRequirement, Requirement
from packaging.specifiers import InvalidSpecifier, SpecifierSet

from engine.loader.regular_files import why
from engine.loader.toml_source import NAME, printable, shown

EXAMPLES = {
    "name": 'name = "my_plugin"',
    "version": 'version = "1.0.0"',
    "entry": 'entry = "plugin:MyPlugin"',
    "import": 'import = "cv2"',
}
"""A line to copy for each key that has no default."""

_YEAR_S = 31_536_000.0
_RANGES = {
    "timeout_s": (0.0, _YEAR_S, "seconds"),
    "start_timeout_s": (0.0, _YEAR_S, "seconds"),
    "memory_mib": (16, 2**30, "MiB"),
    "processes": (1, 1_000_000, "processes"),
    "scratch_mib": (1, 2**30, "MiB"),
    "workers": (1, 64, "processes"),
    "queue": (0, 1_000_000, "calls"),
}
"""Lowest, highest and unit of each limit; a timeout must be above its lowest."""

FILESYSTEMS = ("open", "read-only", "listed")

_TEXT_LIMIT = 500  # characters of a one-line value: bounds parsing of requirements and every message
_TOOL_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]*")
_VARIABLE = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)\}")


def name_problem(name: str) -> str | None:
    """A plugin's name: lower case, digits, `_` and `-`, 64 characters at most."""
    if NAME.fullmatch(name):
        return None
    return f"is {shown(name)}, which does not match ^{NAME.pattern}$; rename the plugin"


def version_problem(version: str) -> str | None:
    """The plugin's own version: any text on one line."""
    return _line_problem(version, "1.0.0")


def entry_problem(entry: str, folder: Path) -> str | None:
    """`module:Class`, where the module's file or package lies in `folder` (possibly as a link)."""
    module, colon, name = entry.partition(":")
    parts = module.split(".")
    if problem := _line_problem(entry, "plugin:MyPlugin"):
        return problem
    if not (colon and _is_identifier(name) and all(_is_identifier(part) for part in parts)):
        return (
            f"is {shown(entry)}, not module:Class with a module inside the plugin's folder; "
            f"write {EXAMPLES['entry']}"
        )
    *parents, last = parts
    parent = folder.joinpath(*parents)
    try:
        if (parent / last / "__init__.py").is_file():
            return None
        if any((parent / (last + suffix)).is_file() for suffix in all_suffixes()):
            return None
    except OSError as error:  # a name too long for the file system, a folder that may not be searched
        return f"names the module `{printable(module)}`, which cannot be looked up ({why(error)}); correct entry"
    file = PurePosixPath(*parents, f"{last}.py")
    return f"names the module `{printable(module)}`, but {file} is not in {folder}; add it or correct entry"


def settings_problem(settings: dict[str, Any]) -> str | None:
    """Free-form, but within TOML's own 64-bit integers, which is also what the wire to a worker carries."""
    pending: list[object] = [settings]
    while pending:
        value = pending.pop()
        if isinstance(value, dict):
            pending.extend(value.values())
        elif isinstance(value, list):
            pending.extend(value)
        elif isinstance(value, int) and not -(2**63) <= value < 2**63:
            return "holds a whole number of more than 64 bits; write it as text"
    return None


def limit_problem(key: str, value: float) -> str | None:
    """A limit within its range. `key` is a field of `Limits`."""
    low, high, unit = _RANGES[key]
    above = key.endswith("_s")
    if (value > low if above else value >= low) and value <= high:  # NaN is neither
        return None
    bounds = f"above {low:g}, at most {high:.0f}" if above else f"from {low} to {high}"
    return f"is {shown(value)}, but must be {unit} {bounds}; correct the value"


def tool_name_problem(name: str) -> str | None:
    """A tool is a public method: an ASCII identifier, and not `validate`, which the engine calls itself."""
    if name == "validate":
        return "is the plugin's own check, not a tool; remove this table"
    if _TOOL_NAME.fullmatch(name) and not keyword.iskeyword(name):
        return None
    return f"is no name for a tool; use the name of a public method: {_TOOL_NAME.pattern}"


def rejects_problem(name: str) -> str | None:
    """The name of an exception, dotted where it is not a builtin."""
    if len(name) <= _TEXT_LIMIT and all(_is_identifier(part) for part in name.split(".")):
        return None
    return f'is {shown(name)}, not the name of an exception; write "ValueError" or "cv2.error"'


def split_package(text: str) -> tuple[str, str | None]:
    """Import name and PEP 440 specifier of an entry such as "numpy>=2". Raises `InvalidRequirement`."""
    requirement = Requirement(text)
    if requirement.marker or requirement.url or requirement.extras:
        raise InvalidRequirement("only a name and a version")
    return requirement.name, str(requirement.specifier) or None


def package_text_problem(text: str) -> str | None:
    """A package as text: an import name that is also the name to install, with or without a specifier."""
    if problem := _line_problem(text, "numpy>=2"):
        return problem
    try:
        name, _ = split_package(text)
    except InvalidRequirement:
        return f'is {shown(text)}, not a name and a version; write "numpy" or "numpy>=2"'
    if _is_module(name):
        return None
    return f'is {shown(text)}, which cannot be an import name; write {{ import = "…", install = {shown(name)} }}'


def package_problems(import_: str, install: str | None, version: str | None) -> Iterator[tuple[str, str]]:
    """(key, problem) of a package given as a table."""
    if len(import_) > _TEXT_LIMIT or not _is_module(import_):
        yield "import", f"is {shown(import_)}, not a module's name; write {EXAMPLES['import']}"
    if install is not None:
        try:
            Requirement(install[:_TEXT_LIMIT])
        except InvalidRequirement:
            yield "install", f'is {shown(install)}, not what pip takes; write "opencv-python-headless"'
        else:
            if problem := _line_problem(install, "opencv-python-headless"):
                yield "install", problem
    if version is not None:
        try:
            SpecifierSet(version[:_TEXT_LIMIT])
        except InvalidSpecifier:
            yield "version", f'is {shown(version)}, not a version specifier; write ">=2.0"'
        else:
            if problem := _line_problem(version, ">=2.0"):
                yield "version", problem


def model_problem(name: str, file: str) -> str | None:
    """A model file: relative and inside the plugin's folder, or absolute, or with `${VAR}` in it.

    A relative path that climbs out of the folder is the manifest's own fault, whatever is installed, and
    refused here; one that only its variables lead out of the folder is refused when they are known.
    """
    return _line_problem(name, "detector") or path_problem(file, "models/detector.pt2")


def path_problem(file: str, example: str) -> str | None:
    """A path: relative and inside the plugin's folder, or absolute, or with `${VAR}` in it."""
    if problem := _line_problem(file, example):
        return problem
    if "${" in _VARIABLE.sub("", file):
        return f"is {shown(file)}, with a variable that is not ${{NAME}}; write ${{FOLDER}}/{example.lstrip('/')}"
    if file.startswith("~"):
        return f"is {shown(file)}, and ~ is not expanded; write ${{HOME}}{printable(file[1:])}"
    if not _VARIABLE.search(file) and leaves_folder(file):
        return f"is {shown(file)}, which leaves the plugin's folder; write an absolute path or ${{VAR}}"
    return None


def filesystem_problem(kind: str) -> str | None:
    """How much of the file system a plugin has."""
    if kind in FILESYSTEMS:
        return None
    return f"is {shown(kind)}; write one of {', '.join(FILESYSTEMS)}"


def grant_problem(key: str, filesystem: str) -> str | None:
    """`read` and `write` widen what `filesystem` narrows; where it narrows nothing, they would mislead."""
    if filesystem == "listed" or (key == "write" and filesystem == "read-only"):
        return None
    wanted = '"listed"' if key == "read" else '"read-only" or "listed"'
    return f'has no meaning with filesystem = "{filesystem}"; write filesystem = {wanted}, or remove it'


def leaves_folder(file: str) -> bool:
    """Whether a relative path climbs out of where it starts, by its text alone."""
    path = PurePosixPath(file)
    depth = 0
    for part in path.parts:
        depth += -1 if part == ".." else 1
        if depth < 0:
            return not path.is_absolute()
    return False


def _is_identifier(text: str) -> bool:
    return text.isidentifier() and not keyword.iskeyword(text)


def _is_module(text: str) -> bool:
    return all(_is_identifier(part) for part in text.split("."))


def _line_problem(text: str, example: str) -> str | None:
    """What every one-line value must be: not blank, not endless, and printable."""
    if not text.strip():
        return f'is empty; write something like "{example}"'
    if len(text) > _TEXT_LIMIT:
        return f"is longer than {_TEXT_LIMIT} characters; shorten it"
    if not text.isprintable():
        return f"is {shown(text)}, with characters that cannot be printed; remove them"
    return None
