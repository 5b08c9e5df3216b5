"""The engine's own log, where this process has an engine."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import structlog


def log_line(event: str, **fields: object) -> str:
    """A warning of this log, as text for whoever writes it."""
    return str(structlog.wrap_logger(structlog.ReturnLogger()).warning(event, **fields))


def log_to_stderr(level: str) -> None:
    """The engine's own log: readable on a terminal, JSON lines elsewhere; never on stdout."""
    colors = sys.stderr.isatty()
    # Plain tracebacks: rich ones show local variables, and a token may be among them.
    plain = structlog.dev.plain_traceback
    renderer: Callable[..., Any] = structlog.processors.JSONRenderer()
    if colors:
        renderer = structlog.dev.ConsoleRenderer(colors=True, exception_formatter=plain)
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            *([] if colors else [structlog.processors.format_exc_info]),
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=True,
    )
