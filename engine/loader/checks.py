"""Everything that is checked before a plugin's worker is started."""

from __future__ import annotations

import asyncio
from pathlib import Path

from msgspec import structs

from engine.errors import ReasonCode
from engine.loader.containment import check_sandbox
from engine.loader.dependencies import check_packages
from engine.loader.findings import Finding, in_order
from engine.loader.gpu import GpuCheck
from engine.loader.manifest import Manifest, Sandbox
from engine.loader.model_files import check_models


async def check(manifest: Manifest, folder: Path, gpu: GpuCheck, *, refresh_gpu: bool = False) -> list[Finding]:
    """What the plugin in `folder` needs and this machine lacks, in the table's order; empty if nothing.

    The GPU is looked at only for a plugin that requires one. Files are read in a thread.
    """
    findings = await gpu.findings(refresh=refresh_gpu) if manifest.requires_gpu else []
    if manifest.packages or manifest.models or manifest.sandbox != Sandbox():  # what the thread looks at
        findings += await asyncio.to_thread(_check_files, manifest, folder)
    return in_order(_torch_once(findings))


def _check_files(manifest: Manifest, folder: Path) -> list[Finding]:
    return [
        *check_sandbox(manifest, folder),
        *check_packages(manifest, folder),
        *check_models(manifest, folder),
    ]


def _torch_once(findings: list[Finding]) -> list[Finding]:
    """A missing torch is one finding: the GPU check's code, and the manifest's word on how to install it."""
    missing = [f for f in findings if f.subject == "torch" and f.reason_code is ReasonCode.PACKAGE_MISSING]
    if not missing or not any(f.reason_code is ReasonCode.TORCH_MISSING for f in findings):
        return findings
    return [
        structs.replace(finding, reason=missing[0].reason)
        if finding.reason_code is ReasonCode.TORCH_MISSING
        else finding
        for finding in findings
        if finding not in missing
    ]
