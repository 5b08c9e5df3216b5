"""`plugin.toml`: its types, and reading it with errors that name the key and the line."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import msgspec
from msgspec.structs import FieldInfo, fields

from engine.loader import manifest_values as values
from engine.loader.toml_lines import KeyPath
from engine.loader.toml_source import ManifestInvalid, TomlSource, nearest, shown

__all__ = ["MANIFEST_FILE", "Limits", "Manifest", "ManifestInvalid", "Package", "Sandbox", "Tool", "read_manifest"]

MANIFEST_FILE = "plugin.toml"


class Package(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A package the plugin needs: the name it is imported by, and how to install it."""

    import_: str = msgspec.field(name="import")
    install: str | None = None  # what `pip install` takes, where it differs from the import name
    version: str | None = None  # a PEP 440 specifier: ">=2.0"


class Limits(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What one worker may use."""

    timeout_s: float = 60.0
    start_timeout_s: float = 60.0  # import, __init__ and validate together
    memory_mib: int = 1024
    processes: int = 512  # processes and threads together, those of everything it starts too
    scratch_mib: int = 1024  # on disk, in the scratch folder
    workers: int = 1  # processes serving this plugin
    queue: int = 64  # calls waiting beyond that are refused


class Sandbox(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the plugin gives up beyond what no plugin has; see docs/sandbox.md."""

    network: bool = True  # false: no socket but Unix ones
    filesystem: str = "open"  # "read-only": writes to its scratch folder only; "listed": nor reads but its own
    read: tuple[str, ...] = ()  # with "listed": files and folders to be read beside those
    write: tuple[str, ...] = ()  # with "read-only" and "listed": to be read and written


class Tool(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One entry under `[tools]`."""

    description: str = ""
    timeout_s: float | None = None  # None: the plugin's limits.timeout_s
    rejects: tuple[str, ...] = ()  # exception names that mean "the caller's input is bad"


class Manifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A whole `plugin.toml`."""

    name: str
    version: str
    entry: str  # module:class inside the plugin's folder
    description: str = ""
    requires_gpu: bool = False
    packages: tuple[str | Package, ...] = ()
    models: dict[str, str] = {}
    settings: dict[str, Any] = {}
    limits: Limits = Limits()
    sandbox: Sandbox = Sandbox()
    tools: dict[str, Tool] = {}

    def timeout_s(self, tool: str) -> float:
        """The deadline of one call of `tool`, in seconds."""
        own = self.tools[tool].timeout_s
        return self.limits.timeout_s if own is None else own

    def required_packages(self) -> Iterator[Package]:
        """`packages` in one form: "numpy>=2" is `Package(import_="numpy", version=">=2")`."""
        for entry in self.packages:
            if isinstance(entry, Package):
                yield entry
            else:
                name, specifier = values.split_package(entry)
                yield Package(import_=name, version=specifier)


def read_manifest(folder: Path) -> Manifest:
    """Read and check `folder/plugin.toml`.

    Raises `ManifestInvalid`, and nothing else, for any content of the folder whatever.
    """
    source = TomlSource(folder / MANIFEST_FILE)
    top = _table(source, (), source.data, Manifest, apart=("packages", "models", "limits", "sandbox", "tools"))
    for key, problem in (
        ("name", values.name_problem(top["name"])),
        ("version", values.version_problem(top["version"])),
        ("entry", values.entry_problem(top["entry"], folder)),
        ("settings", values.settings_problem(top.get("settings", {}))),
    ):
        if problem:
            source.fail((key,), problem)
    return Manifest(
        **top,
        limits=_limits(source),
        sandbox=_sandbox(source),
        packages=_packages(source),
        models=_models(source),
        tools=_tools(source),
    )


def _limits(source: TomlSource) -> Limits:
    given = _table(source, ("limits",), source.data.get("limits", {}), Limits)
    for key, value in given.items():
        if problem := values.limit_problem(key, value):
            source.fail(("limits", key), problem)
    return Limits(**given)


def _sandbox(source: TomlSource) -> Sandbox:
    sandbox = Sandbox(**_table(source, ("sandbox",), source.data.get("sandbox", {}), Sandbox))
    if problem := values.filesystem_problem(sandbox.filesystem):
        source.fail(("sandbox", "filesystem"), problem)
    for key, paths in (("read", sandbox.read), ("write", sandbox.write)):
        if paths and (problem := values.grant_problem(key, sandbox.filesystem)):
            source.fail(("sandbox", key), problem)
        for position, path in enumerate(paths):
            if problem := values.path_problem(path, "/srv/images"):
                source.fail(("sandbox", key, position), problem)
    return sandbox


def _packages(source: TomlSource) -> tuple[str | Package, ...]:
    found: list[str | Package] = []
    for position, entry in enumerate(_value(source, ("packages",), source.data.get("packages", []), list)):
        at = ("packages", position)
        if isinstance(entry, dict):
            package = Package(**_table(source, at, entry, Package))
            for key, fault in values.package_problems(package.import_, package.install, package.version):
                source.fail((*at, key), fault)
            found.append(package)
        elif isinstance(entry, str):
            if problem := values.package_text_problem(entry):
                source.fail(at, problem)
            found.append(entry)
        else:
            source.fail(at, f'must be text or a table, got {shown(entry)}; write "numpy>=2"')
    return tuple(found)


def _models(source: TomlSource) -> dict[str, str]:
    models: dict[str, str] = {}
    given = _value(source, ("models",), source.data.get("models", {}), dict[str, Any])
    for name, value in given.items():
        models[name] = _value(source, ("models", name), value, str)
        if problem := values.model_problem(name, models[name]):
            source.fail(("models", name), problem)
    return models


def _tools(source: TomlSource) -> dict[str, Tool]:
    given = _value(source, ("tools",), source.data.get("tools", {}), dict[str, Any])
    if not given:
        source.fail(("tools",), "names no tool; add a table [tools.NAME] for a method of the class")
    tools: dict[str, Tool] = {}
    for name, value in given.items():
        at = ("tools", name)
        if problem := values.tool_name_problem(name):
            source.fail(at, problem)
        if name in Tool.__struct_fields__ and not isinstance(value, dict):
            source.fail(at, "is not known here; it belongs in [tools.NAME], with the name of a method")
        tool = tools[name] = Tool(**_table(source, at, value, Tool))
        if tool.timeout_s is not None and (problem := values.limit_problem("timeout_s", tool.timeout_s)):
            source.fail((*at, "timeout_s"), problem)
        for position, exception in enumerate(tool.rejects):
            if problem := values.rejects_problem(exception):
                source.fail((*at, "rejects", position), problem)
    return tools


def _table(
    source: TomlSource, at: KeyPath, value: object, struct: type[msgspec.Struct], apart: tuple[str, ...] = ()
) -> dict[str, Any]:
    """The fields of `struct` that a table gives, each of its declared type, by attribute name.

    Those in `apart` are known keys whose values the caller reads itself.
    """
    table = _value(source, at, value, dict[str, Any])
    known = _known(struct)
    for key in table:
        if key not in known:
            source.fail((*at, key), _unknown(key, list(known)))
    given: dict[str, Any] = {}
    for key, field in known.items():
        if key in table and key not in apart:
            given[field.name] = _value(source, (*at, key), table[key], field.type)
        elif field.required:
            source.fail((*at, key), f"is missing; add {values.EXAMPLES[key]}")
    return given


@functools.cache  # msgspec evaluates the type hints anew each time: half of the time that a manifest takes
def _known(struct: type[msgspec.Struct]) -> dict[str, FieldInfo]:
    """Its fields, by the keys that they have in a table."""
    return {field.encode_name: field for field in fields(struct)}


_TABLES = ("models", "settings", "limits", "sandbox", "tools")


def _places() -> dict[str, list[str]]:
    """Where each key of a manifest belongs, in words."""
    places: dict[str, list[str]] = {}
    for struct, place in (
        (Manifest, "at the top, above the first [table]"),
        (Limits, "in [limits]"),
        (Sandbox, "in [sandbox]"),
        (Tool, "in [tools.NAME]"),
        (Package, "in an entry of packages"),
    ):
        for field in fields(struct):
            key = field.encode_name
            places.setdefault(key, []).append("in a table of its own" if key in _TABLES else place)
    return places


_PLACES = _places()
_NEAR = 0.7  # nearer than what is near enough among the keys of the table itself


def _unknown(key: str, known: list[str]) -> str:
    """What to do about a key that its table does not know: another table may."""
    if not get_close_matches(key[:100], known, 1, _NEAR):
        for near in get_close_matches(key[:100], _PLACES, 1, _NEAR):
            return f"is not known here; `{near}` belongs {' or '.join(_PLACES[near])}"
    return f"is not known; {nearest(key, known)}"


_WORDS = {
    "str": "text in quotes",
    "bool": "true or false",
    "int": "a whole number",
    "float": "a number",
    "object": "a table",
    "array": "an array",
}
_EXPECTED = re.compile(r"Expected `([a-z]+)")
_INDEX = re.compile(r"at `\$\[(\d+)\]`")


def _value(source: TomlSource, at: KeyPath, value: object, type_: Any) -> Any:
    """`value` as `type_`, or `ManifestInvalid` saying what is wanted and what came."""
    try:
        return msgspec.convert(value, type_)
    except msgspec.ValidationError as error:
        index = _INDEX.search(str(error))
        if index and isinstance(value, list):
            at, value = (*at, int(index[1])), value[int(index[1])]
        expected = _EXPECTED.match(str(error))
        wanted = _WORDS.get(expected[1], expected[1]) if expected else "smaller"
        source.fail(at, f"must be {wanted}, got {shown(value)}; correct the value")
