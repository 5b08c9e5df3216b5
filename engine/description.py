"""A plugin as its callers see it: manifest, tools with their schemas, and what the checks found."""

from __future__ import annotations

import msgspec

from engine.loader.findings import Finding
from engine.loader.manifest import Limits, Package, Sandbox
from engine.loader.toml_source import printable
from engine.registry import Incarnation


class ToolDescription(msgspec.Struct, frozen=True):
    """A tool, for its callers. `parameters` is a JSON Schema, null until the plugin was INITIALIZED."""

    name: str
    description: str
    timeout_s: float
    rejects: tuple[str, ...]
    streams: bool
    progress: bool
    parameters: msgspec.Raw


class PluginDescription(msgspec.Struct, frozen=True):
    """A plugin's manifest, tools and checks. Its `[settings]` stay private: they may hold secrets."""

    name: str
    state: str
    reason: str | None
    reason_code: str | None
    folder: str
    version: str | None = None
    description: str | None = None
    entry: str | None = None
    requires_gpu: bool = False
    packages: tuple[str | Package, ...] = ()
    models: dict[str, str] = {}
    limits: Limits | None = None
    sandbox: Sandbox | None = None  # what it gives up beyond what no plugin has
    tools: tuple[ToolDescription, ...] = ()
    checks: tuple[Finding, ...] = ()


def describe(incarnation: Incarnation) -> PluginDescription:
    """The description of a plugin's present incarnation."""
    status, manifest = incarnation.status, incarnation.manifest
    head = PluginDescription(
        name=incarnation.name,
        state=status.state.value,
        reason=None if status.cause is None else status.cause.reason,
        reason_code=None if status.cause is None else status.cause.reason_code.value,
        folder=printable(str(incarnation.candidate.folder), 4096),
    )
    if manifest is None:
        return head
    return msgspec.structs.replace(
        head,
        version=manifest.version,
        description=manifest.description,
        entry=manifest.entry,
        requires_gpu=manifest.requires_gpu,
        packages=manifest.packages,
        models=manifest.models,
        limits=manifest.limits,
        sandbox=manifest.sandbox,
        tools=_tools(incarnation),
        checks=tuple(incarnation.findings),
    )


def _tools(incarnation: Incarnation) -> tuple[ToolDescription, ...]:
    manifest = incarnation.manifest
    if manifest is None:
        return ()
    described = []
    for name, tool in manifest.tools.items():
        info = incarnation.tools.get(name)
        described.append(
            ToolDescription(
                name=name,
                description=tool.description,
                timeout_s=manifest.timeout_s(name),
                rejects=tool.rejects,
                streams=info is not None and info.streams,
                progress=info is not None and info.progress,
                parameters=msgspec.Raw(b"null" if info is None else info.parameters.encode()),
            )
        )
    return tuple(described)
