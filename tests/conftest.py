"""What every test stands on: a guard against a blocked event loop, folders of its own, the contract's summary."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from blockbuster import BlockBuster, blockbuster_ctx
from contract import MARKER, Summary

pytest.register_assert_rewrite("zoo")


def pytest_configure(config: pytest.Config) -> None:
    """Know the marker, and sum it up in the end."""
    config.addinivalue_line("markers", MARKER)
    config.pluginmanager.register(Summary(), "contract-summary")


@pytest.fixture(autouse=True)
def blockbuster() -> Iterator[BlockBuster]:
    """Fails a test in which the engine's own code blocks the event loop."""
    with blockbuster_ctx(["engine", "events"]) as guard:
        yield guard


@pytest.fixture
def plugins(tmp_path: Path) -> Path:
    """An empty plugins folder."""
    folder = tmp_path / "plugins"
    folder.mkdir()
    return folder


@pytest.fixture
def data_dir(tmp_path: Path) -> Path:
    """A data folder that does not exist yet."""
    return tmp_path / "data"
