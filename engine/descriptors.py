"""How many file descriptors this process may hold, and what the processes that it starts get.

A server raises its soft limit to the hard one. What it starts keeps the limit from before: 1024 is the common soft
limit because `select` cannot handle a descriptor above it, and a plugin's libraries may use that.
"""

from __future__ import annotations

import resource

import structlog

log = structlog.get_logger(__name__)

_inherited: tuple[int, int] | None = None  # from before the limit was raised


def raise_limit() -> int:
    """Raise the soft limit of this process to the hard one; returns it."""
    global _inherited
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        _inherited = _inherited or (soft, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return hard


def limit() -> int:
    """How many this process may hold."""
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]


def restore_in(pid: int) -> None:
    """Give a process that was just started the limit from before it was raised here."""
    if _inherited is None:
        return
    try:
        resource.prlimit(pid, resource.RLIMIT_NOFILE, _inherited)
    except OSError as exc:  # a limit that is too high breaks few libraries, and no promise
        log.warning("descriptor_limit_not_restored", pid=pid, error=str(exc))
