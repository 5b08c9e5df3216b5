"""A plugin of pytest: whatever a test did to the interpreter's trace, the next one is noted again."""

from __future__ import annotations

import sitecustomize  # type: ignore[import-not-found]  # of the folder on PYTHONPATH


def pytest_runtest_setup() -> None:
    """Before each test."""
    sitecustomize.go_on()
