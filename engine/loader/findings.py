"""What the checks before a plugin's start found, and how several findings become one cause."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import msgspec

from engine.errors import Cause, ReasonCode

Check = Literal["sandbox", "gpu", "packages", "models"]

_ORDER: tuple[Check, ...] = ("sandbox", "gpu", "packages", "models")


class Finding(msgspec.Struct, frozen=True):
    """One thing that a plugin needs and this machine lacks; `reason` is fact, cause, next step.

    `subject` is the import name of a package, or the name of a model in the manifest.
    """

    check: Check
    reason_code: ReasonCode
    reason: str
    subject: str = ""


def in_order(findings: Sequence[Finding]) -> list[Finding]:
    """Sandbox and GPU first, then packages, then models: nobody should install gigabytes to learn next that the
    machine has no GPU. Within one check the order stays."""
    return sorted(findings, key=lambda finding: _ORDER.index(finding.check))


def combine(findings: Sequence[Finding]) -> Cause:
    """One cause for all findings: every reason, and the code of the first in the table's order.

    Raises `ValueError` if there is none: nothing found is no cause.
    """
    if not findings:
        raise ValueError("no findings: the plugin lacks nothing")
    ordered = in_order(findings)
    reasons = dict.fromkeys(finding.reason for finding in ordered)
    return Cause(reason_code=ordered[0].reason_code, reason=" · ".join(reasons))
