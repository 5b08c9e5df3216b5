"""The sandbox that a manifest asks for: whether this kernel can make it, and which paths it names."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from engine.errors import ReasonCode
from engine.loader.findings import Finding
from engine.loader.manifest import Manifest
from engine.loader.manifest_values import leaves_folder
from engine.sandbox import wire
from engine.sandbox.containment import Support, supported

_ELSEWHERE = "run the plugin on a machine that can, or remove the line"
_VARIABLE = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)\}")


def check_sandbox(
    manifest: Manifest, folder: Path, env: Mapping[str, str] | None = None, support: Support | None = None
) -> list[Finding]:
    """What of the plugin's `[sandbox]` cannot be had here: nothing runs with less than it asks for.

    Args:
        manifest: the plugin's.
        folder: the plugin's.
        env: for `${VAR}`; the process's own, if None.
        support: what the kernel can do; asked of it, if None.
    """
    has = support or supported()
    sandbox = manifest.sandbox
    problems = []
    if not sandbox.network and not has.network:
        problems.append(("network", f"network = false needs seccomp, which is not to be had here; {_ELSEWHERE}"))
    if sandbox.filesystem != "open" and not has.filesystem:
        wants = f'filesystem = "{sandbox.filesystem}" needs the Landlock of Linux 6.2'
        problems.append(("filesystem", f"{wants}, and this kernel has {has.landlock_name}; {_ELSEWHERE}"))
    problems += _path_problems(manifest, folder, os.environ if env is None else env)
    return [
        Finding("sandbox", ReasonCode.SANDBOX_UNSUPPORTED, f"[sandbox] {problem}", subject)
        for subject, problem in problems
    ]


def resolve_sandbox(
    manifest: Manifest, folder: Path, uploads: Path, env: Mapping[str, str] | None = None
) -> wire.Sandbox:
    """What a worker is told of the manifest's `[sandbox]`, once `check_sandbox` found nothing amiss.

    Args:
        manifest: the plugin's.
        folder: the plugin's.
        uploads: where the files of calls are, which any tool may read; it exists when the worker starts.
        env: as of `check_sandbox`.
    """
    known = os.environ if env is None else env
    sandbox = manifest.sandbox
    read, write = (
        tuple(str(folder / _expanded(path, known)) for path in paths) for paths in (sandbox.read, sandbox.write)
    )
    if sandbox.filesystem == "listed":
        read = (*read, str(uploads))
    return wire.Sandbox(sandbox.network, sandbox.filesystem, read, write)


def _path_problems(manifest: Manifest, folder: Path, env: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    for key, paths in (("read", manifest.sandbox.read), ("write", manifest.sandbox.write)):
        for path in paths:
            if unset := [name for name in _VARIABLE.findall(path) if not env.get(name)]:
                fact = f"{key} names {path}, but the variable {unset[0]} is not set"
                yield key, f"{fact}; set it in the engine's environment and restart the engine"
                continue
            expanded = _expanded(path, env)
            if leaves_folder(expanded):
                yield key, f"{key} names {expanded}, which leaves the plugin's folder; use an absolute path"
            elif not (folder / expanded).exists():
                yield key, f"{key} names {folder / expanded}, which does not exist; make it, or remove the line"


def _expanded(path: str, env: Mapping[str, str]) -> str:
    return _VARIABLE.sub(lambda match: env[match[1]], path)
